"""Pictures in tar shards: which members belong together, where they lie, and the rows that they make."""
