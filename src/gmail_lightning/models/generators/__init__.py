"""Text-to-image models, and the pieces that train them."""
