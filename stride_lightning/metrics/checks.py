"""Checks of the metrics' arguments; each refusal names the expected value, the given one and what to do.

In every function ``name`` is the caller's name of the argument, and ``value`` is the given value.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be {' or '.join(map(repr, choices))}, got {value!r}.")


def check_matrix(name: str, value: Any, columns: str = "num_train") -> None:
    """Refuse everything but a finite tensor of shape ``(num_queries, columns)``.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If the shape is wrong, there is no entry, or an entry is not finite.
    """
    check_tensor(name, value)
    if value.ndim != 2 or not value.numel():
        raise ValueError(
            f"Expected `{name}` of shape (num_queries, {columns}) with at least one of each, got {tuple(value.shape)}."
        )
    check_finite(name, value)


def check_shape(name: str, value: Any, expected: tuple[int, ...], like: str) -> None:
    """Refuse a tensor of another shape than expected; ``like`` names its model: ``"the shape of `scores`"``.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If the shape differs.
    """
    check_tensor(name, value)
    if value.shape != expected:
        raise ValueError(f"Expected `{name}` of shape {tuple(expected)}, {like}, got {tuple(value.shape)}.")


def check_tensor(name: str, value: Any) -> None:
    """Refuse everything but a tensor with a ``TypeError``: a NumPy array, for instance, or a whole ``Attribution``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `{name}` to be a torch.Tensor, got {type(value).__name__}: use torch.as_tensor.")


def check_finite(name: str, values: Tensor, dim: int = 0, what: str = "queries") -> None:
    """Refuse NaN and infinity, with their number and their places along ``dim``, which runs over ``what``."""
    bad = ~torch.isfinite(values)
    if bad.any():
        places = listed(bad.movedim(dim, 0).reshape(bad.shape[dim], -1).any(1).nonzero().flatten().tolist())
        raise ValueError(
            f"Expected finite `{name}`, got {int(bad.sum())} of {bad.numel()} values that are not finite, in {what} "
            f"{places}: leave these out, or find what made them so (a retraining that diverged?)."
        )


def check_flags(name: str, values: Tensor) -> None:
    """Refuse flags that are neither booleans nor zeros and ones."""
    bad = int(((values != 0) & (values != 1)).sum())
    if bad:
        raise ValueError(
            f"Expected `{name}` to hold booleans (or 0 and 1), got {bad} other values. Compare first, for "
            "instance with `> 0`."
        )


def listed(rows: Collection[int], limit: int = 10) -> str:
    """Row numbers for a message, cut after ``limit``.

    Example:
        >>> listed([2, 5]), listed(range(100), limit=3)
        ('2, 5', '0, 1, 2, ... (100 of them)')
    """
    written = ", ".join(str(row) for row in list(rows)[:limit])
    return written if len(rows) <= limit else f"{written}, ... ({len(rows)} of them)"
