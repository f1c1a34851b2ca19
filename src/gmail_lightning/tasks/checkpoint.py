"""What a checkpoint of a task holds, and what it must fit."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

from gmail_lightning.models.branches.adapters import adapter_ids
from gmail_lightning.models.branches.first_edition import EDITION, converted
from gmail_lightning.models.branches.record import check_classes
from gmail_lightning.models.plain_values import plain_entries
from gmail_lightning.models.restoring import restoring
from gmail_lightning.models.weights import plain_names


def _arguments(cls: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor by name, defaults included; none where they do not fit, which the call itself says."""
    signature = inspect.signature(cls.__init__)
    try:
        bound = signature.bind_partial(None, *args, **kwargs)  # partial: a copy is made without arguments
    except TypeError:
        return {}
    bound.apply_defaults()
    named = dict(list(bound.arguments.items())[1:])  # without self
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            named.pop(name, None)
    return named


class SmallCheckpoints(LightningModule):
    """Keeps trainable tensors, adapters and projections."""

    _arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What ``help`` shows is the constructor's signature, not that of ``__new__``."""
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Notes the arguments of the constructor, of a subclass's own, too."""
        task = super().__new__(cls)
        task.__dict__["_arguments"] = _arguments(cls, args, kwargs)
        return task

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Records the arguments of the constructor; ``BaseTask`` calls it, and a subclass need not.

        What the command line recorded is plain and rebuilds the task without arguments. Where it recorded nothing (a
        task built in Python) live objects are kept out, which Lightning would copy: modules, data sets, functions. Pass
        them to ``load_from_checkpoint`` again.
        """
        if _given_hyperparameters.get() is not None:
            return super().save_hyperparameters(ignore=ignore, frame=frame, logger=logger)
        given = {name: value for part in args if isinstance(part, Mapping) for name, value in part.items()}
        arguments = self._arguments | given
        kept = {name: arguments[name] for name in plain_entries(arguments)}
        return super().save_hyperparameters(kept, ignore=ignore, frame=frame, logger=logger)

    def _kept_keys(self) -> set[str]:
        """Keys of the state that a checkpoint holds."""
        with torch.enable_grad():  # a parametrization's tensor says whether it trains only here, not in an evaluation
            state = self.state_dict(keep_vars=True)
        kept = adapter_ids(self) | self._trained_buffers()
        return {k for k, v in state.items() if v.requires_grad or id(v) in kept}

    def _trained_buffers(self) -> set[int]:
        """Identities of the buffers that stand beside trainable parameters, such as running means."""
        return {
            id(buffer)
            for module in self.modules()
            if any(p.requires_grad for p in module.parameters(recurse=False))
            for buffer in module.buffers(recurse=False)
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops frozen tensors and live arguments."""
        checkpoint[EDITION] = 2
        for key in (self.CHECKPOINT_HYPER_PARAMS_KEY, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY):
            if isinstance(checkpoint.get(key), dict):
                checkpoint[key] = plain_entries(checkpoint[key])
        kept = self._kept_keys()
        checkpoint["state_dict"] = plain_names({k: v for k, v in checkpoint["state_dict"].items() if k in kept})

    @classmethod
    def load_from_checkpoint(  # noqa: D102
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        if not (isinstance(checkpoint_path, str | Path) and Path(checkpoint_path).is_file()):
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
            )
        written = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)
        content, source = converted(written), cast(Any, checkpoint_path)
        if content.keys() != written.keys() or content.get("hyper_parameters") != written.get("hyper_parameters"):
            source = io.BytesIO()  # Lightning reads the file by itself
            torch.save(content, source)
            source.seek(0)
        recorded = content.get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
        check_classes({**recorded, **kwargs}, checkpoint_path)  # what is passed is not built from the file
        with restoring(content):
            return super().load_from_checkpoint(source, map_location, hparams_file, strict, weights_only, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module``'s; frozen tensors are not in a checkpoint and so not reported as missing.

        Wrappers, as ``torch.compile`` makes them, may have been there or be here: names are compared without them.
        """
        own = plain_names({key: key for key in self.state_dict()})
        state = {own.get(name, name): value for name, value in plain_names(state_dict).items()}
        keys = super().load_state_dict(state, strict=strict, assign=assign)
        kept = self._kept_keys()
        return keys._replace(missing_keys=[key for key in keys.missing_keys if key in kept])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint fits: the same trained tensors.

        Raises:
            MisconfigurationException: Naming the tensors that are missing or unknown.
        """
        checkpoint.update(converted(checkpoint))
        kept = set(plain_names(dict.fromkeys(self._kept_keys())))
        given = set(plain_names(checkpoint["state_dict"]))
        if kept != given:
            missing, unknown = sorted(kept - given)[:5], sorted(given - kept)[:5]
            raise MisconfigurationException(
                f"The checkpoint does not fit {type(self).__name__}: missing {missing or 'nothing'}, unknown "
                f"{unknown or 'nothing'}. Were rank, targets or projection changed?"
            )
