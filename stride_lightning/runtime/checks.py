"""Numbers that users pass: each refusal says what was expected and what came."""

from __future__ import annotations

import math
import operator
from typing import Any


def check_count(
    name: str, value: Any, minimum: int = 1, maximum: int | None = None, *, unit: str = "training examples"
) -> int:
    """Refuse what is not an integer from ``minimum`` to ``maximum``, the number of what ``unit`` says.

    NumPy's integers are integers, booleans are not. Returns the number as Python's ``int``, which JSON can hold.

    Raises:
        ValueError: If it is no integer, too small, or too large; the message calls the argument ``name``.

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
    """Refuse what is not a positive finite number.

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
