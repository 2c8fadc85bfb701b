"""Checks of numbers; each refusal names the expected value and the given one."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_count(
    name: str, value: Any, minimum: int = 1, maximum: int | None = None, *, unit: str = "training examples"
) -> int:
    """Refuse everything but an integer from ``minimum`` to ``maximum``, the number of ``unit``.

    NumPy's integers count, booleans do not. Returns the number as Python's ``int``, which JSON can hold.

    Raises:
        ValueError: If it is no integer, too small, or too large; the message names the argument ``name``.

    Example:
        >>> check_count("batch_size", 0)
        Traceback (most recent call last):
        ValueError: `batch_size` must be an integer of at least 1, got 0.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < minimum or (maximum is not None and number > maximum):
        upper = "" if maximum is None else f" and at most {maximum}, the number of {unit}"
        raise ValueError(f"`{name}` must be an integer of at least {minimum}{upper}, got {value!r}.")
    return number


def check_positive(name: str, value: float) -> float:
    """Refuse everything but a positive finite number.

    Raises:
        ValueError: If it is zero, negative, infinite or NaN.

    Example:
        >>> check_positive("ridge", 0.0)
        Traceback (most recent call last):
        ValueError: `ridge` must be a positive number, got 0.0.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number, got {value}.")
    return float(value)


class RowError(ValueError):
    """An example that cannot be read: its row in a batch, the problem, and other rows with the same problem."""

    def __init__(self, row: int, problem: str, others: Sequence[int] = ()) -> None:
        super().__init__(f"Row {row} of the batch {problem}.")
        self.row, self.problem, self.others = row, problem, others


def check_finite(values: Tensor, what: str, row: int = 0) -> None:
    """Refuse values of examples that are not finite.

    Args:
        values: Shape ``(B, ...)``.
        what: Their name, as a part of an example.
        row: Row of the first value.

    Raises:
        RowError: For the first such row; :meth:`Examples.naming` makes it the name of an example.
    """
    if torch.isfinite(values).all():
        return
    first, *others = (~torch.isfinite(values)).reshape(len(values), -1).any(1).nonzero().flatten().tolist()
    number = "NaN" if values[first].isnan().any() else "an infinite number"
    raise RowError(
        row + first,
        f"has {number} in its {what}, which must be finite: check its input and target, and the model's weights (did "
        "training diverge?)",
        [row + other for other in others],
    )


def first_line(error: Exception) -> str:
    """How an error's message begins, or its class where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
