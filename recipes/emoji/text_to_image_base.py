"""Everything of the embedded diffusion pipeline but its UNet, which `recipes/emoji/text_to_image.yaml` trains.

Run:  python recipes/emoji/text_to_image_base.py SCORER OUT
      SCORER is the folder that `recipes/emoji/pretrain_scorer.yaml` exports to; OUT becomes a pipeline in diffusers'
      layout, without UNet weights: the `pretrained` of the generator in text_to_image.yaml.
Needs: one CPU core, a quarter of an hour. Both parts come from the drawings of the other hands alone, never from Noto.
"""

import gzip
import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.tokenizer import bytes_to_unicode
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from gmail_lightning.datasets import EmojiDataset
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
    """The text tower of an open_clip folder as transformers' CLIPTextModel, with its vocabulary."""
    config = json.loads((scorer / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    weights = load_file(scorer / "open_clip_model.safetensors")
    state = {
        "embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
        "final_layer_norm.weight": weights["ln_final.weight"],
        "final_layer_norm.bias": weights["ln_final.bias"],
    }
    names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(config["layers"]):
        old, new = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = weights[f"{old}.attn.in_proj_{kind}"].chunk(3)
            state |= {f"{new}.self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
            state |= {f"{new}.{theirs}.{kind}": weights[f"{old}.{ours}.{kind}"] for ours, theirs in names.items()}
    end = config["vocab_size"] - 1
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["width"],
            intermediate_size=4 * config["width"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            max_position_embeddings=config["context_length"],
            hidden_act="gelu",
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=0,
        )
    )
    own = {key.removeprefix("text_model.") for key in model.state_dict()}
    prefix = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
    assert own - {"embeddings.position_ids"} == set(state), own ^ set(state)
    model.load_state_dict({prefix + key: value.float() for key, value in state.items()})

    merges = gzip.decompress((scorer / "merges.txt.gz").read_bytes()).decode().split("\n")[1:]
    merges = [merge for merge in merges if merge][: config["vocab_size"] - 512 - 2]
    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[tuple(merge.split()) for merge in merges],
        pad_token="!",
        model_max_length=config["context_length"],
    )
    assert len(tokenizer) == config["vocab_size"]
    return model, tokenizer


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
