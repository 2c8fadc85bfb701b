"""What a user's collate function does to examples: whether it draws random numbers, and whether it reorders them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stride_lightning.data.fingerprints import digest
from stride_lightning.runtime.randomness import preserved_random_state

#: Batches of the same examples that are compared: two of few tokens may have the same mask.
_NUM_COMPARED = 4


def draws(collate_fn: Callable[[list[Any]], Any], examples: list[Any]) -> bool:
    """Whether a collate function makes different batches of the same examples, as one that masks tokens does."""
    try:
        with preserved_random_state(collate_fn):
            return len({digest(collate_fn(examples)) for _ in range(_NUM_COMPARED)}) > 1
    except Exception:  # named when the examples are read
        return len(examples) > 1 and draws(collate_fn, examples[:1])  # not all can stand in one batch


def reorders(collate_fn: Callable[[list[Any]], Any], examples: list[Any]) -> bool:
    """Whether the rows of a batch stand in another order than its examples, as where a function sorts them by length.

    A tensor whose rows are those of the examples in their order shows that they do not.
    """
    try:
        with preserved_random_state(collate_fn):
            together = pytree.tree_leaves(collate_fn(examples))
            alone = [pytree.tree_leaves(collate_fn([example])) for example in examples]
    except Exception:  # named when the examples are read
        return False
    is_other = False
    for leaf, *singles in zip(together, *alone, strict=False):
        rows = [leaf, *singles]
        if not all(isinstance(part, Tensor) and part.ndim for part in rows) or len(leaf) != len(examples):
            continue
        if any(len(single) != 1 or single.ndim != leaf.ndim for single in singles):
            continue
        same = [[_starts_like(row, single[0]) for single in singles] for row in leaf]
        if all(map(all, same)):  # rows that are all alike tell nothing
            continue
        if all(same[row][row] for row in range(len(leaf))):
            return False
        is_other |= all(map(any, same))
    return is_other


def _starts_like(row: Tensor, single: Tensor) -> bool:
    """Whether a row is an example's, up to padding behind or before it."""
    sizes = [min(pair) for pair in zip(row.shape, single.shape, strict=True)]
    behind = tuple(slice(size) for size in sizes)
    before = tuple(slice(length - size, length) for length, size in zip(row.shape, sizes, strict=True))
    part = single[behind]
    return any(torch.equal(row[where], part) for where in (behind, before))
