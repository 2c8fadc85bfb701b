"""Where the parts of a batch stand, where it is not ``(inputs, targets)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: The name of an item of a dictionary, the number of an item of a tuple, or a path of these.
Key = int | str | tuple[int | str, ...]


@dataclass(frozen=True)
class Parts:
    """Items of a batch that are inputs, targets and weights of its examples.

    Args:
        inputs: Items that the model takes, one argument each; none for the whole batch.
        targets: The item that holds the targets.
        weights: The item that holds a weight for each example; None without.
        output: The item of what the model returns that holds the outputs; None if it is the outputs.

    Example:
        >>> parts = Parts(("image",), "label")
        >>> parts.arguments({"image": 3, "label": 1})
        (3,)
    """

    inputs: tuple[Key, ...]
    targets: Key
    weights: Key | None = None
    output: Key | None = None

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        """The arguments of the model."""
        return tuple(item_of(batch, key) for key in self.inputs) if self.inputs else (batch,)

    def __str__(self) -> str:
        inputs = ", ".join(f"batch{_shown(key)}" for key in self.inputs) or "batch"
        shown = [f"inputs {inputs}", f"targets batch{_shown(self.targets)}"]
        shown += [] if self.weights is None else [f"weights batch{_shown(self.weights)}"]
        shown += [] if self.output is None else [f"outputs {_shown(self.output)}"]
        return ", ".join(shown)


def item_of(value: Any, key: Key) -> Any:
    """An item of a batch, or of an item of it.

    Example:
        >>> item_of((("a", "b"), "c"), (0, 1))
        'b'
    """
    for step in key if isinstance(key, tuple) else (key,):
        value = value[step]
    return value


def _shown(key: Key) -> str:
    return "".join(f"[{step!r}]" for step in (key if isinstance(key, tuple) else (key,)))
