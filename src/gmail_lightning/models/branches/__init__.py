"""One tower, two branches: the router, its adapters, and what a checkpoint keeps of them."""
