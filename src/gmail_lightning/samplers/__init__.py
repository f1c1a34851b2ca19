"""Samplers that mix real and generated rows, and that share out evaluation rows."""

from gmail_lightning.samplers.mixed_modality import MixedModalitySampler, UnpaddedDistributedSampler

__all__ = ["MixedModalitySampler", "UnpaddedDistributedSampler"]
