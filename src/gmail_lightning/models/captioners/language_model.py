"""Language models of Hugging Face, with the tokenizer that belongs to them."""

from __future__ import annotations

import inspect
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from gmail_lightning.models.weights import plain_files

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
    language_model: str | dict[str, Any], tokenizer: str | None = None, dtype: str = "float32"
) -> tuple[nn.Module, Any, bool]:
    """Builds a causal language model.

    Args:
        language_model: Directory or hub id of a causal language model, or the settings of a new one:
            ``{model_type: gpt2, n_embd: 128, n_layer: 2, ...}``; the vocabulary and its special tokens are the
            tokenizer's.
        tokenizer: As ``load_tokenizer``; by default that of the language model.
        dtype: Of the weights, which are read in it. Buffers keep theirs: rotary frequencies stay in fp32.

    Returns:
        The model, as ``writing_model`` leaves it; the tokenizer; whether its weights are more than random.

    Raises:
        ValueError: If a new model comes without tokenizer or ``model_type``, a tokenizer has ids that the model has no
            embedding for, or as ``writing_model``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(language_model, str):
        words = load_tokenizer(tokenizer or language_model)
        with plain_files(language_model) as plain:
            model = AutoModelForCausalLM.from_pretrained(plain, dtype=dtype)
        known = model.get_input_embeddings().num_embeddings
        if len(words) > known:
            raise ValueError(f"tokenizer={tokenizer!r} has {len(words)} tokens, language_model has {known} embeddings.")
        return writing_model(model), words, True
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
    return writing_model(AutoModelForCausalLM.from_config(config, dtype=dtype)), words, False


def writing_model(model: Any) -> Any:
    """Prepares a causal language model to write: in eval mode, without generation settings of its own.

    transformers fills whatever a call of ``generate`` leaves open from the settings that a model was saved with, so
    that its ``repetition_penalty`` or ``suppress_tokens`` would change the captions.

    Raises:
        ValueError: If transformers cannot generate from embeddings with it (``openai-gpt``, ``ctrl``): an image has no
            token ids.
    """
    from transformers import GenerationConfig

    if "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
        raise ValueError(
            f"The language model is a {model.config.model_type}: transformers generates with it from token ids only, "
            "and an image is given as embeddings (inputs_embeds). Take another, such as a gpt2 or a llama."
        )
    model.generation_config = GenerationConfig()
    return model.eval()


#: Kinds of models whose attention sees every earlier token, as far as no window is set.
PLAIN_ATTENTION = ("gpt2", "gpt_neox", "gptj", "llama", "mistral", "phi", "qwen2", "qwen3")


def causal_mask(model: Any, seen: Tensor) -> Tensor:
    """What a language model may attend to in training, in the form that its attention takes.

    transformers makes the same of ``seen`` but looks at its values first, to leave the mask out where nothing is
    padded, and waits for the device to do so. Only the attention of torch (``sdpa``) takes the finished mask, and only
    that of models which attend to all earlier tokens and read nothing else from it; all others go the usual way.

    Args:
        model: Of transformers.
        seen: Whether there is a token, shape (B, L).

    Returns:
        Shape (B, 1, L, L) bool, or (B, L) int64.
    """
    config = model.config
    sees_all = config.model_type in PLAIN_ATTENTION and getattr(config, "sliding_window", None) is None
    if config._attn_implementation != "sdpa" or not sees_all:
        return seen.long()
    earlier = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool, device=seen.device).tril()
    return seen[:, None, None, :] & earlier


def max_positions(model: Any) -> int | None:
    """Longest sequence that a language model knows, embeddings of an image included; None where it sets no limit."""
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def written(
    model: Any,
    tokenizer: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    *,
    end_id: int,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float,
) -> list[str]:
    """What a language model goes on with, by beam search without sampling, whatever its own generation settings say.

    The score of a text is its log-probability / length ** length_penalty, its end token counted. The search does not
    stop before no unfinished text can do better.

    Args:
        model: Causal language model.
        tokenizer: Of Hugging Face.
        inputs_embeds: Shape (B, P, W); padded on the left.
        attention_mask: Shape (B, P).
        end_id: Token that ends a text.
        num_beams: Width of the search.
        max_new_tokens: Longest text; less where the model has no positions for so many behind P.
        length_penalty: See above.

    Raises:
        ValueError: If the prompt leaves no position to write at.
    """
    from transformers import GenerationConfig

    given, known = inputs_embeds.shape[1], max_positions(model)
    if known is not None and given >= known:
        raise ValueError(
            f"The prompt, image included, takes {given} positions, and the language model has {known} "
            "(max_position_embeddings): nothing can be written. Shorten the prompt or the question, or the prefix."
        )
    settings = GenerationConfig(
        num_beams=num_beams,
        max_new_tokens=max_new_tokens if known is None else min(max_new_tokens, known - given),
        length_penalty=length_penalty,
        early_stopping="never" if num_beams > 1 else False,
        do_sample=False,
        eos_token_id=end_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, generation_config=settings)
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [" ".join(text.split()) for text in texts]
