"""What stands between two gradients: the identity, a diagonal, Fisher matrices of features, the average of DataInf."""

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
from stride_lightning.gradients.features import NUM_DIRECTIONS, Batch, Reader, has_exact_curvature, run_batches
from stride_lightning.model.blocks import Gradients
from stride_lightning.model.capture import Capture, Effort
from stride_lightning.runtime.distributed import gather, total
from stride_lightning.runtime.progress import expect
from stride_lightning.tasks.likelihoods import Task


@dataclass
class TrainingSide:
    """The training examples as a curvature sees them."""

    capture: Capture
    task: Task
    reader: Reader
    share: slice  # the training examples of this process
    features: Callable[[Batch], Gradients]  # the gradients that are compared
    seed: int
    project: Callable[[Gradients], Gradients]  # the projection that is part of the features
    effort: Effort  # of an example
    kept: Gradients | None = None  # features of this process's examples, where they are kept
    kept_weights: Tensor | None = None  # factors of their outer products in a Fisher matrix, where they are not 1

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def num_shared(self) -> int:
        """Training examples of this process."""
        return self.share.stop - self.share.start

    @property
    def loss_work(self) -> int:
        """Multiplications for the gradient of an example's loss: one pass forward, one backward."""
        return 3 * self.effort.forward

    @property
    def curvature_work(self) -> int:
        """The same for gradients along all directions of an example's curvature."""
        num_outputs, most_tokens = self.reader.num_outputs, self.reader.most_tokens
        is_exact = has_exact_curvature(num_outputs, most_tokens)
        return (1 + 2 * (num_outputs * most_tokens if is_exact else NUM_DIRECTIONS)) * self.effort.forward

    def batches(self, description: str = "", share: slice | None = None) -> Iterator[Batch]:
        """This process's batches, or those of a part of them, run forward."""
        return run_batches(self.capture, self.task, self.reader, share or self.share, description)

    def gradients(self, description: str = "", share: slice | None = None) -> Iterator[tuple[slice, Gradients]]:
        """The gradients that are compared, and the places of their examples, batch by batch."""
        share = share or self.share
        if self.kept is not None:
            yield share, self.kept.rows(slice(share.start - self.share.start, share.stop - self.share.start))
            return
        for batch in self.batches(description, share):
            yield batch.places, self.features(batch)


class Curvature(RelativeDamping, ABC):
    """``(H + damping)^-1`` for a matrix H that belongs to the mean loss of the training examples.

    A new one is a subclass with :meth:`fit` and :meth:`solve`.
    """

    #: Whether all processes solve for the same gradients together, each with its share of the training examples.
    is_collective: ClassVar[bool] = False

    def __init__(self, damping: float = 0.0) -> None:
        super().__init__(damping)
        #: What was found besides, for the metadata.
        self.chosen: dict[str, Any] = {}

    def described(self) -> dict[str, Any]:
        """What was found, for the metadata."""
        return {"mean_eigenvalue": self.mean_eigenvalue, "damping": self.absolute_damping, **self.chosen}

    def expect(self, train: TrainingSide, num_queries: int) -> None:
        """Tell the call in progress what phases will come, and the work of their items."""

    @abstractmethod
    def fit(self, train: TrainingSide) -> None:
        """Do everything that does not depend on the damping or on queries; every process fits to its share."""

    @abstractmethod
    def solve(self, gradients: Gradients) -> Gradients:
        """``(H + damping)^-1`` times each gradient."""


class Identity(Curvature):
    """No curvature: the inner product of gradients."""

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
    """The Gauss-Newton matrix of (projected) gradients in each block, with nothing between blocks.

    The mean eigenvalue is over the ``min(k, n)`` that can be non-zero. ``k^2`` values for a block of k features.
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
    """The empirical Fisher matrix of kept features in each block: the mean of their outer products, weighted if given.

    Where there are fewer examples than features, by the kernel of the examples.
    """

    @override
    def expect(self, train: TrainingSide, num_queries: int) -> None:
        pass  # its features are there

    @override
    def fit(self, train: TrainingSide) -> None:
        assert train.kept is not None
        kept = train.kept if train.kept_weights is None else train.kept.scaled(train.kept_weights.sqrt())
        blocks: dict[str, Damped] = {}
        for name, block in kept.items():
            rows = block.dense()
            if len(train) < block.size:
                blocks[name] = DampedKernel(gather(rows, len(train)), name)
            else:
                blocks[name] = DampedMatrix(total((rows.T @ rows).double()) / len(train), name)
        self._set_blocks(blocks, len(train))


class DataInf(Curvature):
    r"""The mean over examples of the damped inverse in place of the damped inverse of the mean, in each block.

    The damping is relative to the mean eigenvalue of each block, its mean squared gradient entry.

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
        tiny = torch.finfo(torch.float32).tiny  # a block without gradients has no curvature, and nothing to solve
        return {name: max(self.damping * mean, tiny) for name, mean in self._means.items()}
