"""Making data: what is to be made, who makes it, and how it becomes a store. Nothing here knows Lightning."""
