"""``ModalityEncoder``: the router, which says what of an encoder real images pass, and what generated ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import ImageEncoder
from gmail_lightning.models.branches.adapters import Projection, adapter_ids, adapter_keys, open_text_side
from gmail_lightning.models.branches.arguments import (
    RealPath,
    TextSide,
    refuse_contradictions,
    refuse_idle,
    refuse_unknown,
)
from gmail_lightning.models.branches.branch import Branch
from gmail_lightning.models.branches.record import (
    BranchRecord,
    build_branch,
    find_alignment,
    load_router,
    plain_settings,
    public_path,
    restored_branches,
)
from gmail_lightning.models.branches.routing import ModalityIndex, Read, Side, route, through
from gmail_lightning.models.branches.wrapper import WrappedEncoder
from gmail_lightning.types import Modality


class ModalityEncoder(WrappedEncoder):
    """Sends real images through the pretrained tower, and generated ones through a branch of their own.

    GMAIL, https://arxiv.org/abs/2602.15368, Algorithm 1 and section 3.2. A recipe writes it around the plain encoder,
    and every task holds one. The tower stays in eval mode, whatever ``train()`` says. With ``real_path="frozen"`` real
    features equal those of the plain encoder bit for bit. The state dict has the keys of the plain encoder, those of
    the branch (``lora.<tower>.<block>.<role>.A`` and ``.B``; ``branch...``), and the projections.

    Args:
        encoder: The plain encoder. It may be adapted in place: used by itself, it is the generated branch from now on.
        branch: What generated images pass: ``LoRA``, ``FullCopy`` or a ``Branch`` of one's own; None: the plain tower,
            as real ones.
        aligned: Checkpoint of an ``AlignmentTask`` that the branch, the real path and the projections are taken from;
            or a folder: the newest ``checkpoints/last.ckpt`` below it. While a checkpoint of a later task is loaded it
            is not read: that one holds them too.
        real_path: Branch of real images: ``frozen``, the default, is the plain tower (Algorithm 1), ``projected`` the
            plain tower and a trained projection, ``adapted`` the branch and a trained projection (section 3.2).
        projection: A linear map D to D on the generated side, without bias, from the identity. The real paths
            ``projected`` and ``adapted`` always have one on either side.
        text_side: What of the text tower is to be trained: nothing (``frozen``), LoRA with alpha = 2 rank (``lora``), a
            linear map D to D after it, from the identity (``projection``), or all of it and the logit scale (``full``).
        text_rank: Rank of LoRA in the text tower.
        text_targets: Roles of its adapted matrices.
        train_adapters: Whether the branch and the projections train; by default new ones do, aligned ones do not.
        train_tower: Train what of the encoder requires a gradient, without branches: what a plain encoder that is given
            to a task becomes.

    Raises:
        ValueError: If ``real_path`` or ``text_side`` is unknown, arguments contradict one another, there is no such
            alignment or it is of another encoder, or as ``Branch.attach``.
        TypeError: If ``text_side`` is not ``frozen`` and the encoder has no text tower.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        branch: Branch | None = None,
        aligned: str | None = None,
        real_path: RealPath | None = None,
        projection: bool | None = None,
        text_side: TextSide = "frozen",
        text_rank: int = 4,
        text_targets: Collection[str] = ("q", "v"),
        train_adapters: bool | None = None,
        train_tower: bool = False,
    ) -> None:
        if isinstance(encoder, ModalityEncoder):
            raise ValueError("The encoder of a ModalityEncoder is a plain one, and this one routes modalities already.")
        refuse_unknown(real_path, text_side)
        refuse_contradictions(branch, aligned, real_path, projection, train_adapters, text_side, train_tower)
        super().__init__(encoder)
        #: Which alignment the adapters are from: ``path``, ``step`` and ``digest`` of its checkpoint; None for none.
        self.alignment: dict[str, Any] | None = None
        #: Checkpoint whose trained text side was left behind when its branches were taken; None for none.
        self.left_behind: Path | None = None
        found: BranchRecord | None = None
        if aligned is not None and (taken := restored_branches()) is None:
            found = find_alignment(aligned)
            found.check(encoder)
            taken = found.settings
        if aligned is not None and taken is not None:
            branch = build_branch(taken["branch"], aligned)
            real_path, projection = taken["real_path"], taken["projection"]
            if branch is None and not projection:
                raise ValueError(f"aligned={aligned!r}, but the checkpoint that is loaded has no branch: leave it out.")
        routes = refuse_idle(branch, real_path, projection, train_adapters)
        self.train_tower = train_tower
        self.train_adapters = routes and (aligned is None if train_adapters is None else train_adapters)
        if not train_tower:
            encoder.requires_grad_(False).eval()
        if branch is not None:
            # Tensors that a checkpoint brings draw nothing: what is built next is as it would be without them.
            with nullcontext() if aligned is None else torch.random.fork_rng(devices=[]):
                branch.attach(encoder)
        self.branch = branch
        self.real_path: RealPath = real_path or "frozen"
        self.text_side, self.text_rank, self.text_targets = text_side, text_rank, list(text_targets)
        two_sided = self.real_path != "frozen"
        self.generated_projection = Projection(encoder.embed_dim) if projection or two_sided else None
        self.real_projection = Projection(encoder.embed_dim) if two_sided else None
        self.text_side_projection = Projection(encoder.embed_dim) if text_side == "projection" else None
        open_text_side(encoder, text_side, text_rank, self.text_targets)
        for _, parameter in self.image_adapters():
            parameter.requires_grad_(parameter.requires_grad and self.train_adapters)
        if aligned is not None and self.real_projection is not None:  # as the alignment left it, whatever else trains
            self.real_projection.requires_grad_(False)
        if found is not None:
            self._take(found)
        self.record()  # what no checkpoint could hold is refused now

    def _take(self, found: BranchRecord) -> None:
        """Loads the adapters of an alignment."""
        state = self.state_dict(keep_vars=True)
        routing = {id(t) for module in self._routing() for t in (*module.parameters(), *module.buffers())}
        names = [name for name in adapter_keys(self) if id(state[name]) in routing]
        absent = sorted(set(names) - found.state.keys())
        if absent:
            raise ValueError(f"{found.path}: lacks the adapters {absent[:4]}.")
        self.load_state_dict({name: found.state[name] for name in names}, strict=False)
        self.alignment = found.alignment(names)
        self.left_behind = None if found.settings["text_side"] == "frozen" else found.path

    @classmethod
    def around(cls, encoder: ImageEncoder, build: Callable[[ImageEncoder], ModalityEncoder]) -> ModalityEncoder:
        """A router itself; around a plain encoder the one that ``build`` makes.

        While a checkpoint is loaded that holds branches, a plain encoder gets these.
        """
        if isinstance(encoder, ModalityEncoder):
            return encoder
        taken = restored_branches()
        return build(encoder) if taken is None else cls.from_record(encoder, taken)

    @classmethod
    def from_record(cls, encoder: ImageEncoder, record: dict[str, Any]) -> Self:
        """Builds the router that ``record`` describes around a plain encoder, without its tensors."""
        settings = {**record, "branch": build_branch(record["branch"], "The checkpoint")}
        alignment = settings.pop("alignment")
        model = cls(encoder, **settings)
        model.alignment = alignment
        if model.alignment is not None and model.real_projection is not None:
            model.real_projection.requires_grad_(False)
        return model

    def plain_only(self) -> AbstractContextManager[None]:
        """Inside, the encoder is the plain one, whatever the branch does to it."""
        return nullcontext() if self.branch is None else self.branch.off()

    def record(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the router beside tensors, in plain values; None where nothing is routed."""
        if self.train_tower:
            return None
        branch = None
        if self.branch is not None:
            branch = {"class_path": public_path(type(self.branch)), "init_args": plain_settings(self.branch)}
        return {
            "branch": branch,
            "real_path": self.real_path,
            "projection": self.generated_projection is not None,
            "text_side": self.text_side,
            "text_rank": self.text_rank,
            "text_targets": self.text_targets,
            "train_adapters": self.train_adapters,
            "alignment": self.alignment,
        }

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the branch and the projections; the tower stays in eval unless it trains."""
        super().train(mode)
        self.encoder.train(mode and self.train_tower)
        return self

    # Images

    def encode_image(self, image: Tensor, modality: Tensor | ModalityIndex | None = None) -> Tensor:
        """Maps pixels in [0, 1] to features, each row through the branch of its modality.

        Args:
            image: Pixels, shape (B, 3, H, W).
            modality: ``Modality`` of each row, shape (B,), or which rows are which; without it all rows are real.

        Returns:
            Unnormalised features, shape (B, D).
        """
        return self.route(lambda tower, rows: tower.encode_image(rows), image, modality)

    def image_tokens(  # type: ignore[override]
        self, image: Tensor, modality: Tensor | ModalityIndex | None = None, layer: int = -2
    ) -> Tensor:
        """Maps pixels to patch tokens of one block, shape (B, T, W), each row through the branch of its modality.

        The projections act in the joint space and so take no part.
        """
        return self.route(lambda tower, rows: tower.image_tokens(rows, layer=layer), image, modality)

    def encode_text(self, text: Tensor) -> Tensor:
        """As the plain encoder's, with what ``text_side`` adds."""
        features = self.encoder.encode_text(text)
        return features if self.text_side_projection is None else self.text_side_projection(features)

    def text_features_and_tokens(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """``encode_text`` and ``text_tokens`` of the same ids."""
        features, tokens = super().text_features_and_tokens(text)
        return features if self.text_side_projection is None else self.text_side_projection(features), tokens

    def route(
        self, read: Read, image: Tensor, modality: Tensor | ModalityIndex | None = None, chunk_size: int | None = None
    ) -> Tensor:
        """What ``read`` makes of images, each row through the branch of its modality; see ``routing.route``."""
        if modality is None or (self.branch is None and self.generated_projection is None):
            return through(self._side(Modality.REAL), read, image, chunk_size)
        return route(read, image, modality, (self._side(Modality.REAL), self._side(Modality.GENERATED)), chunk_size)

    def _side(self, which: Modality) -> Side:
        projection = self._projection(which)
        if self.branch is None or (which is Modality.REAL and self.real_path != "adapted"):
            return Side(self.encoder, projection, not self.train_tower, self.plain_only)
        return Side(self.branch, projection, False, nullcontext)

    # What routes

    def _projection(self, which: Modality) -> Projection | None:
        return self.real_projection if which is Modality.REAL else self.generated_projection

    def _projections(self) -> list[nn.Module]:
        return [projection for projection in map(self._projection, Modality) if projection is not None]

    def _branch_modules(self) -> list[nn.Module]:
        return [] if self.branch is None else list(self.branch.adapters())

    def _routing(self) -> list[nn.Module]:
        return [*self._branch_modules(), *self._projections()]

    def image_adapters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and tensors of what routes images: those of the branch, and the image projections."""
        return self._named(self._routing())

    def branch_adapters(self, which: Modality, pooled: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and tensors that the branch of a modality adds to the plain tower.

        The projections, which take no part in patch tokens, only where ``pooled`` features are meant.
        """
        projection = self._projection(which) if pooled else None
        adapted = which is Modality.GENERATED or self.real_path == "adapted"
        return self._named([*(self._branch_modules() if adapted else []), *([projection] if projection else [])])

    def freeze_behind(self, block: int) -> None:
        """Freezes the adapters that the patch tokens of a block do not pass: of later blocks, and the projections."""
        behind = self.branch.behind(block) if self.branch else ()
        for part in (*behind, *self._projections()):
            part.requires_grad_(False)

    def _named(self, modules: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
        own = adapter_ids(self) & {id(parameter) for module in modules for parameter in module.parameters()}
        return ((name, parameter) for name, parameter in self.named_parameters() if id(parameter) in own)

    def describe(self) -> str:
        """Says in one line which way each modality goes and what is trained."""
        generated = "the plain tower" if self.branch is None else f"the tower with {self.branch!r}"
        if self.generated_projection is not None:
            generated += " and a projection"
        if self.alignment is not None:
            generated += f", as in {self.alignment['path']}"
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        ways = f"Real images: {self.real_path} path. Generated images: {generated}. Text side: {self.text_side}."
        if self.train_tower:
            ways = "Images of both modalities, and texts: the plain encoder."
        return f"{ways} {trained:,} parameters of the encoder are trained."

    @classmethod
    def from_checkpoint(cls, path: str | Path, encoder: ImageEncoder | None = None) -> Self:
        """Loads the encoder out of the checkpoint of a task, in eval mode and on the CPU.

        Args:
            path: A Lightning checkpoint of this library, or a folder: the newest ``checkpoints/last.ckpt`` below it.
            encoder: The plain encoder that the task was trained on, adapted in place; by default it is built as the
                command line recorded it.

        Raises:
            ValueError: If the checkpoint has no adapters, records no encoder while none is given, or was trained on
                another base than the encoder's.
        """
        return cast(Self, load_router(cls, path, encoder))
