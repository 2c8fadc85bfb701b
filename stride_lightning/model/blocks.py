"""Per-example gradients, block by block, as factors where a layer has them, because factors are far smaller.

The gradient of one example in the weight matrix of a layer is a sum over places (tokens, pixels). Each term is the
outer product of the gradient of the layer's output and its input. Inner products of two examples need only those
factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

#: Largest array made while two sides are multiplied.
CHUNK_BYTES = 2**26


@dataclass
class Outer:
    """A sum over places t of outer products ``left[i, t] right[i, t]'``, one matrix per example."""

    left: Tensor  # (B, T, L), or integers (B, T) that stand for rows of the identity
    right: Tensor  # (B, T, R)
    num_rows: int  # L

    @property
    def is_lookup(self) -> bool:
        """Whether the left factor is rows of the identity, as in an embedding."""
        return not self.left.is_floating_point()

    def dense(self) -> Tensor:
        """The matrices, shape ``(B, L, R)``."""
        if not self.is_lookup:
            return self.left.transpose(1, 2) @ self.right
        matrices = self.right.new_zeros(len(self.right) * self.num_rows, self.right.shape[2])
        offsets = torch.arange(len(self.right), device=self.left.device)[:, None] * self.num_rows
        matrices.index_add_(0, (self.left + offsets).flatten(), self.right.flatten(0, 1))
        return matrices.view(len(self.right), self.num_rows, -1)

    def left_dense(self) -> Tensor:
        """The left factor as numbers, shape ``(B, T, L)``."""
        return torch.nn.functional.one_hot(self.left, self.num_rows).to(self.right) if self.is_lookup else self.left


class Block:
    """Gradients of ``B`` examples in one block of parameters: vectors, or matrices as factors."""

    def __init__(self, values: Tensor | None = None, outers: tuple[Outer, ...] = ()) -> None:
        self.values, self.outers = values, outers

    def __len__(self) -> int:
        return len(self.values) if self.values is not None else len(self.outers[0].right)

    @property
    def is_dense(self) -> bool:
        """Whether the gradients are held as vectors."""
        return self.values is not None

    @property
    def like(self) -> Tensor:
        """A tensor of the gradients' dtype and device."""
        return self.values if self.values is not None else self.outers[0].right

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrices; vectors have one column."""
        if self.values is not None:
            return self.values.shape[1], 1
        return self.outers[0].num_rows, self.outers[0].right.shape[2]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.shape[0] * self.shape[1]

    @property
    def num_places(self) -> int:
        """Outer products that make up one matrix."""
        return sum(outer.right.shape[1] for outer in self.outers)

    @property
    def num_bytes(self) -> int:
        """Bytes of the vectors, or of the factors."""
        if self.values is not None:
            return self.values.nbytes
        return sum(outer.left.nbytes + outer.right.nbytes for outer in self.outers)

    def dense(self) -> Tensor:
        """Vectors of shape ``(B, size)``, matrices row by row."""
        if self.values is not None:
            return self.values
        return reduce(add, (outer.dense() for outer in self.outers)).flatten(1)

    def __getitem__(self, rows: slice | Tensor) -> Block:
        if self.values is not None:
            return Block(self.values[rows])
        return Block(None, tuple(Outer(o.left[rows], o.right[rows], o.num_rows) for o in self.outers))

    def scaled(self, factors: Tensor) -> Block:
        """Each example's gradient times a number; ``factors`` has shape ``(B,)``."""
        if self.values is not None:
            return Block(self.values * factors[:, None])
        return Block(None, tuple(Outer(o.left, o.right * factors[:, None, None], o.num_rows) for o in self.outers))

    def plus(self, others: Block) -> Block:
        """Sums of the gradients of the same examples."""
        if self.is_dense or others.is_dense:
            return Block(self.dense() + others.dense())
        return Block(None, (*self.outers, *others.outers))

    def prepared(self, others: Block) -> Block:
        """The same gradients in the form in which products with many like ``others`` are cheapest.

        Factors cost ``T T' (L + R)`` per pair of examples with T and T' places, matrices ``L R``.
        """
        if self.is_dense or (not others.is_dense and _factors_are_cheaper(self, others)):
            return self
        return Block(self.dense())

    def inner(self, others: Block) -> Tensor:
        """Inner products with other examples, shape ``(B, B')``."""
        if not (self.is_dense or others.is_dense) and _factors_are_cheaper(self, others):
            return _inner_of_factors(self, others)
        dense = self.dense()
        if others.values is not None:
            return dense @ others.values.T
        if others.num_places == 1 and not others.outers[0].is_lookup:
            return _through(dense.view(len(dense), *others.shape), others.outers[0])
        return torch.cat([dense @ others[chunk].dense().T for chunk in others._chunks()], 1)

    def row_inner(self, others: Block) -> Tensor:
        """Inner product of each example with the same example of the other, shape ``(B,)``."""
        if self.values is not None and others.values is not None:
            return (self.values * others.values).sum(1)
        if not (self.is_dense or others.is_dense) and _factors_are_cheaper(self, others):
            return reduce(add, (_rows_of_factors(a, b) for a in self.outers for b in others.outers))
        return torch.cat([(self[chunk].dense() * others[chunk].dense()).sum(1) for chunk in self._chunks()])

    def squared_norms(self) -> Tensor:
        """Squared norm of each example's gradient, shape ``(B,)``."""
        return self.row_inner(self)

    def sum_of_squares(self) -> Tensor:
        """Sum over examples of the squared gradient of each parameter, shape ``(size,)``."""
        if not self.is_dense and self.num_places == 1 and not self.outers[0].is_lookup:
            (outer,) = self.outers
            return (outer.left[:, 0].square().T @ outer.right[:, 0].square()).flatten()
        return reduce(add, (self[chunk].dense().square().sum(0) for chunk in self._chunks()))

    def combined(self, coefficients: Tensor) -> Tensor:
        """Sums of the gradients with coefficients ``(q, B)``, shape ``(q, size)``."""
        return reduce(add, (coefficients[:, chunk] @ self[chunk].dense() for chunk in self._chunks()))

    def _chunks(self) -> list[slice]:
        """Examples whose matrices are made at once."""
        step = max(1, CHUNK_BYTES // (self.size * 4))
        return [slice(start, min(start + step, len(self))) for start in range(0, len(self), step)]


class Gradients(dict[str, Block]):
    """Gradients of ``B`` examples in all blocks, by name."""

    @property
    def num_examples(self) -> int:
        """``B``."""
        return len(next(iter(self.values())))

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.num_bytes for block in self.values())

    def vectors(self, function: Callable[[str, Block], Tensor]) -> Gradients:
        """Vectors of shape ``(B, size)`` that a function makes of each block."""
        return Gradients({name: Block(function(name, block)) for name, block in self.items()})

    def rows(self, rows: slice | Tensor) -> Gradients:
        """The gradients of some examples."""
        return Gradients({name: block[rows] for name, block in self.items()})

    def scaled(self, factors: Tensor) -> Gradients:
        """Each example's gradient times a number; ``factors`` has shape ``(B,)``."""
        return Gradients({name: block.scaled(factors) for name, block in self.items()})

    def plus(self, others: Gradients) -> Gradients:
        """Sums of the gradients of the same examples."""
        return Gradients({name: block.plus(others[name]) for name, block in self.items()})

    def prepared(self, others: Gradients) -> Gradients:
        """As :meth:`Block.prepared`."""
        return Gradients({name: block.prepared(others[name]) for name, block in self.items()})

    def inner(self, others: Gradients) -> Tensor:
        """Inner products over all blocks, shape ``(B, B')``."""
        return reduce(add, (block.inner(others[name]) for name, block in self.items()))

    def row_inner(self, others: Gradients) -> Tensor:
        """Inner product of each example with the same example of the other, shape ``(B,)``."""
        return reduce(add, (block.row_inner(others[name]) for name, block in self.items()))

    def squared_norms(self) -> Tensor:
        """Squared norm of each example's gradient, shape ``(B,)``."""
        return reduce(add, (block.squared_norms() for block in self.values()))

    def dense(self) -> Tensor:
        """All blocks as one vector per example, shape ``(B, p)``."""
        return torch.cat([block.dense() for block in self.values()], 1)


def concatenated(parts: Sequence[Gradients]) -> Gradients:
    """The examples of several batches after one another; blocks that differ in places become vectors."""
    return Gradients({name: _concatenated([part[name] for part in parts]) for name in parts[0]})


def _concatenated(blocks: list[Block]) -> Block:
    layouts = {tuple((o.right.shape[1], o.is_lookup) for o in block.outers) for block in blocks}
    if any(block.is_dense for block in blocks) or len(layouts) > 1:
        return Block(torch.cat([block.dense() for block in blocks]))
    outers = [
        Outer(torch.cat([o.left for o in same]), torch.cat([o.right for o in same]), same[0].num_rows)
        for same in zip(*(block.outers for block in blocks), strict=True)
    ]
    return Block(None, tuple(outers))


def _factors_are_cheaper(one: Block, other: Block) -> bool:
    return one.num_places * other.num_places * sum(one.shape) < one.size


def _through(matrices: Tensor, outer: Outer) -> Tensor:
    """``left' M right`` of all matrices M and examples of one place each, ``(q, B)``; no outer product is made."""
    left, right = outer.left[:, 0], outer.right[:, 0]
    if matrices.shape[1] > matrices.shape[2]:
        matrices, left, right = matrices.transpose(1, 2), right, left
    step = max(1, CHUNK_BYTES // (4 * len(left) * matrices.shape[1]))
    return torch.cat([((some @ right.T) * left.T).sum(1) for some in matrices.split(step)])


def _inner_of_factors(one: Block, other: Block) -> Tensor:
    step = max(1, CHUNK_BYTES // max(1, len(one) * one.num_places * other.num_places * 4))
    chunks = [other[start : start + step] for start in range(0, len(other), step)]
    parts = [reduce(add, (_products(a, b) for a in one.outers for b in chunk.outers)) for chunk in chunks]
    return torch.cat(parts, 1)


def _products(a: Outer, b: Outer) -> Tensor:
    """Inner products of all pairs of matrices, shape ``(B, B')``, from the products of their factors."""
    if a.right.shape[1] == b.right.shape[1] == 1 and not a.is_lookup and not b.is_lookup:
        return (a.left[:, 0] @ b.left[:, 0].T).mul_(a.right[:, 0] @ b.right[:, 0].T)
    products = a.right.flatten(0, 1) @ b.right.flatten(0, 1).T
    products *= _left_products(a, b)
    return products.view(len(a.right), a.right.shape[1], len(b.right), b.right.shape[1]).sum((1, 3))


def _left_products(a: Outer, b: Outer) -> Tensor:
    if a.is_lookup and b.is_lookup:
        return a.left.flatten()[:, None] == b.left.flatten()
    if a.is_lookup:
        return b.left.flatten(0, 1)[:, a.left.flatten()].T
    if b.is_lookup:
        return a.left.flatten(0, 1)[:, b.left.flatten()]
    return a.left.flatten(0, 1) @ b.left.flatten(0, 1).T


def _rows_of_factors(a: Outer, b: Outer) -> Tensor:
    if a.is_lookup and b.is_lookup:
        left = (a.left[:, :, None] == b.left[:, None, :]).to(a.right)
    elif a.is_lookup:
        left = b.left.gather(2, a.left[:, None, :].expand(-1, b.left.shape[1], -1)).transpose(1, 2)
    elif b.is_lookup:
        left = a.left.gather(2, b.left[:, None, :].expand(-1, a.left.shape[1], -1))
    else:
        left = a.left @ b.left.transpose(1, 2)
    return (left * (a.right @ b.right.transpose(1, 2))).sum((1, 2))
