"""``ModalityEncoder``: one set of weights, a frozen branch for real images and a LoRA branch for generated ones."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import ROLES, DualEncoder, ImageEncoder, LoRATarget, Tower
from gmail_lightning.models.fingerprint import fingerprint, fingerprint_difference, fingerprint_digest
from gmail_lightning.models.lora import add_lora, lora_disabled
from gmail_lightning.types import ImageSpec, Modality, TextSpec

RealPath = Literal["frozen", "projected", "adapted"]

_PROJECTIONS = ("generated_projection", "real_projection")
_ADAPTER_KEY = re.compile(
    rf"(^|\.)(lora\.(image|text)\.\d+\.({'|'.join(ROLES)})\.[AB]|({'|'.join(_PROJECTIONS)})\.weight)$"
)


def is_adapter_key(key: str) -> bool:
    """Whether a key of a state dict belongs to an adapter: factors of LoRA, or a projection."""
    return _ADAPTER_KEY.search(key) is not None


class ModalityEncoder(DualEncoder):
    """Sends real images through the pretrained tower and generated ones through the same tower with LoRA.

    GMAIL, https://arxiv.org/abs/2602.15368, Algorithm 1 and section 3.2. The tower always stays in eval mode, whatever
    ``train()`` says. With ``real_path="frozen"`` real features equal those of the plain encoder bit for bit. The state
    dict has the keys of the plain encoder, ``lora.<tower>.<block>.<role>.A`` and ``.B``, and the projections.

    Args:
        encoder: The plain encoder. It is adapted in place: used by itself, it is the generated branch from now on.
        rank: Rank of LoRA.
        alpha: LoRA is scaled by ``alpha / rank``.
        targets: Roles of the adapted matrices, some of ``q k v out fc1 fc2``.
        real_path: Branch of real images: ``frozen`` is the plain tower (Algorithm 1), ``projected`` the plain tower and
            a trained projection, ``adapted`` the tower with LoRA and a trained projection (section 3.2).
        projection: A linear map D to D on the generated side, without bias, from the identity. The real paths
            ``projected`` and ``adapted`` always have one on either side.

    Raises:
        ValueError: As ``add_lora``, or if ``real_path`` is unknown.
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
    ) -> None:
        if real_path not in ("frozen", "projected", "adapted"):
            raise ValueError(f"real_path={real_path!r}: give frozen, projected or adapted.")
        super().__init__(encoder.mean, encoder.std)
        add_lora(encoder, rank=rank, alpha=alpha, targets=targets)
        self.encoder = encoder.eval()
        self.real_path = real_path
        self.pretrained, self.activation = encoder.pretrained, encoder.activation
        two_sided = real_path != "frozen"
        self.generated_projection = _identity(encoder.embed_dim) if projection or two_sided else None
        self.real_projection = _identity(encoder.embed_dim) if two_sided else None
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

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
        """As the plain encoder's."""
        return self._dual.encode_text(text)

    @property
    def logit_scale(self) -> Tensor:
        """As the plain encoder's."""
        return self._dual.logit_scale

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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = checkpoint.get("hyper_parameters", {})
        state = {
            key.removeprefix("encoder."): value
            for key, value in checkpoint.get("state_dict", {}).items()
            if key.startswith("encoder.")
        }
        recorded = checkpoint.get("base_fingerprint")
        if recorded is None or "rank" not in settings or not any(map(is_adapter_key, state)):
            raise ValueError(f"{path}: no adapters of an encoder in it. Give a checkpoint of an alignment task.")
        encoder = build_encoder(settings, path) if encoder is None else encoder
        difference = fingerprint_difference(recorded, found := fingerprint(encoder, recorded["towers"]))
        if difference is not None:
            raise ValueError(
                f"{path}: trained on another base. The checkpoint has {fingerprint_digest(recorded)}, this "
                f"{type(encoder).__name__} has {fingerprint_digest(found)}; they differ in {difference}. "
                "Load the encoder that the task was trained with."
            )
        names = ("rank", "alpha", "targets", "real_path", "projection")
        model = cls(encoder, **{name: settings[name] for name in names if name in settings})
        known = model.state_dict().keys()
        missing, unknown = {key for key in known if is_adapter_key(key)} - state.keys(), state.keys() - known
        if missing or unknown:
            raise ValueError(f"{path}: lacks {sorted(missing)[:4]} and has unknown {sorted(unknown)[:4]}.")
        model.load_state_dict(state, strict=False)
        return model.eval()


def build_encoder(settings: dict[str, Any], path: str | Path) -> ImageEncoder:
    """Builds the plain encoder from the hyperparameters in a checkpoint, as the command line recorded them.

    Raises:
        ValueError: If they record none, or name a class that is no encoder.
    """
    recorded = settings.get("encoder")
    if not isinstance(recorded, dict) or "class_path" not in recorded:
        raise ValueError(f"{path}: it does not record its encoder (the task was built in Python). Pass encoder=.")
    module, _, name = recorded["class_path"].rpartition(".")
    found = getattr(importlib.import_module(module or "gmail_lightning.models"), name, None)
    if found is None and not module:
        found = {known.__name__: known for known in _subclasses(ImageEncoder)}.get(name)
    if not isinstance(found, type) or not issubclass(found, ImageEncoder):
        raise ValueError(
            f"{path}: encoder {recorded['class_path']!r} is no ImageEncoder. Import its module, or pass encoder=."
        )
    return found(**recorded.get("init_args", {}))


def _subclasses(base: type[Any]) -> list[type[Any]]:
    return [found for child in base.__subclasses__() for found in (child, *_subclasses(child))]


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


def _drop_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Hook after ``state_dict``: the wrapped encoder's keys stand beside the projections."""
    inner = f"{prefix}encoder."
    moved = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(inner)}
    state_dict.update({prefix + key.removeprefix(inner): value for key, value in moved.items()})


def _add_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before ``load_state_dict``: the way back."""
    own = tuple(f"{prefix}{name}." for name in _PROJECTIONS)
    moved = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix) and not key.startswith(own)}
    state_dict.update({f"{prefix}encoder.{key.removeprefix(prefix)}": value for key, value in moved.items()})
