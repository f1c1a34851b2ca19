"""``ClipCap``: a mapper turns an image feature into a prefix that a language model goes on from."""

from __future__ import annotations

import warnings
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmail_lightning.losses.captioning import caption_loss, counted_tokens
from gmail_lightning.models.captioners.language_model import build_language_model, causal_mask, max_positions, written
from gmail_lightning.models.captioners.texts import PlainTexts
from gmail_lightning.models.encoders.readers import PooledFeatures
from gmail_lightning.models.generative import Captioner
from gmail_lightning.models.restoring import restored
from gmail_lightning.models.weights import plain_names
from gmail_lightning.types import CaptionIds, PromptIds

Mapper = Literal["mlp", "transformer", "linear"]
HEADS = 8  # of the transformer mapper


class MLPMapper(nn.Module):
    """Two layers with tanh between them; the hidden width is half of the output's."""

    def __init__(self, image_dim: int, width: int, prefix_length: int) -> None:
        super().__init__()
        out = width * prefix_length
        self.model = nn.Sequential(nn.Linear(image_dim, out // 2), nn.Tanh(), nn.Linear(out // 2, out))

    def forward(self, image_features: Tensor) -> Tensor:
        """Maps (B, D) to (B, prefix_length * width)."""
        return cast(Tensor, self.model(image_features))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.to_queries(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        keys, values = self.to_keys_values(x).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return cast(Tensor, self.project(attended.transpose(1, 2).flatten(-2)))


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), _Attention(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp["fc2"](self.mlp["fc1"](self.norm2(x)).relu()))


class TransformerMapper(nn.Module):
    """Learned constants attend to ``clip_length`` tokens that the feature is unfolded into."""

    def __init__(self, image_dim: int, width: int, prefix_length: int, clip_length: int, num_layers: int) -> None:
        super().__init__()
        if width % HEADS:
            raise ValueError(
                f"mapper: transformer has {HEADS} heads; the language model's width {width} is no multiple."
            )
        self.clip_length = clip_length
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(_Layer(width) for _ in range(num_layers))})
        self.linear = nn.Linear(image_dim, clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, width))

    def forward(self, image_features: Tensor) -> Tensor:
        """Maps (B, D) to (B, prefix_length, width)."""
        x = self.linear(image_features).unflatten(-1, (self.clip_length, -1))
        x = torch.cat([x, self.prefix_const.expand(len(x), -1, -1)], dim=1)
        for layer in cast(nn.ModuleList, self.transformer["layers"]):
            x = layer(x)
        return cast(Tensor, x[:, self.clip_length :])


class ClipCap(Captioner):
    """ClipCap (arXiv 2111.09734): the image is a prefix of the language model's input.

    Names of the parameters follow the public weights (rmokady/CLIP_prefix_caption): ``gpt`` and ``clip_project``.

    Args:
        image_dim: Width D of the image features: 512 of ViT-B/32.
        language_model: Directory or hub id of a causal language model, or the settings of a new one; see
            ``build_language_model``.
        tokenizer: Its tokenizer, where it is another than the language model's; ``emoji`` ships with the package.
        mapper: ``mlp``, ``transformer``, or ``linear`` (one layer, as DeCap, arXiv 2303.03032).
        prefix_length: Tokens of the prefix.
        clip_length: Tokens that the transformer mapper unfolds the feature into.
        num_layers: Of the transformer mapper.
        tune_language_model: Train the language model, too; else it stays in eval mode, without gradient.
        normalize_prefix: Bring the features to unit norm first, in training and in use alike.
        stop: A token that ends a caption, such as ``"."`` for the public weights, which never saw an end token. By
            default captions are trained with the tokenizer's end token behind them.
        max_length: Longest caption in tokens, at most what the language model has positions for behind the prefix; what
            is cut is counted in ``truncated`` and told once.
        pretrained: File with the state dict of a whole ClipCap in the public layout.

    Raises:
        ValueError: If the language model stays as it is but is new, it has no position behind the prefix, or the
            settings do not fit the file.
    """

    gpt: Any
    tokenizer: Any
    reader = PooledFeatures()

    def __init__(
        self,
        image_dim: int = 512,
        language_model: str | dict[str, Any] = "gpt2",
        tokenizer: str | None = None,
        mapper: Mapper = "mlp",
        prefix_length: int = 10,
        clip_length: int = 10,
        num_layers: int = 8,
        tune_language_model: bool = True,
        normalize_prefix: bool = False,
        stop: str | None = None,
        max_length: int = 64,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.gpt, self.tokenizer, knows_language = build_language_model(language_model, tokenizer)
        if not (tune_language_model or knows_language or pretrained):
            raise ValueError("tune_language_model: false needs a language model with weights; this one is new.")
        room = (max_positions(self.gpt) or prefix_length + max_length) - prefix_length
        if room < 1:
            raise ValueError(f"prefix_length={prefix_length} takes all positions of the language model: shorten it.")
        width = self.gpt.get_input_embeddings().embedding_dim
        if mapper == "mlp":
            self.clip_project: nn.Module = MLPMapper(image_dim, width, prefix_length)
            first = cast(nn.Linear, self.clip_project.model[0])
        elif mapper == "transformer":
            self.clip_project = TransformerMapper(image_dim, width, prefix_length, clip_length, num_layers)
            first = self.clip_project.linear
        elif mapper == "linear":
            self.clip_project = first = nn.Linear(image_dim, width * prefix_length)
        else:
            raise ValueError(f"mapper={mapper!r}: give mlp, transformer or linear.")
        if normalize_prefix:  # components of unit norm are sqrt(D) times smaller than what layers are drawn for
            first.weight.data.mul_(image_dim**0.5)
        self.image_dim, self.prefix_length, self.normalize_prefix = image_dim, prefix_length, normalize_prefix
        self.tune_language_model, self.max_length = tune_language_model, min(max_length, room)
        self.end_id = self.tokenizer.eos_token_id if stop is None else self._only_token(stop)
        self.stop, self.appends_end = stop, stop is None
        self.truncated = 0  # captions that were cut in training
        self.gpt.requires_grad_(tune_language_model)
        in_checkpoint = tune_language_model and restored() is not None
        if pretrained is not None and not in_checkpoint:  # a language model that stays as it is is in no checkpoint
            self._load(pretrained)
        self.eval()

    def _only_token(self, stop: str) -> int:
        ids: list[int] = self.tokenizer(stop, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"stop={stop!r} is {len(ids)} tokens of this tokenizer: give a text that is one.")
        return ids[0]

    def _load(self, path: str) -> None:
        state = plain_names(torch.load(path, map_location="cpu", weights_only=True))
        # Masks that were buffers in older releases of transformers.
        state = {k: v for k, v in state.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
        own = self.state_dict()
        wrong = [
            f"{key}: {tuple(state[key].shape)} there, {tuple(own[key].shape)} here"
            for key in sorted(own.keys() & state.keys())
            if own[key].shape != state[key].shape
        ]
        tied = {"gpt.lm_head.weight"} if self.gpt.config.tie_word_embeddings else set()
        missing, unknown = own.keys() - state.keys() - tied, state.keys() - own.keys()
        if wrong or missing or unknown:
            raise ValueError(
                f"{path} does not fit these settings (mapper, prefix_length, clip_length, num_layers, image_dim, "
                f"language_model): {wrong[:3]}; it lacks {sorted(missing)[:3]} and has unknown {sorted(unknown)[:3]}."
            )
        self.load_state_dict(state, strict=False)
        self.pretrained = True

    def describe(self) -> dict[str, str | int | float | bool | None]:
        """See ``Captioner``."""
        return {"normalize_prefix": self.normalize_prefix, "stop": self.stop}

    def train(self, mode: bool = True) -> ClipCap:
        """Sets the mode; a language model that is not tuned stays in eval."""
        super().train(mode)
        if not self.tune_language_model:
            self.gpt.eval()
        return self

    def prefix(self, image_features: Tensor) -> Tensor:
        """Maps features (B, D) to the embeddings (B, prefix_length, width) that the language model goes on from."""
        features = image_features.to(self.gpt.get_input_embeddings().weight.dtype)
        if self.normalize_prefix:
            features = F.normalize(features, dim=-1)
        return cast(Tensor, self.clip_project(features).view(len(features), self.prefix_length, -1))

    @property
    def caption_spec(self) -> PlainTexts:
        """See ``Captioner``."""
        return PlainTexts(self.tokenizer, self.max_length, self.end_id if self.appends_end else None)

    def loss(
        self,
        image_features: Tensor,
        ids: CaptionIds,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """See ``Captioner``; the first word is predicted from the prefix alone."""
        cut = sum(length > self.max_length for length in ids["caption_length"])
        if cut and not self.truncated:
            warnings.warn(f"A caption of more than max_length={self.max_length} tokens is cut.", stacklevel=2)
        self.truncated += cut
        labels = ids["caption_labels"].to(image_features.device)
        words: Tensor = self.gpt.get_input_embeddings()(labels.clamp(min=0))
        inputs = torch.cat([self.prefix(image_features), words], dim=1)
        seen = F.pad(labels >= 0, (self.prefix_length, 0), value=True)
        keep = labels.shape[1] + 1
        mask = causal_mask(self.gpt, seen)
        output = self.gpt(inputs_embeds=inputs, attention_mask=mask, logits_to_keep=keep, use_cache=False)
        self.tokens = counted_tokens(labels, weight)
        return caption_loss(
            output.logits[:, -keep:-1], labels, weight=weight, label_smoothing=label_smoothing, tokens=self.tokens
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
        """See ``Captioner``; the image is the whole prompt."""
        if len(image_features) == 0:
            return []
        prefix = self.prefix(image_features)
        return written(
            self.gpt,
            self.tokenizer,
            prefix,
            torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
            end_id=self.end_id,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
        )
