"""Groups of training examples, as a caller names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def remaining(groups: Iterable[Sequence[int]] | Tensor, positions: Tensor) -> Tensor:
    """Weights of the training examples without each group, 0 or 1 of shape ``(n, num_groups)``."""
    place = {position: number for number, position in enumerate(positions.tolist())}
    if not isinstance(groups, Iterable):
        raise ValueError(f"`groups` must be a list of groups, each a list of positions; got {groups!r}.")
    listed = list(groups)
    weights = torch.ones(len(positions), len(listed))
    for number, group in enumerate(listed):
        try:
            members = torch.as_tensor(group if isinstance(group, Tensor) else list(group))
        except (TypeError, ValueError):
            members = torch.empty(())
        if members.ndim != 1 or (members.is_floating_point() and len(members)):
            raise ValueError(
                f"Each group must be the positions of its members, or bool with one value for each training example; "
                f"group {number} is {group!r}. For a single group, pass a list that holds it."
            )
        if members.dtype == torch.bool:
            if len(members) != len(positions):
                raise ValueError(
                    f"Groups as bool must have shape (num_groups, {len(positions)}), a column for each training "
                    f"example; group {number} has {len(members)} values."
                )
            weights[members, number] = 0
            continue
        if strangers := [member for member in members.tolist() if member not in place]:
            raise ValueError(
                f"Group {number} names {strangers[:5]}, which are no positions of training examples. Positions count "
                "in the training dataset, from 0."
            )
        if len(members.unique()) < len(members):
            raise ValueError(
                f"Group {number} names a position more than once. If it is a mask of 0 and 1, make it bool."
            )
        weights[[place[member] for member in members.tolist()], number] = 0
    if whole := (weights.sum(0) == 0).nonzero().flatten().tolist():
        raise ValueError(
            f"Groups {whole[:5]} are all of the training data, so nothing is left to train on. Leave them out."
        )
    return weights
