"""Everything of the embedded diffusion pipeline but its UNet, which `recipes/emoji/text_to_image.yaml` trains.

Run:  python recipes/emoji/text_to_image_base.py SCORER OUT
      SCORER is the folder that `recipes/emoji/pretrain_scorer.yaml` exports to; OUT becomes a pipeline in diffusers'
      layout, without UNet weights: the `pretrained` of the generator in text_to_image.yaml.
Needs: one CPU core, a quarter of an hour. Both parts come from the drawings of the other hands alone, never from Noto.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from gmail_lightning.datasets import EmojiDataset
from gmail_lightning.models import OpenCLIPEncoder
from gmail_lightning.models.encoders.byte_pairs import clip_tokenizer, read_byte_pairs
from gmail_lightning.models.encoders.conversion import clip_text_model
from gmail_lightning.transforms import resize
from gmail_lightning.types import ImageSpec

HANDS = ("fluent_flat", "fluent", "twemoji", "emojione")
SIZE, BATCH, STEPS, RATE = 32, 64, 1200, 2e-3


def train_autoencoder() -> AutoencoderTiny:
    """32x32 pixels to 8 channels of 8x8: mean 0 and deviation 1 by a penalty, robust to noise of 0.15."""
    torch.manual_seed(0)
    spec = ImageSpec((SIZE, SIZE))
    datasets = [EmojiDataset(hand) for hand in HANDS]
    pixels = torch.stack([resize(dataset.image(i), spec) for dataset in datasets for i in range(len(dataset))]) * 2 - 1
    vae = AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=8,
        act_fn="silu",
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    for step in range(STEPS):
        image = pixels[torch.randint(len(pixels), (BATCH,))]
        image = image.flip(3) if step % 2 else image
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encoder(image).float()
            decoded = vae.decoder(latents + 0.15 * torch.randn_like(latents)).float()
        spread = latents.mean((0, 2, 3)).square().mean() + (latents.var((0, 2, 3)) - 1).square().mean()
        error = functional.mse_loss(decoded, image)
        loss = error + 0.2 * functional.l1_loss(decoded, image) + 0.05 * spread
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            psnr = -10 * torch.log10(error / 4)
            print(f"step {step + 1}/{STEPS}  PSNR {psnr:.1f} dB", flush=True)
    return vae


def convert_text_tower(scorer: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The text tower of an open_clip folder as transformers' CLIPTextModel, with its vocabulary, filled up with 0."""
    encoder = OpenCLIPEncoder(pretrained=str(scorer))
    pairs = read_byte_pairs(encoder.merges)
    vocabulary = clip_tokenizer(pairs, encoder.text_spec.context_length).get_vocab()
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=pairs, pad_token="!", model_max_length=encoder.text_spec.context_length
    )
    assert len(tokenizer) == encoder.tokenizer.vocab_size
    return clip_text_model(encoder), tokenizer


def main(scorer: Path, out: Path) -> None:
    """Writes the pipeline and removes the weights of its UNet, which are random."""
    text_encoder, tokenizer = convert_text_tower(scorer)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(112, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=16,
        cross_attention_dim=text_encoder.config.hidden_size,
    )
    schedule = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=train_autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    (out / "unet" / "diffusion_pytorch_model.safetensors").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
