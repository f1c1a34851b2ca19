"""``Llava``: patch tokens of an image, projected, stand among the words of a language model's prompt."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmail_lightning.losses.captioning import IGNORED, caption_loss, counted_tokens
from gmail_lightning.models.base import ImageReader
from gmail_lightning.models.captioners.chat import ImageChat
from gmail_lightning.models.captioners.language_model import causal_mask, max_positions, written
from gmail_lightning.models.captioners.loading import llava_from_parts, load_llava, load_projector
from gmail_lightning.models.captioners.placeholder import expand, put_image
from gmail_lightning.models.captioners.texts import ChatTexts
from gmail_lightning.models.encoders.readers import PatchTokens
from gmail_lightning.models.generative import Captioner
from gmail_lightning.models.restoring import restored
from gmail_lightning.types import CaptionIds, PromptIds


class _Inputs(NamedTuple):
    """B rows as the language model reads them, padded on the right."""

    ids: Tensor  # (B, L), the image placeholder T times, IGNORED for padding
    labels: Tensor  # (B, L), those of ``ids`` in the answers, else IGNORED
    mask: Tensor  # (B, L) bool, False for padding


class Llava(Captioner):
    """LLaVA (arXiv 2304.08485, 2310.03744): a language model that reads the patch tokens of an image.

    The tokens of one block of the encoder, without class token, go through a projector of two layers and take the place
    of the image in a prompt, which the chat template of the tokenizer lays out. Only the answer is learned. The vision
    tower is the task's encoder; ``HFImageEncoder`` builds that of a LLaVA directory.

    Training has two stages: ``tune: projector`` with a language model that stays as it is, then ``lora`` or ``full``,
    which go on with the ``projector`` of the first.

    Args:
        pretrained: Directory or hub id of a ``LlavaForConditionalGeneration``: its projector, language model, tokenizer
            and layer. None: from parts.
        language_model: Directory or hub id of a causal language model, or the settings of a new one; see
            ``build_language_model``.
        tokenizer: Its tokenizer, where it is another than the language model's; ``emoji`` ships with the package.
        image_dim: Width W of the patch tokens: 1024 of ViT-L/14. Only with parts.
        reader: What it sees of an image; by default the patch tokens of the last block but one. Only with parts.
        projector: Weights of a projector to begin with: a checkpoint of the first stage, the folder of its run, or
            LLaVA's own ``mm_projector.bin``.
        tune: What is trained: the ``projector``, or with it LoRA in all linear layers of the language model (``lora``),
            or all of it (``full``).
        lora_rank: Rank of LoRA.
        lora_alpha: LoRA is scaled by ``lora_alpha / lora_rank``.
        lora_dropout: Of LoRA's input.
        dtype: Of the weights of the language model, which are read in it; ``bfloat16`` halves what a frozen one takes.
        prompt: The question, where the data ask none.
        chat_template: In Jinja, for a tokenizer that has none.
        max_length: Longest sequence in training, image included; at most what the language model has positions for. An
            answer that is cut is counted in ``truncated`` and told once; nothing is learned of its end.
        grad_checkpointing: Recompute the activations of the language model in the backward, block by block.

    Raises:
        ValueError: If the arguments contradict one another, or as ``ImageChat``, ``build_language_model`` and
            ``load_llava``.
    """

    language_model: Any
    tokenizer: Any
    projector: nn.Module

    def __init__(
        self,
        pretrained: str | None = None,
        language_model: str | dict[str, Any] | None = None,
        tokenizer: str | None = None,
        image_dim: int | None = None,
        reader: ImageReader | None = None,
        projector: str | None = None,
        tune: Literal["projector", "lora", "full"] = "projector",
        lora_rank: int = 128,
        lora_alpha: float = 256.0,
        lora_dropout: float = 0.05,
        dtype: Literal["float32", "bfloat16"] = "float32",
        prompt: str = "Provide a one-sentence caption for the provided image.",
        chat_template: str | None = None,
        max_length: int = 2048,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (language_model is None):
            raise ValueError("Llava needs either pretrained, or language_model together with image_dim.")
        if tune not in ("projector", "lora", "full"):
            raise ValueError(f"tune={tune!r}: give projector, lora or full.")
        if tune == "full" and dtype != "float32":
            raise ValueError(f"tune: full trains the language model: hold it in float32, not {dtype}.")
        if pretrained is not None:
            if image_dim is not None or reader is not None:
                raise ValueError(
                    "image_dim and reader belong to a model from parts; a pretrained one says them itself."
                )
            parts = load_llava(pretrained, tokenizer, dtype)
        else:
            if image_dim is None:
                raise ValueError("A Llava from parts needs image_dim, the width of the encoder's patch tokens.")
            parts = llava_from_parts(cast(Any, language_model), tokenizer, image_dim, reader or PatchTokens(), dtype)
        if tune != "full" and not parts.knows_language:
            raise ValueError(f"tune: {tune} needs a language model with weights, and this one is new: tune: full.")
        self.language_model, self.projector, self.tokenizer = parts.language_model, parts.projector, parts.tokenizer
        if projector is not None and restored() is None:
            load_projector(self.projector, projector)
        self.pretrained = pretrained is not None or (parts.knows_language and projector is not None)
        self.tune, self.reader = tune, parts.reader
        self.image_dim = int(cast(Any, self.projector).linear_1.in_features)
        self.truncated = 0  # answers that were cut in training
        self.max_length = min(max_length, max_positions(self.language_model) or max_length)
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        self.chat = ImageChat(self.tokenizer, parts.image_token, prompt)
        adapter = {"lora_rank": lora_rank, "lora_alpha": lora_alpha} if tune == "lora" else {}
        self._description: dict[str, str | int | float | bool | None] = {
            "reader": repr(self.reader),
            "tune": tune,
            **adapter,
        }
        self._set_trainable(lora_rank, lora_alpha, lora_dropout)
        if grad_checkpointing:
            self._checkpoint_blocks()

    def _set_trainable(self, rank: int, alpha: float, dropout: float) -> None:
        self.language_model.requires_grad_(self.tune == "full")
        if self.tune == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            settings = LoraConfig(
                r=rank,
                lora_alpha=cast(int, alpha),
                lora_dropout=dropout,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            # not the model's own add_adapter: transformers 5.24 lets it run with peft 0.22 only
            inject_adapter_in_model(settings, self.language_model)
            for parameter in self.language_model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.projector.requires_grad_(True)

    def _checkpoint_blocks(self) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        for module in self.language_model.modules():  # transformers' own switch works in train mode only
            if isinstance(module, GradientCheckpointingLayer):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)

    def describe(self) -> dict[str, str | int | float | bool | None]:
        """See ``Captioner``."""
        return dict(self._description)

    def train(self, mode: bool = True) -> Llava:
        """Sets the mode; a language model that is not tuned stays in eval."""
        super().train(mode)
        if self.tune == "projector":
            self.language_model.eval()
        return self

    @property
    def caption_spec(self) -> ChatTexts:
        """See ``Captioner``; a question that is empty is ``prompt``."""
        return ChatTexts(self.chat, self.max_length)

    def loss(
        self,
        image_features: Tensor,
        ids: CaptionIds,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """See ``Captioner``.

        Raises:
            ValueError: If the features are of another shape, or leave a caption no place within ``max_length``.
        """
        self._check(image_features, len(ids["caption_ids"]))
        num_patches = image_features.shape[1]
        inputs = self._inputs(ids, num_patches)
        first = min(ids["caption_start"]) + num_patches - 1  # no logits are needed before the captions
        output = self.language_model(
            inputs_embeds=self._embed(inputs.ids, ids["caption_image_column"], image_features),
            attention_mask=causal_mask(self.language_model, inputs.mask.to(image_features.device)),
            logits_to_keep=inputs.labels.shape[1] - first + 1,
            use_cache=False,
        )
        labels = inputs.labels[:, first:].to(image_features.device)
        self.tokens = counted_tokens(labels, weight)
        return caption_loss(
            output.logits[:, -labels.shape[1] - 1 : -1],
            labels,
            weight=weight,
            label_smoothing=label_smoothing,
            tokens=self.tokens,
        )

    @torch.no_grad()
    def generate(
        self,
        image_features: Tensor,
        prompts: PromptIds | None = None,
        *,
        num_beams: int = 5,
        max_new_tokens: int = 67,
        length_penalty: float = 1.0,
    ) -> list[str]:
        """See ``Captioner``."""
        if len(image_features) == 0:
            return []
        prompts = self.encode_questions([""] * len(image_features)) if prompts is None else prompts
        self._check(image_features, len(prompts["prompt_ids"]))
        column = prompts["prompt_image_column"]
        ids = expand(prompts["prompt_ids"], column, image_features.shape[1])
        return written(
            self.language_model,
            self.tokenizer,
            self._embed(ids, column, image_features),
            (ids != IGNORED).long().to(image_features.device),
            end_id=self.chat.end_id,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
        )

    def _check(self, image_features: Tensor, num_rows: int) -> None:
        if image_features.ndim != 3 or image_features.shape[::2] != (num_rows, self.image_dim):
            raise ValueError(
                f"Features of shape {tuple(image_features.shape)}, but this Llava reads patch tokens of shape "
                f"({num_rows}, T, {self.image_dim}): set image_dim to the width of the encoder's tower."
            )

    def _embed(self, ids: Tensor, image_column: Tensor, image_features: Tensor) -> Tensor:
        """Embeddings (B, L, width) of ids (B, L), the projected patch tokens (B, T, W) from ``image_column`` (B,) on.

        Neither the placeholder nor padding has an embedding; any stands in for them.
        """
        ids = ids.to(image_features.device)
        known = ids.masked_fill((ids == self.chat.image_id) | (ids == IGNORED), 0)
        words = self.language_model.get_input_embeddings()(known)
        tokens = self.projector(image_features.to(next(self.projector.parameters()).dtype))
        return put_image(words, image_column.to(ids.device), tokens.to(words.dtype))

    def _inputs(self, ids: CaptionIds, num_patches: int) -> _Inputs:
        """Rows of prompt and caption, the image as wide as it is, cut to ``max_length``."""
        self._count_cut(ids, num_patches - 1)
        column = ids["caption_image_column"]
        whole = expand(ids["caption_ids"], column, num_patches)[:, : self.max_length]
        labels = expand(ids["caption_labels"], column, num_patches)[:, : self.max_length]
        return _Inputs(whole, labels, whole != IGNORED)

    def _count_cut(self, ids: CaptionIds, more: int) -> None:
        """Counts captions that are cut, and refuses rows in which nothing is left of one.

        Args:
            ids: Their lengths, of rows in which the image has one place.
            more: How many it takes besides.
        """
        starts, lengths = ids["caption_start"], ids["caption_length"]
        cut = sum(length + more > self.max_length for length in lengths)
        if cut and not self.truncated:
            warnings.warn(f"max_length={self.max_length} cuts {cut} of {len(lengths)} answers.", stacklevel=4)
        self.truncated += cut
        masked = [row for row, start in enumerate(starts) if start + more >= self.max_length]
        if masked:
            row = masked[0]
            labels = ids["caption_labels"][row]
            text = self.tokenizer.decode(labels[labels != IGNORED].tolist(), skip_special_tokens=True).strip()
            raise ValueError(
                f"{len(masked)} of {len(starts)} rows have no token to learn: every label is masked, as that of "
                f"{text!r}. Its prompt takes {starts[row] + more} positions, the image included, of "
                f"max_length={self.max_length}: raise max_length, or shorten the prompt or the question."
            )
