"""One name for each tensor of an encoder, whether open_clip, timm or transformers holds it."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from gmail_lightning.models.base import ImageEncoder
from gmail_lightning.models.weights import plain_names

# By tower: where its blocks are, and names for what lies beside them. Other tensors are called by their own keys.
_BLOCKS = {
    "image": r"(?:visual\.transformer\.resblocks|visual\.trunk\.blocks|(?:vision_model\.)?encoder\.layers)",
    "text": r"(?:(?:text\.)?transformer\.resblocks|text_model\.encoder\.layers)",
}
_BESIDE = {
    "image": {
        "conv1": r"visual\.conv1|visual\.trunk\.patch_embed\.proj|(?:vision_model\.)?embeddings\.patch_embedding",
        "class_embedding": (
            r"visual\.class_embedding|visual\.trunk\.cls_token|(?:vision_model\.)?embeddings\.class_embedding"
        ),
        "positional_embedding": (
            r"visual\.positional_embedding|visual\.trunk\.pos_embed|(?:vision_model\.)?embeddings\.position_embedding"
        ),
        "ln_pre": r"visual\.ln_pre|visual\.trunk\.norm_pre|(?:vision_model\.)?pre_layrnorm",
        "ln_post": r"visual\.ln_post|visual\.trunk\.norm|(?:vision_model\.)?post_layernorm",
        "proj": r"visual\.proj|visual\.head\.proj|visual_projection",
        "pool.latent": r"visual\.trunk\.attn_pool\.latent|(?:vision_model\.)?head\.probe",
        "pool.q": r"visual\.trunk\.attn_pool\.q",
        "pool.kv": r"visual\.trunk\.attn_pool\.kv",
        "pool.qkv": r"(?:vision_model\.)?head\.attention\.in_proj",
        "pool.out": r"visual\.trunk\.attn_pool\.proj|(?:vision_model\.)?head\.attention\.out_proj",
        "pool.norm": r"visual\.trunk\.attn_pool\.norm|(?:vision_model\.)?head\.layernorm",
        "pool.fc1": r"visual\.trunk\.attn_pool\.mlp\.fc1|(?:vision_model\.)?head\.mlp\.fc1",
        "pool.fc2": r"visual\.trunk\.attn_pool\.mlp\.fc2|(?:vision_model\.)?head\.mlp\.fc2",
    },
    "text": {
        "token_embedding": r"(?:text\.)?token_embedding|text_model\.embeddings\.token_embedding",
        "positional_embedding": r"(?:text\.)?positional_embedding|text_model\.embeddings\.position_embedding",
        "ln_final": r"(?:text\.)?ln_final|text_model\.final_layer_norm",
        "text_projection": r"(?:text\.)?text_projection|text_model\.head",
    },
}
_IN_BLOCK = {
    "qkv": r"attn\.in_proj|attn\.qkv",
    "q": r"(?:self_)?attn\.q_proj",
    "k": r"(?:self_)?attn\.k_proj",
    "v": r"(?:self_)?attn\.v_proj",
    "out": r"(?:self_)?attn\.out_proj|attn\.proj",
    "fc1": r"mlp\.(?:c_fc|fc1)",
    "fc2": r"mlp\.(?:c_proj|fc2)",
    "ln_1": r"ln_1|norm1|layer_norm1",
    "ln_2": r"ln_2|norm2|layer_norm2",
}
_FUSED = re.compile(r"^(.*?)(qkv|kv)(\.bias)?$")
_PLAIN = re.compile(r"parametrizations\.(\w+)\.original$")
_UNUSED = re.compile(r"(^|\.)(lora\..+|position_ids|num_batches_tracked)$")  # adapters, and counters


def stored_tensors(encoder: ImageEncoder) -> dict[str, tuple[str, Tensor]]:
    """The tensors of a plain encoder by a name that is the same in all forms of one model.

    Names are open_clip's (``image.conv1``, ``image.0.ln_1.bias``, ``text.token_embedding``); in the blocks the matrices
    go by their roles, and a fused projection by those of its parts (``image.0.q``). Matrices that features are
    multiplied by from the right are turned into the form of a linear layer.

    Args:
        encoder: The encoder, adapted or plain; adapters are left out.

    Returns:
        By name, the key in the encoder's state dict and the tensor, a view where it is part of a parameter.
    """
    texts = _text_keys(encoder)
    found: dict[str, tuple[str, Tensor]] = {}
    with torch.enable_grad():
        state = encoder.state_dict(keep_vars=True)
    for key, plain in zip(state, plain_names(dict.fromkeys(state)), strict=True):
        tensor = state[key]
        if _UNUSED.search(key) is None:
            tower = "text" if key in texts or key.rpartition(".")[0] in texts else "image"
            own = plain.removeprefix("model.")
            name = _common_name(tower, own)
            if name.endswith((".proj", ".text_projection")) and not key.endswith(".weight") and tensor.ndim == 2:
                tensor = tensor.T
            fused = _FUSED.match(name) if name != f"{tower}.{own}" else None
            if fused is None or len(tensor) % len(fused[2]):
                found[name] = key, tensor
            else:
                for role, part in zip(fused[2], tensor.detach().chunk(len(fused[2])), strict=True):
                    found[f"{fused[1]}{role}{fused[3] or ''}"] = key, part
    return found


def _text_keys(encoder: ImageEncoder) -> set[str]:
    """Keys of the text tower's parameters, and the modules that hold them; none where the encoder does not tell."""
    try:
        texts = {id(parameter) for parameter in encoder.text_parameters()}
    except NotImplementedError:
        return set()
    names = [_PLAIN.sub(r"\1", name) for name, p in encoder.named_parameters() if id(p) in texts]
    modules = {name.rpartition(".")[0] for name in names}
    images = [_PLAIN.sub(r"\1", name) for name, p in encoder.named_parameters() if id(p) not in texts]
    return {*names, *(modules - {name.rpartition(".")[0] for name in images})}  # the latter for buffers beside them


def _common_name(tower: str, key: str) -> str:
    stem, ending = re.sub(r"[._]weight$", "", key), ""
    if key != stem:
        pass
    elif match := re.search(r"[._]bias$", key):
        stem, ending = key[: match.start()], ".bias"
    if match := re.match(rf"{_BLOCKS[tower]}\.(\d+)\.(.+)$", stem):
        number, rest = match.groups()
        known = next((name for name, pattern in _IN_BLOCK.items() if re.fullmatch(pattern, rest)), rest)
        return f"{tower}.{number}.{known}{ending}"
    known = next((name for name, pattern in _BESIDE[tower].items() if re.fullmatch(pattern, stem)), None)
    return f"{tower}.{key}" if known is None else f"{tower}.{known}{ending}"
