"""EK-FAC: the Gauss-Newton matrix in the eigenbasis of Kronecker factors, one block per layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from stride_lightning.gradients.curvature import Curvature, TrainingSide
from stride_lightning.gradients.damping import singular
from stride_lightning.gradients.reading import AnyBatch
from stride_lightning.model.blocks import Block, Gradients, Outer
from stride_lightning.runtime.distributed import total
from stride_lightning.runtime.progress import expect

#: A wider side of a matrix is not rotated: its covariance would not fit in memory.
MAX_SIDE = 4096
#: Nor is a block without factors of more parameters.
MAX_VECTOR = 2048


@dataclass
class Basis:
    """Orthonormal bases for the rows and the columns of a block's matrices; None leaves a side as it is."""

    shape: tuple[int, int]  # (L, R); vectors have one column
    left: Tensor | None  # (L, L)
    right: Tensor | None  # (R, R)

    def rotated(self, block: Block) -> Block:
        """The block in the basis."""
        if block.is_dense:
            return Block(self._both(block.dense(), None if self.left is None else self.left.T, self.right))
        return Block(None, tuple(Outer(self.rows(o), self.columns(o), o.num_rows) for o in block.outers))

    def rows(self, outer: Outer) -> Tensor:
        """The left factor in the basis."""
        return outer.left if self.left is None else outer.left_dense() @ self.left

    def columns(self, outer: Outer) -> Tensor:
        """The right factor in the basis."""
        return outer.right if self.right is None else outer.right @ self.right

    def restored(self, vectors: Tensor) -> Tensor:
        """Vectors in the basis, rotated back."""
        return self._both(vectors, self.left, None if self.right is None else self.right.T)

    def _both(self, vectors: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
        matrices = vectors.view(len(vectors), *self.shape)
        if before is not None:
            matrices = before @ matrices
        if after is not None:
            matrices = matrices @ after
        return matrices.flatten(1)


class EKFAC(Curvature):
    """Gauss-Newton blocks ``(U_S kron U_A) diag(Lambda) (U_S kron U_A)'`` with corrected eigenvalues.

    ``U_A`` and ``U_S`` are the eigenvectors of the covariances of a layer's inputs and of the gradients at its outputs.
    ``Lambda`` is the mean squared gradient in that basis. The gradients are those of the loss's Gauss-Newton matrix,
    exact up to 32 outputs and along eight random directions beyond, so no labels are drawn. Rows of embeddings are not
    rotated, as their covariance is diagonal; nor is a side wider than ``MAX_SIDE``. Up to ``MAX_VECTOR`` parameters
    without factors have a full matrix; beyond, a diagonal one.

    Memory: ``L^2 + R^2 + L R`` values for a block of matrices of shape ``(L, R)``.
    """

    @override
    def expect(self, train: TrainingSide, num_queries: int) -> None:
        expect("EK-FAC factors", train.num_shared, 2 * train.curvature_work)
        expect("EK-FAC eigenvalues", train.num_shared, 2 * train.curvature_work)

    @override
    def fit(self, train: TrainingSide) -> None:
        self._bases = self._fit_bases(train)
        sums: defaultdict[str, Any] = defaultdict(float)
        for batch in train.batches("EK-FAC eigenvalues"):
            for name, squares in self._squares(batch, train):
                sums[name] += squares
        self._eigenvalues = {name: total(values) / len(train) for name, values in sums.items()}
        self.set_mean_eigenvalue(float(torch.cat(list(self._eigenvalues.values())).double().mean()))

    @override
    def solve(self, gradients: Gradients) -> Gradients:
        smallest = min(float(values.min()) for values in self._eigenvalues.values()) + self.absolute_damping
        if smallest <= torch.finfo(next(iter(gradients.values())).like.dtype).eps * self.mean_eigenvalue:
            raise ValueError(singular("a layer", self.damping))
        return self.solve_damped(gradients, self.absolute_damping)

    def solve_damped(self, gradients: Gradients, damping: float) -> Gradients:
        """``(H + damping)^-1`` times each gradient, with an absolute damping."""

        def solved(name: str, block: Block) -> Tensor:
            basis = self._bases[name]
            return basis.restored(basis.rotated(block).dense() / (self._eigenvalues[name] + damping))

        return gradients.vectors(solved)

    def _squares(self, batch: AnyBatch, train: TrainingSide) -> Iterator[tuple[str, Tensor]]:
        """Squared gradients in the bases, summed over examples and directions of the outputs."""
        lefts: defaultdict[str, Any] = defaultdict(float)
        rights: defaultdict[str, Any] = defaultdict(float)
        for gradients in batch.curvature(train.seed):
            for name, block in gradients.items():
                basis, constant = self._bases[name], train.capture.layouts[name].constant_side
                is_one_product = block.num_places == 1 and not block.outers[0].is_lookup
                if not is_one_product or constant is None or not batch.shares_inputs:
                    yield name, basis.rotated(block).sum_of_squares()
                    continue
                # Squares of a single outer product are products of squares. All outputs share a layer's input.
                for sums, side, rotate in ((lefts, "left", basis.rows), (rights, "right", basis.columns)):
                    if side != constant or name not in sums:
                        sums[name] += rotate(block.outers[0])[:, 0].square()
        for name, left in lefts.items():
            yield name, (left.T @ rights[name]).flatten()

    def _fit_bases(self, train: TrainingSide) -> dict[str, Basis]:
        covariances: defaultdict[tuple[str, str], Any] = defaultdict(float)
        shapes: dict[str, tuple[int, int]] = {}
        padded = train.is_padded
        for batch in train.batches("EK-FAC factors"):
            for column, gradients in enumerate(batch.curvature(train.seed)):
                for name, block in gradients.items():
                    shapes[name], constant = block.shape, train.capture.layouts[name].constant_side
                    for side in ("left", "right"):
                        if column == 0 or padded or side != constant or not batch.shares_inputs:
                            for factor in _factors(block, side, padded=padded):
                                covariances[name, side] += factor.T @ factor
        vectors: dict[tuple[str, str], Tensor] = {}
        for name, side in sorted(covariances):  # in the same order in all processes
            covariance = total(covariances[name, side])
            vectors[name, side] = torch.linalg.eigh(covariance.double())[1].to(covariance)
        return {
            name: Basis(shape, vectors.get((name, "left")), vectors.get((name, "right")))
            for name, shape in shapes.items()
        }


def _factors(block: Block, side: str, *, padded: bool) -> list[Tensor]:
    """The vectors whose covariance gives the basis of rows (left) or columns (right); none for a side left as it is.

    If padded, places with a gradient of zero are left out: padding is not part of the data.
    """
    is_left = side == "left"
    if block.is_dense:
        return [block.dense()] if is_left and block.size <= MAX_VECTOR else []
    if block.shape[0 if is_left else 1] > MAX_SIDE or (is_left and all(outer.is_lookup for outer in block.outers)):
        return []
    factors = []
    for outer in block.outers:
        values, others = (outer.left_dense(), outer.right) if is_left else (outer.right, outer.left)
        if padded and others.is_floating_point():
            values = values * (others != 0).any(-1, keepdim=True)
        factors.append(values.flatten(0, 1))
    return factors
