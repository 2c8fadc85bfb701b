"""Random projections of gradients: reproducible by seed, computed from the factors, in one pass over the examples."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import reduce
from operator import add

import torch
from torch import Tensor
from typing_extensions import override

from stride_lightning.model.blocks import CHUNK_BYTES, Block, Gradients, Outer
from stride_lightning.runtime.randomness import mix

#: Name of the single block of a joint projection.
EVERYTHING = "all parameters"


class Projection(ABC):
    """A linear map of gradients to fewer features; a seed determines it, and it is the same for every example."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._matrices: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @abstractmethod
    def __call__(self, gradients: Gradients) -> Gradients:
        """The projected gradients, as vectors."""

    @abstractmethod
    def work(self, shapes: Mapping[str, tuple[int, int, int]]) -> float:
        """Multiplications for one example; ``shapes`` holds the places, rows and columns of each block."""

    def _signs(self, name: str, rows: int, columns: int, like: Tensor) -> Tensor:
        """Random signs, shape ``(rows, columns)``; the seed and the name determine them."""
        key = (name, like.device, like.dtype)
        if key not in self._matrices:
            signs = torch.randint(0, 2, (rows, columns), generator=self._generator(name), dtype=torch.int8)
            self._matrices[key] = (signs * 2 - 1).to(like)
        return self._matrices[key]

    def _generator(self, name: str) -> torch.Generator:
        # A checksum of the name, since Python's hash of a string differs from process to process.
        return torch.Generator().manual_seed(mix(self.seed, zlib.crc32(name.encode())))

    def _count_sketch(self, name: str, block: Block, size: int) -> Tensor:
        """Vectors of ``size`` sums; each parameter is added to one of them, with a random sign."""
        values, signs = block.dense(), self._signs(f"{name}/sign", 1, block.size, block.dense())
        bucket = torch.randint(size, (block.size,), generator=self._generator(f"{name}/bucket")).to(values.device)
        return values.new_zeros(len(values), size).index_add_(1, bucket, values * signs)


class JointProjection(Projection):
    r"""All blocks together onto ``dim`` features m, by products of random signs of the two factors.

    .. math:: \phi_r = \frac{1}{\sqrt{m}} \sum_l \sum_t (s_{lr}' \delta_{lt}) (u_{lr}' a_{lt})

    No gradient is computed as a matrix: a place of a layer takes ``m (L + R)`` operations, not ``m L R``. The
    expectation of inner products is unchanged. Blocks without factors are added by a count sketch. With no more than m
    parameters in all blocks, gradients are not projected. The product form is that of tensor sketches.

    The signs of a layer take ``4 m (L + R)`` bytes. The products take 64 MiB, or ``8 m T`` bytes for an example with T
    places if that is more.
    """

    def __init__(self, dim: int, seed: int, num_parameters: int) -> None:
        super().__init__(seed)
        self.dim = dim
        self._keeps_all = num_parameters <= dim

    @override
    def __call__(self, gradients: Gradients) -> Gradients:
        if self._keeps_all:
            return Gradients({EVERYTHING: Block(gradients.dense())})
        return Gradients({EVERYTHING: Block(reduce(add, (self._sketch(*item) for item in gradients.items())))})

    @override
    def work(self, shapes: Mapping[str, tuple[int, int, int]]) -> float:
        return sum(places * (rows + columns + 2) * self.dim for places, rows, columns in shapes.values())

    def _sketch(self, name: str, block: Block) -> Tensor:
        """Features of one block, shape ``(B, dim)``."""
        if block.is_dense:
            return self._count_sketch(name, block, self.dim)
        left = self._signs(f"{name}/left", block.shape[0], self.dim, block.like)
        right = self._signs(f"{name}/right", block.shape[1], self.dim, block.like)
        sums = block.like.new_zeros(len(block), self.dim)
        for outer in block.outers:
            # Both factors of every place are computed, for as many examples at once as fit in a chunk.
            step = max(1, CHUNK_BYTES // (2 * outer.right[0, :, 0].numel() * self.dim * block.like.element_size()))
            for start in range(0, len(block), step):
                chunk = slice(start, start + step)
                places = left[outer.left[chunk]] if outer.is_lookup else outer.left[chunk] @ left
                sums[chunk] += places.mul_(outer.right[chunk] @ right).sum(1)
        return sums / self.dim**0.5


class LayerProjection(Projection):
    """Each block onto ``dim x dim`` features: both sides of its matrices by random signs, ``P_S G P_A'``.

    A side narrower than ``dim`` is not projected.
    """

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__(seed)
        self.dim = dim

    @override
    def __call__(self, gradients: Gradients) -> Gradients:
        return Gradients({name: self._projected(name, block) for name, block in gradients.items()})

    @override
    def work(self, shapes: Mapping[str, tuple[int, int, int]]) -> float:
        return sum(places * (rows + columns) * self.dim for places, rows, columns in shapes.values())

    def _projected(self, name: str, block: Block) -> Block:
        if block.is_dense:
            size = self.dim**2
            return block if block.size <= size else Block(self._count_sketch(name, block, size))
        outers = []
        for outer in block.outers:
            left, right = outer.left, outer.right
            if block.shape[0] > self.dim:
                signs = self._signs(f"{name}/left", block.shape[0], self.dim, right) / self.dim**0.5
                left = signs[outer.left] if outer.is_lookup else outer.left @ signs
            if block.shape[1] > self.dim:
                right = right @ self._signs(f"{name}/right", block.shape[1], self.dim, right) / self.dim**0.5
            outers.append(Outer(left, right, min(self.dim, block.shape[0])))
        return Block(Block(None, tuple(outers)).dense())
