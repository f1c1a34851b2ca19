"""One text tower for a CLIP and for a diffusion model."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from gmail_lightning.models.base import DualEncoder
from gmail_lightning.models.generators.diffusion import DiffusersGenerator

PROBES = ["", "A photo of a red dress, size 38.", "Größe: zwölf (12) Äpfel"]


class CLIPTextTower(nn.Module):
    """The text tower of a dual encoder, as a pipeline of diffusers calls its text encoder; the encoder's own weights.

    Args:
        encoder: The dual encoder.
        config: Of the text encoder that it stands in for.
    """

    def __init__(self, encoder: DualEncoder, config: Any) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.encoder.parameters()).device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        """Maps token ids (B, L) to the hidden states (B, L, W), first of a tuple as in transformers."""
        return (self.encoder.text_tokens(input_ids),)


@torch.no_grad()
def share_text_tower(generator: DiffusersGenerator, encoder: DualEncoder) -> None:
    """Lets a pipeline read its prompts through the text tower of a dual encoder, which reads the pipeline's token ids.

    Args:
        generator: A pipeline with one text encoder.
        encoder: With ``text_tokens``.

    Raises:
        ValueError: If the width, the context length or the tokenizer of the two differ.
        NotImplementedError: If the encoder has no ``text_tokens``.
    """
    own, spec = generator.part("text_encoder"), generator.text_spec
    apart = "Give a CLIP with the pipeline's own text tower, or text_tower='separate'."
    if spec.context_length != encoder.text_spec.context_length:
        raise ValueError(
            f"The pipeline {generator.name} reads {spec.context_length} token ids, the CLIP "
            f"{encoder.text_spec.context_length}. {apart}"
        )
    ids, ids_of_clip = spec.encode(PROBES), encoder.text_spec.encode(PROBES)
    fits = int(ids.max()) == int(ids_of_clip.max()) and torch.allclose(  # both hold the end of a text
        F.normalize(encoder.encode_text(ids)), F.normalize(encoder.encode_text(ids_of_clip)), atol=1e-3
    )
    if not fits:
        raise ValueError(f"The tokenizers of the pipeline {generator.name} and of the CLIP differ. {apart}")
    tokens, wanted = encoder.text_tokens(ids), generator.part("unet").config.cross_attention_dim
    if tokens.shape[-1] != wanted:
        raise ValueError(
            f"The UNet of {generator.name} attends to width {wanted}, the text tower of the CLIP has width "
            f"{tokens.shape[-1]}. {apart}"
        )
    likeness = F.cosine_similarity(tokens, generator.encode_text(ids), dim=-1).mean().item()
    if likeness < 0.99:
        rank_zero_info(
            f"The CLIP's text tower is not the one that the UNet of {generator.name} was trained with (mean cosine of "
            f"what they say {likeness:.2f}): its images will be poor until the UNet has learned to read it."
        )
    generator.share_text_encoder(CLIPTextTower(encoder, own.config))
