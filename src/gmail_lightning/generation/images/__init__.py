"""The store of generated images: which ones, their names and seeds, shards, an audit, a manifest and a card."""
