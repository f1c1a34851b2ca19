"""Random weights under local paths, in the forms in which the recipes' pretrained ones are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512 + 2
WORDS = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
#: ViT-L/14 at both sizes but for its depth, too deep for two cores; the widths are those that the recipes name.
SHALLOW_L14 = {
    size: {
        "embed_dim": 768,
        "quick_gelu": True,
        "vision_cfg": {"image_size": size, "layers": 2, "width": 1024, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    for size in (224, 336)
}


def open_clip_file(path: Path, model: str | dict[str, Any]) -> Path:
    """State dict of a CLIP in half precision, as OpenAI's files are."""
    import open_clip

    torch.manual_seed(0)
    config = open_clip.get_model_config(model) if isinstance(model, str) else model
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value.half() for key, value in open_clip.CLIP(**config).state_dict().items()}, path)
    return path


def long_clip_file(path: Path) -> Path:
    """State dict of Long-CLIP-B/16: two tables of 248 positions, and what says which rows of each count."""
    state = torch.load(open_clip_file(path, "ViT-B-16-quickgelu"), weights_only=True)
    words = state["positional_embedding"].shape[1]
    mask = torch.zeros(248, 1).index_fill(0, torch.arange(20), 1)
    tables = {"positional_embedding": torch.randn(248, words), "positional_embedding_res": torch.randn(248, words)}
    torch.save({**state, **tables, "mask1": mask, "mask2": 1 - mask}, path)
    return path


def tokenizer(folder: Path, chat_template: str | None = None) -> Path:
    """Every byte is a token, and so is every byte that ends a word; then start and end of a text."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    made = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    made.chat_template = chat_template
    made.save_pretrained(folder)
    return folder


def siglip(folder: Path) -> Path:
    """SigLIP B/16 but for its depth and its words, with its image processor."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(0)
    width = {"hidden_size": 768, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 12}
    text = {**width, **WORDS, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    SiglipModel(SiglipConfig(text_config=text, vision_config={**width, "image_size": 224})).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)
    return tokenizer(folder)


def gpt2(folder: Path) -> Path:
    """A small GPT-2 with a tokenizer of bytes."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    torch.manual_seed(0)
    words = [*bytes_to_unicode().values(), "<|endoftext|>"]
    GPT2Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    ends = {"bos_token_id": len(words) - 1, "eos_token_id": len(words) - 1}
    config = GPT2Config(vocab_size=len(words), n_embd=64, n_layer=2, n_head=4, n_positions=512, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def _llama(**further: int) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, "max_position_embeddings": 2048, "vocab_size": VOCABULARY, **WORDS, **further}


def llama(folder: Path, chat_template: str | None = None) -> Path:
    """A small Llama: Vicuna without a chat template, Llama 3 with its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_llama())).save_pretrained(folder)
    return tokenizer(folder, chat_template)


LLAMA3_CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAVA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llava(folder: Path, clip: Path) -> Path:
    """LLaVA 1.5 in small, with its processor; its tower is that of ``clip``, a file of ``SHALLOW_L14[336]``."""
    import open_clip
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(0)
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16}
    vision = {
        "model_type": "clip_vision_model",
        **tower,
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    }
    text = {"model_type": "llama", **_llama(vocab_size=VOCABULARY + 1)}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCABULARY)
    model = LlavaForConditionalGeneration(config)
    visual = open_clip.CLIP(**SHALLOW_L14[336]).eval()
    visual.load_state_dict(torch.load(clip, weights_only=True))
    copy_tower(visual.visual.state_dict(), model.model.vision_tower)
    model.save_pretrained(folder)
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(str(tokenizer(folder)))
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert words.convert_tokens_to_ids("<image>") == VOCABULARY
    images = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    LlavaProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def copy_tower(source: dict[str, torch.Tensor], tower: Any) -> None:
    """Copies open_clip's image tower into that of transformers, whose names are others."""
    host = getattr(tower, "vision_model", tower)
    own = host.state_dict()
    renamed = {
        "embeddings.class_embedding": source["class_embedding"],
        "embeddings.patch_embedding.weight": source["conv1.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
    }
    pairs = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
    for layer in range(2):
        there, here = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        pairs |= {f"{there}.layer_norm1": f"{here}.ln_1", f"{there}.layer_norm2": f"{here}.ln_2"}
        pairs |= {f"{there}.mlp.fc1": f"{here}.mlp.c_fc", f"{there}.mlp.fc2": f"{here}.mlp.c_proj"}
        pairs[f"{there}.self_attn.out_proj"] = f"{here}.attn.out_proj"
        for kind in ("weight", "bias"):
            thirds = source[f"{here}.attn.in_proj_{kind}"].chunk(3)
            renamed |= {f"{there}.self_attn.{q}_proj.{kind}": part for q, part in zip("qkv", thirds, strict=True)}
    renamed |= {f"{a}.{kind}": source[f"{b}.{kind}"] for a, b in pairs.items() for kind in ("weight", "bias")}
    assert own.keys() - renamed.keys() <= {"embeddings.position_ids"}
    host.load_state_dict(renamed, strict=False)


def open_clip_folder(folder: Path) -> Path:
    """A small CLIP as a folder of open_clip: the scorer of generated images."""
    from gmail_lightning.models.encoders.open_clip import OpenCLIPEncoder, save_open_clip

    torch.manual_seed(0)
    plain = OpenCLIPEncoder(config={**SHALLOW_L14[224], "vision_cfg": {**SHALLOW_L14[224]["vision_cfg"], "width": 64}})
    save_open_clip(folder, plain.model_config, plain.preprocess_config, plain.model.state_dict(), plain.merges)
    return folder


def stable_diffusion(folder: Path, clip: Path) -> Path:
    """Stable Diffusion in small; its text encoder is the text tower of ``clip``, a file of ``SHALLOW_L14[224]``."""
    import tiny_pipelines
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from gmail_lightning.models.encoders.byte_pairs import clip_tokenizer, read_byte_pairs
    from gmail_lightning.models.encoders.conversion import clip_text_model
    from gmail_lightning.models.encoders.open_clip import OpenCLIPEncoder

    config = SHALLOW_L14[224]
    text = clip_text_model(OpenCLIPEncoder(config=config, pretrained=str(clip)))
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=tiny_pipelines.vae(),
        text_encoder=text,
        tokenizer=clip_tokenizer(read_byte_pairs(None), config["text_cfg"]["context_length"]),
        unet=tiny_pipelines.unet(context=config["text_cfg"]["width"]),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder
