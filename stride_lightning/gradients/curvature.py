"""Curvatures: the identity, a diagonal, Gauss-Newton and Fisher matrices of features, the mean of DataInf."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from stride_lightning.gradients.damping import Damped, DampedKernel, DampedMatrix, RelativeDamping, singular
from stride_lightning.gradients.reading import AnyBatch, AnyReader
from stride_lightning.gradients.signs import count_directions
from stride_lightning.model.blocks import Gradients
from stride_lightning.model.capture import Capture, Effort
from stride_lightning.runtime.distributed import gather, total
from stride_lightning.runtime.progress import expect


@dataclass
class TrainingSide:
    """The training examples, for a curvature to fit to."""

    capture: Capture
    is_padded: bool  # whether examples of different lengths are padded
    reader: AnyReader
    share: slice  # the training examples of this process
    features: Callable[[AnyBatch], Gradients]  # the gradients to compare
    seed: int
    project: Callable[[Gradients], Gradients]  # the projection that is part of the features
    effort: Effort  # work and memory of one example
    batch_bytes: int  # largest size of a batch
    stored: Gradients | None = None  # features of this process's examples; None if each pass computes them
    stored_weights: Tensor | None = None  # factors of their outer products in a Fisher matrix; None for 1

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def num_shared(self) -> int:
        """Number of training examples of this process."""
        return self.share.stop - self.share.start

    @property
    def loss_work(self) -> int:
        """Multiplications for the gradient of one example's loss: one pass forward, one backward."""
        return 3 * self.effort.forward

    @property
    def curvature_work(self) -> int:
        """Multiplications for the gradients along all directions of one example's curvature."""
        directions = count_directions(self.reader.num_outputs, self.reader.most_tokens)
        return (1 + 2 * directions) * self.effort.forward

    def batches(self, description: str = "", share: slice | None = None) -> Iterator[AnyBatch]:
        """Batches of this process's examples, or of a part of them, after their forward pass."""
        return self.reader.run(share or self.share, description)

    def gradients(
        self, description: str = "", share: slice | None = None
    ) -> Iterator[tuple[slice | Tensor, Gradients]]:
        """The gradients to compare and the places of their examples, batch by batch."""
        share = share or self.share
        if self.stored is not None:
            yield share, self.stored.rows(slice(share.start - self.share.start, share.stop - self.share.start))
            return
        for batch in self.batches(description, share):
            yield batch.places, self.features(batch)


class Curvature(RelativeDamping, ABC):
    """``(H + damping)^-1`` for a curvature matrix H of the mean loss of the training examples.

    A new curvature is a subclass with :meth:`fit` and :meth:`solve`.
    """

    #: Whether all processes solve together for the same gradients, each with its share of the training examples.
    is_collective: ClassVar[bool] = False

    def __init__(self, damping: float = 0.0) -> None:
        super().__init__(damping)
        #: Further results of the fit and of solving, for the metadata.
        self.chosen: dict[str, Any] = {}

    def described(self) -> dict[str, Any]:
        """Results of the fit and of solving, for the metadata."""
        return {"mean_eigenvalue": self.mean_eigenvalue, "damping": self.absolute_damping, **self.chosen}

    def expect(self, train: TrainingSide, num_queries: int) -> None:
        """Announce the phases of fitting and solving, and their work, to the progress bar of the call."""

    @abstractmethod
    def fit(self, train: TrainingSide) -> None:
        """Do all work that depends neither on the damping nor on queries; every process works on its share."""

    @abstractmethod
    def solve(self, gradients: Gradients) -> Gradients:
        """``(H + damping)^-1`` times each gradient."""


class Identity(Curvature):
    """No curvature: scores are inner products of gradients."""

    @override
    def fit(self, train: TrainingSide) -> None:
        pass

    @override
    def solve(self, gradients: Gradients) -> Gradients:
        return gradients


class Diagonal(Curvature):
    """The diagonal of the empirical Fisher matrix."""

    @override
    def expect(self, train: TrainingSide, num_queries: int) -> None:
        expect("Diagonal of the Fisher matrix", train.num_shared, train.loss_work)

    @override
    def fit(self, train: TrainingSide) -> None:
        sums: defaultdict[str, Any] = defaultdict(float)
        for _, gradients in train.gradients("Diagonal of the Fisher matrix"):
            for name, block in gradients.items():
                sums[name] += block.sum_of_squares().double()
        self._diagonals = {name: total(values) / len(train) for name, values in sums.items()}
        self.set_mean_eigenvalue(float(torch.cat(list(self._diagonals.values())).mean()))

    @override
    def solve(self, gradients: Gradients) -> Gradients:
        damped = {name: diagonal + self.absolute_damping for name, diagonal in self._diagonals.items()}
        for name, diagonal in damped.items():
            if float(diagonal.min()) <= 0:
                raise ValueError(singular(f"the diagonal of {name}", self.damping))
        return gradients.vectors(lambda name, block: block.dense() / damped[name].to(block.like))


class GaussNewtonBlocks(Curvature):
    """The Gauss-Newton matrix of (projected) gradients in each block, with zeros between blocks.

    The mean eigenvalue is over the ``min(k, n)`` that can be non-zero. A block of k features takes ``k^2`` values.
    """

    @override
    def expect(self, train: TrainingSide, num_queries: int) -> None:
        expect("Gauss-Newton blocks", train.num_shared, 2 * train.curvature_work)

    @override
    def fit(self, train: TrainingSide) -> None:
        sums: defaultdict[str, Any] = defaultdict(float)
        for batch in train.batches("Gauss-Newton blocks"):
            for gradients in batch.curvature(train.seed):
                for name, block in train.project(gradients).items():
                    dense = block.dense()
                    sums[name] += (dense.T @ dense).double()
        self._set_blocks({name: DampedMatrix(total(sums[name]) / len(train), name) for name in sums}, len(train))

    def _set_blocks(self, blocks: Mapping[str, Damped], num_train: int) -> None:
        self._blocks = blocks
        ranks = [min(block.size, num_train) for block in blocks.values()]
        self.set_mean_eigenvalue(sum(block.trace for block in blocks.values()) / sum(ranks))

    @override
    def solve(self, gradients: Gradients) -> Gradients:
        damping = self.absolute_damping
        return gradients.vectors(lambda name, block: self._blocks[name].solve(block.dense(), damping))


class Fisher(GaussNewtonBlocks):
    """The empirical Fisher matrix of stored features in each block: the (weighted) mean of their outer products.

    With fewer examples than features, the kernel of the examples takes its place.
    """

    @override
    def expect(self, train: TrainingSide, num_queries: int) -> None:
        pass  # storing the features is a phase already

    @override
    def fit(self, train: TrainingSide) -> None:
        assert train.stored is not None
        weights = train.stored_weights
        features = train.stored if weights is None else train.stored.scaled(weights.sqrt())
        blocks: dict[str, Damped] = {}
        for name, block in features.items():
            rows = block.dense()
            if len(train) < block.size:
                blocks[name] = DampedKernel(gather(rows, len(train)), name)
            else:
                blocks[name] = DampedMatrix(total((rows.T @ rows).double()) / len(train), name)
        self._set_blocks(blocks, len(train))


class DataInf(Curvature):
    r"""In each block, the mean over examples of damped inverses, in place of the damped inverse of the mean.

    The damping is relative to each block's mean eigenvalue, which is its mean squared gradient entry.

    .. math:: \frac{1}{n} \sum_j (g_j g_j' + \lambda I)^{-1} v
              = \frac{1}{\lambda} \Big( v - \frac{1}{n} \sum_j \frac{g_j' v}{\lambda + |g_j|^2} g_j \Big)

    Every call of :meth:`solve` passes over the training set once.
    """

    is_collective = True

    @override
    def expect(self, train: TrainingSide, num_queries: int) -> None:
        expect("Norms of gradients", train.num_shared, train.loss_work)
        products = 2 * num_queries * train.capture.num_parameters
        expect("Inverse for every example", train.num_shared, train.loss_work + products)

    @override
    def fit(self, train: TrainingSide) -> None:
        sums: defaultdict[str, Any] = defaultdict(float)
        for _, gradients in train.gradients("Norms of gradients"):
            for name, block in gradients.items():
                sums[name] += block.squared_norms().double().sum() / block.size
        self._train = train
        self._means = {name: float(total(value)) / len(train) for name, value in sums.items()}

    @override
    def solve(self, gradients: Gradients) -> Gradients:
        if self.damping == 0:
            raise ValueError(singular("a single example", self.damping))
        damping = self._dampings()
        taken = {name: torch.zeros_like(block.dense()) for name, block in gradients.items()}
        for _, theirs in self._train.gradients("Inverse for every example"):
            for name, block in theirs.items():
                products = gradients[name].inner(block) / (damping[name] + block.squared_norms())
                taken[name] += block.combined(products)
        means = {name: total(values) / len(self._train) for name, values in taken.items()}
        return gradients.vectors(lambda name, block: (block.dense() - means[name]) / damping[name])

    @override
    def described(self) -> dict[str, Any]:
        return {"mean_eigenvalue": self._means, "damping": self._dampings()}

    def _dampings(self) -> dict[str, float]:
        tiny = torch.finfo(torch.float32).tiny  # for a block without gradients, where nothing is to solve
        return {name: max(self.damping * mean, tiny) for name, mean in self._means.items()}
