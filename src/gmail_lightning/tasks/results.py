"""``EvaluationResult``: what the evaluation of one set has found, which is all that callbacks read of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class EvaluationResult:
    """What the last evaluation of one set has found, as far as its task finds it."""

    #: By name; of the evaluation before, or none, until this one is over.
    values: dict[str, float] = field(default_factory=dict)
    #: What could not be computed, and why.
    reasons: dict[str, str] = field(default_factory=dict)
    #: Those written of the last batch, one per row.
    captions: list[str] = field(default_factory=list)
    #: The PTB tokenizer that split the captions: ``java``, ``python``, or each in one modality; None where none did.
    tokenizer: str | None = None
    #: Accuracy of every class on real images; None for a class without images.
    class_accuracy: dict[str, float | None] = field(default_factory=dict)


def set_key(eval_set: str) -> str:
    """The name of an evaluation set among modules, logs and results, where a dot would part it."""
    return eval_set.replace(".", "_")


def values_by_set(results: Mapping[str, EvaluationResult]) -> dict[str, dict[str, float]]:
    """The values alone, by set and name, as a copy."""
    return {name: dict(result.values) for name, result in results.items()}
