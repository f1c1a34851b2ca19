"""Joint fine-tuning of a CLIP and a diffusion model."""
