"""Language models of Hugging Face, with the tokenizer that belongs to them."""

from __future__ import annotations

from importlib import resources
from typing import Any

from torch import nn

EMOJI = "emoji"  # the tokenizer that ships with the package


def load_tokenizer(tokenizer: str) -> Any:
    """Loads a tokenizer from a directory or the hub; ``emoji`` is the one of the embedded captions.

    A tokenizer without a padding token pads by its end token; padding is masked wherever it is used.
    """
    from transformers import AutoTokenizer

    path = str(resources.files("gmail_lightning.models") / "emoji_language") if tokenizer == EMOJI else tokenizer
    loaded = AutoTokenizer.from_pretrained(path)
    if loaded.eos_token_id is None:
        raise ValueError(f"tokenizer={tokenizer!r} has no end token (eos_token), so a caption could not end.")
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.eos_token
    return loaded


def build_language_model(
    language_model: str | dict[str, Any], tokenizer: str | None = None
) -> tuple[nn.Module, Any, bool]:
    """Builds a causal language model.

    Args:
        language_model: Directory or hub id of any causal language model, or the settings of a new one:
            ``{model_type: gpt2, n_embd: 128, n_layer: 2, ...}``; the vocabulary and its special tokens are the
            tokenizer's.
        tokenizer: As ``load_tokenizer``; by default that of the language model.

    Returns:
        The model, in fp32 and eval mode; the tokenizer; whether its weights are more than random.

    Raises:
        ValueError: If a new model comes without tokenizer or ``model_type``, or a tokenizer has ids that the model has
            no embedding for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(language_model, str):
        words = load_tokenizer(tokenizer or language_model)
        model = AutoModelForCausalLM.from_pretrained(language_model, dtype="float32")
        known = model.get_input_embeddings().num_embeddings
        if len(words) > known:
            raise ValueError(f"tokenizer={tokenizer!r} has {len(words)} tokens, language_model has {known} embeddings.")
        return model.eval(), words, True
    if tokenizer is None or "model_type" not in language_model:
        raise ValueError(f"language_model={language_model!r} is a new model: give its model_type, and a tokenizer.")
    words = load_tokenizer(tokenizer)
    special = {
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    settings = {key: value for key, value in language_model.items() if key != "model_type"}
    config = AutoConfig.for_model(language_model["model_type"], **{**special, **settings})
    return AutoModelForCausalLM.from_config(config).eval(), words, False
