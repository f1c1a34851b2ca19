"""Diffusion pipelines of a few thousand weights, written to disk as their kinds of pipeline are."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from open_clip.tokenizer import bytes_to_unicode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

KINDS = ("sd", "sdxl", "sd3", "pixel")


def tokenizer(context_length: int) -> CLIPTokenizer:
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="!", model_max_length=context_length)


def text_encoder(context_length: int, width: int = 16, projection: int | None = None) -> Any:
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context_length,
        projection_dim=projection or width,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=514, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.5,
        shift_factor=0.0,
    ).eval()


def unet(channels: int = 4, out_channels: int | None = None, context: int = 16, **further: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=out_channels or channels,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=context,
        **further,
    ).eval()


def build(kind: str, folder: Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Writes a pipeline with random weights: 16 pixels (8 for ``pixel``), 20 ids per text (77 for the last two)."""
    torch.manual_seed(seed)
    ddim = DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=prediction_type)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline: Any
    if kind == "sd":
        pipeline = StableDiffusionPipeline(
            vae=vae(), text_encoder=text_encoder(20), tokenizer=tokenizer(20), unet=unet(), scheduler=ddim, **none
        )
    elif kind == "sdxl":
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        pipeline = StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=text_encoder(20),
            text_encoder_2=text_encoder(20, projection=16),
            tokenizer=tokenizer(20),
            tokenizer_2=tokenizer(20),
            unet=unet(context=32, projection_class_embeddings_input_dim=16 + 6 * 8, **added),
            scheduler=EulerDiscreteScheduler(),
        )
    elif kind == "sd3":
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
        ).eval()
        pipeline = StableDiffusion3Pipeline(
            vae=vae(),
            text_encoder=text_encoder(77, projection=16),
            text_encoder_2=text_encoder(77, projection=16),
            text_encoder_3=t5_encoder(),
            tokenizer=tokenizer(77),
            tokenizer_2=tokenizer(77),
            tokenizer_3=tokenizer(256),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    elif kind == "flux":
        flux = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=True,
        ).eval()
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(),
            text_encoder=text_encoder(77),
            tokenizer=tokenizer(77),
            text_encoder_2=t5_encoder(),
            tokenizer_2=tokenizer(128),
            transformer=flux,
        )
    else:
        pipeline = IFPipeline(
            tokenizer=tokenizer(77),
            text_encoder=text_encoder(77),
            unet=unet(3, out_channels=6),
            scheduler=DDPMScheduler(prediction_type=prediction_type),
            watermarker=None,
            **none,
        )
    pipeline.save_pretrained(folder)
    return folder
