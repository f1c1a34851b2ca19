"""``ModalityEncoder``: one set of weights, a frozen branch for real images and a LoRA branch for generated ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from gmail_lightning.models.adapter_keys import add_prefix, drop_prefix, is_adapter_key
from gmail_lightning.models.base import DualEncoder, ImageEncoder, LoRATarget, Tower
from gmail_lightning.models.branches import build_encoder, read_branches
from gmail_lightning.models.lora import add_lora, lora_blocks, lora_disabled
from gmail_lightning.types import ImageSpec, Modality, TextSpec

RealPath = Literal["frozen", "projected", "adapted"]
TextSide = Literal["frozen", "lora", "projection", "full"]


class ModalityEncoder(DualEncoder):
    """Sends real images through the pretrained tower and generated ones through the same tower with LoRA.

    GMAIL, https://arxiv.org/abs/2602.15368, Algorithm 1 and section 3.2. The tower always stays in eval mode, whatever
    ``train()`` says. With ``real_path="frozen"`` real features equal those of the plain encoder bit for bit. The state
    dict has the keys of the plain encoder, ``lora.<tower>.<block>.<role>.A`` and ``.B``, and the projections.

    Args:
        encoder: The plain encoder. It is adapted in place: used by itself, it is the generated branch from now on.
        rank: Rank of LoRA; 0 adapts nothing, and generated images are taken as real ones.
        alpha: LoRA is scaled by ``alpha / rank``.
        targets: Roles of the adapted matrices, some of ``q k v out fc1 fc2``.
        real_path: Branch of real images: ``frozen`` is the plain tower (Algorithm 1), ``projected`` the plain tower and
            a trained projection, ``adapted`` the tower with LoRA and a trained projection (section 3.2).
        projection: A linear map D to D on the generated side, without bias, from the identity. The real paths
            ``projected`` and ``adapted`` always have one on either side.
        text_side: What of the text tower is to be trained: nothing (``frozen``), LoRA with alpha = 2 rank (``lora``), a
            linear map D to D after it, from the identity (``projection``), or all of it and the logit scale (``full``).
        text_rank: Rank of LoRA in the text tower.
        text_targets: Roles of its adapted matrices.

    Raises:
        ValueError: As ``add_lora``, or if ``real_path`` or ``text_side`` is unknown.
        TypeError: If ``text_side`` is not ``frozen`` and the encoder has no text tower.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        rank: int = 4,
        alpha: float = 8.0,
        targets: Collection[str] = ("q", "v"),
        real_path: RealPath = "frozen",
        projection: bool = False,
        text_side: TextSide = "frozen",
        text_rank: int = 4,
        text_targets: Collection[str] = ("q", "v"),
    ) -> None:
        for argument, value, known in (
            ("real_path", real_path, get_args(RealPath)),
            ("text_side", text_side, get_args(TextSide)),
        ):
            if value not in known:
                raise ValueError(f"{argument}={value!r}: give one of {', '.join(known)}.")
        super().__init__(encoder.mean, encoder.std)
        if rank:
            add_lora(encoder, rank=rank, alpha=alpha, targets=targets)
        else:
            encoder.requires_grad_(False)
        self.encoder = encoder.eval()
        self.real_path, self.text_side = real_path, text_side
        #: Which alignment the adapters are from: ``path``, ``step`` and ``digest`` of its checkpoint; None for none.
        self.alignment: dict[str, Any] | None = None
        self.settings = {
            "rank": rank, "alpha": alpha, "targets": list(targets), "real_path": real_path, "projection": projection
        }  # fmt: skip
        self.pretrained, self.activation = encoder.pretrained, encoder.activation
        two_sided = real_path != "frozen"
        self.generated_projection = _identity(encoder.embed_dim) if projection or two_sided else None
        self.real_projection = _identity(encoder.embed_dim) if two_sided else None
        self.text_side_projection = _identity(self._dual.embed_dim) if text_side == "projection" else None
        if text_side == "lora":
            add_lora(self._dual, rank=text_rank, alpha=2.0 * text_rank, targets=text_targets, tower="text")
        elif text_side == "full":
            for parameter in self._dual.text_parameters():
                parameter.requires_grad_(True)
        self.register_state_dict_post_hook(drop_prefix)
        self.register_load_state_dict_pre_hook(add_prefix)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the projections; the tower stays in eval."""
        super().train(mode)
        self.encoder.eval()
        return self

    def encode_image(self, image: Tensor, modality: Tensor | None = None) -> Tensor:
        """Maps pixels in [0, 1] to features, each row through the branch of its modality.

        Args:
            image: Pixels, shape (B, 3, H, W).
            modality: ``Modality`` of each row, shape (B,); without it all rows are real.

        Returns:
            Unnormalised features, shape (B, D).
        """
        return self._route(
            self.encoder.encode_image, image, modality, projections=(self.real_projection, self.generated_projection)
        )

    def image_tokens(self, image: Tensor, modality: Tensor | None = None, layer: int = -2) -> Tensor:  # type: ignore[override]
        """Maps pixels to patch tokens of one block, shape (B, T, W), each row through the branch of its modality.

        The projections act in the joint space and so take no part.
        """
        return self._route(lambda rows: self.encoder.image_tokens(rows, layer=layer), image, modality)

    def _route(
        self,
        encode: Callable[[Tensor], Tensor],
        image: Tensor,
        modality: Tensor | None,
        projections: tuple[nn.Linear | None, nn.Linear | None] = (None, None),
    ) -> Tensor:
        def branch(rows: Tensor, which: Modality) -> Tensor:
            if which is Modality.REAL and self.real_path != "adapted":
                with torch.no_grad(), lora_disabled(self.encoder):
                    features = encode(rows)
            else:
                features = encode(rows)
            return _project(features, projections[which])

        if modality is None:
            return branch(image, Modality.REAL)
        if modality.shape != image.shape[:1]:
            raise ValueError(
                f"{len(image)} images, but modality has shape {tuple(modality.shape)}: give one per image."
            )
        rows = {which: (modality == which).nonzero().squeeze(1) for which in Modality}
        if sum(map(len, rows.values())) != len(image):
            raise ValueError(f"modality must be 0 (real) or 1 (generated), got {modality.unique().tolist()}.")
        for which, index in rows.items():
            if len(index) == len(image):
                return branch(image, which)
        features = torch.cat([branch(image[index], which) for which, index in rows.items()])
        return features[torch.cat(list(rows.values())).argsort()]

    def _fqn_modifiers(self) -> dict[str, str]:
        """Tells torch.distributed.checkpoint that ``encoder.`` is left out of the keys."""
        parts = (self.encoder.named_children(), self.encoder.named_parameters(recurse=False))
        return {name: "encoder" for part in parts for name, _ in part}

    @property
    def has_text(self) -> bool:
        """Whether the plain encoder has a text tower."""
        return isinstance(self.encoder, DualEncoder)

    @property
    def image_spec(self) -> ImageSpec:
        """As the plain encoder's."""
        return self.encoder.image_spec

    @property
    def embed_dim(self) -> int:
        """As the plain encoder's."""
        return self.encoder.embed_dim

    @property
    def plain(self) -> ImageEncoder:
        """The plain encoder."""
        return self.encoder

    @property
    def wrapped(self) -> nn.Module:
        """As the plain encoder's."""
        return self.encoder.wrapped

    def lora_targets(self, roles: Collection[str], tower: Tower = "image") -> list[LoRATarget]:
        """As the plain encoder's."""
        return self.encoder.lora_targets(roles, tower)

    @property
    def text_spec(self) -> TextSpec:
        """As the plain encoder's."""
        return self._dual.text_spec

    def encode_text(self, text: Tensor) -> Tensor:
        """As the plain encoder's, with what ``text_side`` adds."""
        return _project(self._dual.encode_text(text), self.text_side_projection)

    def text_tokens(self, text: Tensor) -> Tensor:
        """As the plain encoder's; a projection of the text side acts in the joint space and so takes no part."""
        return self._dual.text_tokens(text)

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """As the plain encoder's."""
        return self._dual.text_parameters()

    def image_adapters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and tensors of what routes images: LoRA of the image tower and the image projections."""
        return self._named([*self._factors(), self.real_projection, self.generated_projection])

    def branch_adapters(self, which: Modality, pooled: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and tensors that the branch of a modality adds to the plain tower.

        Args:
            which: The modality.
            pooled: Whether pooled features are meant; the projections take no part in patch tokens.
        """
        projection = (self.real_projection, self.generated_projection)[which] if pooled else None
        adapted = which is Modality.GENERATED or self.real_path == "adapted"
        return self._named([*(self._factors() if adapted else []), projection])

    def freeze_behind(self, block: int) -> None:
        """Freezes the adapters that the patch tokens of a block do not pass: of later blocks, and the projections."""
        for module in (*self._factors(behind=block), self.real_projection, self.generated_projection):
            if module is not None:
                module.requires_grad_(False)

    def _factors(self, behind: int = -1) -> list[nn.Module]:
        blocks = lora_blocks(self.encoder).items()
        return [factors for number, roles in blocks if number > behind for factors in roles.values()]

    def _named(self, modules: Iterable[nn.Module | None]) -> Iterator[tuple[str, nn.Parameter]]:
        own = {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
        return ((name, parameter) for name, parameter in self.named_parameters() if id(parameter) in own)

    def describe(self) -> str:
        """Says in one line which way each modality goes and what is trained."""
        generated = (
            f"the tower with LoRA of rank {self.settings['rank']}" if self.settings["rank"] else "the plain tower"
        )
        if self.generated_projection is not None:
            generated += " and a projection"
        if self.alignment is not None:
            generated += f", as in {self.alignment['path']}"
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return (
            f"Real images: {self.real_path} path. Generated images: {generated}. Text side: {self.text_side}. "
            f"{trained:,} parameters of the encoder are trained."
        )

    @property
    def logit_scale(self) -> Tensor:
        """As the plain encoder's."""
        return self._dual.logit_scale

    @property
    def log_scale(self) -> nn.Parameter | None:
        """As the plain encoder's."""
        return self._dual.log_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """As the plain encoder's."""
        return self._dual.logit_bias

    @property
    def _dual(self) -> DualEncoder:
        if not isinstance(self.encoder, DualEncoder):
            raise TypeError(f"{type(self.encoder).__name__} has no text tower: give a DualEncoder.")
        return self.encoder

    @classmethod
    def from_checkpoint(cls, path: str | Path, encoder: ImageEncoder | None = None) -> Self:
        """Loads the encoder out of the checkpoint of a task, in eval mode and on the CPU.

        Args:
            path: A Lightning checkpoint of this library.
            encoder: The plain encoder that the task was trained on, adapted in place; by default it is built as the
                command line recorded it.

        Raises:
            ValueError: If the checkpoint has no adapters, records no encoder while none is given, or was trained on
                another base than the encoder's.
        """
        recorded = read_branches(path)
        encoder = build_encoder(recorded.hyperparameters, path) if encoder is None else encoder
        recorded.check(encoder)
        model = cls(encoder, **recorded.image_settings, **recorded.text_settings)
        known = model.state_dict(keep_vars=True)
        needed = {key for key, value in known.items() if is_adapter_key(key) or value.requires_grad}
        missing, unknown = needed - recorded.state.keys(), recorded.state.keys() - known.keys()
        if missing or unknown:
            raise ValueError(f"{path}: lacks {sorted(missing)[:4]} and has unknown {sorted(unknown)[:4]}.")
        model.load_state_dict(recorded.state, strict=False)
        return model.eval()


def _identity(width: int) -> nn.Linear:
    linear = nn.Linear(width, width, bias=False)
    nn.init.eye_(linear.weight)
    return linear


def _project(features: Tensor, projection: nn.Linear | None) -> Tensor:
    """Applies a projection in fp32, so that the identity changes nothing under autocast either."""
    if projection is None:
        return features
    with torch.autocast(features.device.type, enabled=False):
        return cast(Tensor, projection(features.float())).to(features.dtype)
