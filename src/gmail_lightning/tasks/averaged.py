"""The average of what a task trains: kept beside the weights, evaluated in their place."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from gmail_lightning.models.averaging import WeightAverage
from gmail_lightning.models.weights import plain_names
from gmail_lightning.tasks.checkpoint import SmallCheckpoints


class AveragedWeights(SmallCheckpoints):
    """Evaluates the average of the weights where a task sets one; a checkpoint holds it under ``ema``."""

    #: Of the parameters that train; None evaluates the weights themselves.
    average: WeightAverage | None = None

    def __init__(self) -> None:
        super().__init__()
        self._evaluation = ExitStack()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within it, what trains holds its average."""
        return nullcontext() if self.average is None else self.average.swapped_in()

    def on_fit_start(self) -> None:
        """Brings the average to the device of the weights."""
        if self.average is not None:
            self.average.to(self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, brings parameters that have a bound back to it, and then updates the average.

        All before any callback writes a checkpoint.
        """
        super().optimizer_step(*args, **kwargs)
        self.after_step()
        if self.average is not None:
            self.average.update()

    def after_step(self) -> None:
        """Called after every optimisation step: where a parameter must stay within a range, it is put back here."""

    def on_validation_epoch_start(self) -> None:
        """Evaluates the averaged weights."""
        self._evaluation.enter_context(self.averaged_weights())

    def on_validation_epoch_end(self) -> None:
        """Goes back to the trained weights."""
        self._evaluation.close()

    def on_test_epoch_start(self) -> None:
        """As ``on_validation_epoch_start``."""
        self._evaluation.enter_context(self.averaged_weights())

    def on_test_epoch_end(self) -> None:
        """As ``on_validation_epoch_end``."""
        self._evaluation.close()

    def on_predict_epoch_start(self) -> None:
        """As ``on_validation_epoch_start``."""
        self._evaluation.enter_context(self.averaged_weights())

    def on_predict_epoch_end(self) -> None:
        """As ``on_validation_epoch_end``."""
        self._evaluation.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the average, and the names of its tensors in the state."""
        super().on_save_checkpoint(checkpoint)
        if self.average is not None:
            names = plain_names({name: id(value) for name, value in self.state_dict(keep_vars=True).items()})
            of_tensor = {number: name for name, number in names.items()}
            own = [of_tensor[id(parameter)] for parameter in self.average.parameters]
            checkpoint["ema"] = {**self.average.state_dict(), "names": own}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the average."""
        super().on_load_checkpoint(checkpoint)
        if self.average is not None and "ema" in checkpoint:
            self.average.load_state_dict(checkpoint["ema"])
