"""Designs: which training example is in which subset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stride_lightning.runtime.checks import check_count

#: Subsets that are enough where a prior knows most of the scores.
NUM_SUBSETS = 16
#: Above this many memberships (subsets x examples) a default design becomes sparse.
DENSE_LIMIT = 10**8
#: Examples drawn at once. Part of the seeded recipe: changing it changes every design.
_DRAW_BLOCK = 4096


@dataclass(frozen=True)
class Design:
    """A bipartite graph between training examples and subsets, left-d-regular where it was sampled here.

    Every example is then a member of exactly ``d`` of the ``K`` subsets and subset sizes differ by at most one.
    Memberships are kept bit-packed or as indices, whichever is smaller; the products below never hold the dense
    ``(K, n)`` matrix.

    Args:
        num_subsets: ``K``.
        num_train: Number of training examples ``n``.
        degree: Number of subsets each example is in, ``d`` (the mean, where it varies).
        seed: Seed the memberships were drawn with; -1 if elsewhere.
        bits: Bit-packed memberships, uint8 of shape ``(n, ceil(K / 8))``, for a dense design.
        indices: Subsets of each example, int32 of shape ``(n, d)``, for a sparse design.

    Example:
        >>> design = sample_design(num_train=6, num_subsets=4, degree=2, seed=0)
        >>> design.dense().sum(0)  # every example is in two subsets
        tensor([2., 2., 2., 2., 2., 2.])
        >>> design.sizes
        tensor([3, 3, 3, 3])

    Reference: arXiv:2606.05165 (STRIDE), membership matrix M.
    """

    num_subsets: int
    num_train: int
    degree: int
    seed: int
    bits: Tensor | None = None
    indices: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.indices is None):
            raise ValueError("A design stores its memberships either as `bits` or as `indices`: give one of them.")
        width = (self.num_subsets + 7) // 8 if self.indices is None else self.degree
        ((name, stored),) = self.tensors().items()
        if tuple(stored.shape) != (self.num_train, width):
            raise ValueError(
                f"Design {name} have shape {tuple(stored.shape)}; expected {(self.num_train, width)} for "
                f"{self.num_train} examples, {self.num_subsets} subsets and degree {self.degree}."
            )

    def info(self) -> dict[str, int]:
        """Plain values to store beside :meth:`tensors`."""
        return {name: getattr(self, name) for name in ("num_subsets", "num_train", "degree", "seed")}

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors to store."""
        return {"bits": self.bits} if self.bits is not None else {"indices": self.indices}  # type: ignore[dict-item]

    @classmethod
    def restore(cls, info: dict[str, int], tensors: dict[str, Tensor]) -> Design:
        """The design again, from :meth:`info` and :meth:`tensors`."""
        return cls(**info, bits=tensors.get("bits"), indices=tensors.get("indices"))

    @classmethod
    def from_masks(cls, masks: Tensor) -> Design:
        """A design of subsets drawn elsewhere, bool of shape ``(K, n)``; examples may be in any number of them.

        Example:
            >>> Design.from_masks(torch.tensor([[True, False, True], [False, False, True]])).sizes
            tensor([2, 1])
        """
        num_subsets, num_train = masks.shape
        bits = torch.from_numpy(np.packbits(masks.cpu().numpy().T, axis=1))
        return cls(num_subsets, num_train, round(float(masks.float().sum(0).mean())), seed=-1, bits=bits)

    @property
    def sizes(self) -> Tensor:
        """Number of examples in each subset, int64 of shape ``(K,)``."""
        if self.indices is not None:
            return torch.bincount(self.indices.flatten().long(), minlength=self.num_subsets)
        total = torch.zeros(self.num_subsets, dtype=torch.int64)
        for _, members in self.blocks(total, _DRAW_BLOCK):
            total += members.sum(0)
        return total

    def blocks(self, like: Tensor, size: int = 8192) -> Iterator[tuple[slice, Tensor]]:
        """:meth:`rows` of so many examples at a time, in the type and on the device of ``like``, and their places."""
        for start in range(0, self.num_train, size):
            places = slice(start, start + size)
            yield places, self.rows(places, like.dtype).to(like.device)

    def rows(self, examples: slice | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memberships of the given examples as 0/1, shape ``(len(examples), K)``."""
        if self.indices is not None:
            chosen = self.indices[examples].long()
            return torch.zeros(len(chosen), self.num_subsets, dtype=dtype).scatter_(1, chosen, 1)
        assert self.bits is not None
        unpacked = np.unpackbits(self.bits[examples].numpy(), axis=1, count=self.num_subsets)
        return torch.from_numpy(unpacked).to(dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix M, 0/1 of shape ``(K, n)``; for small designs and tests."""
        return self.rows(slice(None), dtype).T.contiguous()

    def responses(self, scores: Tensor, block_size: int = 8192) -> Tensor:
        """What scores predict for the subsets, ``scores @ M'``: ``(q, n) -> (q, K)``."""
        total = scores.new_zeros(len(scores), self.num_subsets)
        for places, members in self.blocks(scores, block_size):
            total += scores[:, places] @ members
        return total

    def backproject(self, measurements: Tensor, block_size: int = 8192) -> Tensor:
        """The adjoint of :meth:`responses`, ``measurements @ M``: ``(q, K) -> (q, n)``."""
        if self.indices is not None:
            table = measurements.T.contiguous()
            return F.embedding_bag(self.indices.to(table.device), table, mode="sum").T
        return torch.cat([measurements @ members.T for _, members in self.blocks(measurements, block_size)], 1)

    def gram(self, weights: Tensor, block_size: int = 4096) -> Tensor:
        """Weighted Gram matrices ``M diag(w_q) M'`` of the subsets: ``(q, n) -> (q, K, K)``."""
        total = weights.new_zeros(len(weights), self.num_subsets, self.num_subsets)
        if self.indices is None:
            for places, members in self.blocks(weights, block_size):  # (b, K)
                for one, weight in zip(total, weights[:, places], strict=True):
                    one.addmm_((members * weight[:, None]).T, members)
            return total
        for subsets, part in zip(self.indices.split(block_size), weights.split(block_size, 1), strict=True):
            subsets = subsets.long().to(weights.device)  # (b, d)
            pairs = (subsets[:, :, None] * self.num_subsets + subsets[:, None, :]).flatten()
            for one, weight in zip(total, part[:, :, None].expand(-1, -1, self.degree**2), strict=True):
                one.view(-1).index_add_(0, pairs, weight.flatten())
        return total


def default_num_subsets(num_train: int) -> int:
    """Even number of subsets when the user names none: 200 up to 10,000 examples, then growing with the logarithm."""
    return int(min(1000, 200 * max(1.0, np.log10(max(num_train, 1)) - 3)) // 2 * 2)


def sample_design(
    num_train: int, num_subsets: int | None = None, degree: int | None = None, *, seed: int = 0
) -> Design:
    """Draw a left-d-regular design with subset sizes that differ by at most one.

    Every example gets a uniformly random set of ``d`` subsets; then random memberships move from subsets that
    came out too large to ones too small until the sizes are level.

    Args:
        num_train: Number of training examples ``n``, at least 2.
        num_subsets: ``K``; by default :func:`default_num_subsets`.
        degree: Number of subsets per example ``d``; by default ``K / 2`` while ``n K <= 1e8``, else 10.
        seed: Seed of the draw. The same arguments give the same design on every machine.

    Raises:
        ValueError: If the numbers do not make a design (``1 <= d < K``, ``n >= 2``).

    Example:
        >>> sample_design(1000).num_subsets
        200
    """
    num_subsets = check_count("num_subsets", default_num_subsets(num_train) if num_subsets is None else num_subsets, 2)
    if degree is None:
        degree = max(1, num_subsets // 2) if num_train * num_subsets <= DENSE_LIMIT else min(10, num_subsets // 2)
    if num_train < 2:
        raise ValueError(f"A design needs at least 2 training examples, got {num_train}.")
    if not 1 <= degree < num_subsets:
        raise ValueError(
            f"Each example must be in at least 1 subset and in fewer than all: got degree={degree} with "
            f"num_subsets={num_subsets}. Raise `num_subsets` (at least 2) or lower `degree`."
        )
    raw = np.random.PCG64(seed).random_raw
    indices = np.empty((num_train, degree), np.int16 if num_subsets < 2**15 else np.int32)
    for start in range(0, num_train, _DRAW_BLOCK):
        rows = indices[start : start + _DRAW_BLOCK]
        rows[:] = _draw_rows(raw, len(rows), num_subsets, degree)
    _level_sizes(raw, indices, num_subsets)
    stored = torch.from_numpy(indices)
    design = Design(num_subsets, num_train, degree, seed, indices=stored)
    if degree * 32 <= num_subsets:
        return replace(design, indices=stored.int())
    blocks = design.blocks(torch.empty(0, dtype=torch.uint8), _DRAW_BLOCK)
    bits = np.concatenate([np.packbits(members.numpy(), axis=1) for _, members in blocks])
    return replace(design, indices=None, bits=torch.from_numpy(bits))


def _integers(raw: Callable[[int], np.ndarray], bounds: np.ndarray) -> np.ndarray:
    """One integer below each bound. From the raw 64-bit stream, which no numpy release may change."""
    return ((raw(len(bounds)) >> np.uint64(32)) * bounds.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def _draw_rows(raw: Callable[[int], np.ndarray], num_rows: int, num_subsets: int, degree: int) -> np.ndarray:
    """A uniformly random set of ``degree`` subsets for each row (Floyd's sampling, all rows at once)."""
    chosen = np.zeros((num_rows, num_subsets), bool)
    drawn = np.empty((num_rows, degree), np.int64)
    every = np.arange(num_rows)
    for column, last in enumerate(range(num_subsets - degree, num_subsets)):
        pick = _integers(raw, np.full(num_rows, last + 1))
        pick = np.where(chosen[every, pick], last, pick)
        chosen[every, pick] = True
        drawn[:, column] = pick
    return drawn


def _level_sizes(raw: Callable[[int], np.ndarray], indices: np.ndarray, num_subsets: int) -> None:
    """Move random memberships from subsets that are too large to ones that are too small, in place."""
    flat, degree = indices.reshape(-1), indices.shape[1]
    sizes = np.bincount(flat, minlength=num_subsets)
    target = np.full(num_subsets, len(flat) // num_subsets)
    target[np.argsort(-sizes, kind="stable")[: len(flat) % num_subsets]] += 1
    by_subset = np.argsort(flat, kind="stable")  # positions of the members of subset 0, then of subset 1, ...
    first, held = np.cumsum(sizes) - sizes, sizes.copy()
    while (excess := sizes - target).any():
        donor = np.repeat(np.arange(num_subsets), np.maximum(excess, 0))
        taker = np.repeat(np.arange(num_subsets), np.maximum(-excess, 0))
        taker = taker[np.argsort(raw(len(taker)), kind="stable")]
        position = by_subset[first[donor] + _integers(raw, held[donor])]
        example = position // degree
        # A larger subset always has members outside a smaller one, so some move is open until all sizes are level.
        open_move = (flat[position] == donor) & ~(indices[example] == taker[:, None]).any(1)
        candidates = np.flatnonzero(open_move)
        moves = candidates[np.unique(example[candidates], return_index=True)[1]]
        flat[position[moves]] = taker[moves]
        np.subtract.at(sizes, donor[moves], 1)
        np.add.at(sizes, taker[moves], 1)
