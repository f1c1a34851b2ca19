"""Text files that say what the rows are: manifests, annotation files, and how they are parsed once."""
