"""Where the parts of a batch stand, where it is not ``(inputs, targets)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: The name of an item of a dictionary, or the number of an item of a tuple.
Key = int | str


@dataclass(frozen=True)
class Parts:
    """Items of a batch that are inputs, targets and weights of its examples.

    Args:
        inputs: Items that the model takes, one argument each; none for the whole batch.
        targets: The item that holds the targets.
        weights: The item that holds a weight for each example; None without.

    Example:
        >>> parts = Parts(("image",), "label")
        >>> parts.arguments({"image": 3, "label": 1})
        (3,)
    """

    inputs: tuple[Key, ...]
    targets: Key
    weights: Key | None = None

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        """The arguments of the model."""
        return tuple(batch[key] for key in self.inputs) if self.inputs else (batch,)

    def __str__(self) -> str:
        inputs = ", ".join(f"batch[{key!r}]" for key in self.inputs) or "batch"
        weights = "" if self.weights is None else f", weights batch[{self.weights!r}]"
        return f"inputs {inputs}, targets batch[{self.targets!r}]{weights}"
