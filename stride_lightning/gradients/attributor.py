"""GradientAttributor: scores from features of gradients, a curvature and checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.data.examples import Examples
from stride_lightning.gradients.checkpoints import Checkpoint, read_checkpoints
from stride_lightning.gradients.curvature import Curvature, TrainingSide
from stride_lightning.gradients.planned import PlannedAttributor
from stride_lightning.gradients.projection import Projection
from stride_lightning.gradients.reading import AnyBatch, AnyReader
from stride_lightning.model.blocks import Gradients, concatenated
from stride_lightning.model.capture import Capture
from stride_lightning.model.weights import borrowed
from stride_lightning.readout.network import NetworkReadout
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.top_attribution import TopAttribution
from stride_lightning.runtime.distributed import gather
from stride_lightning.runtime.progress import expect


@dataclass
class Fitted:
    """The result of a fit at one checkpoint."""

    checkpoint: Checkpoint | None  # None for the attributed weights
    rates: Mapping[str, float] | None  # learning rate of each parameter, where scores are weighted by it
    curvature: Curvature
    side: TrainingSide
    readout: NetworkReadout | None  # whose outputs the loss is linearised at; None for the model's own
    example_weights: Tensor | None  # factors of the training examples of this process


class GradientAttributor(PlannedAttributor):
    r"""Inner products of gradients: one design for a family of methods.

    .. math:: s_{qi} = \sum_c g_q' (H_c + \lambda_c I)^{-1} g_i

    The sum is over checkpoints c. A feature g is a gradient in the chosen parameters, projected or not; H is a
    curvature. A new method is a subclass with a name; it overrides one or two of :meth:`curvature`, :meth:`features`,
    :meth:`projection`, :meth:`kernel_weights` and :meth:`example_weights`.

    Gradients of training examples are used batch by batch. Gradients of queries are held: as factors of a layer where
    factors are cheaper to multiply (``T T' (L + R) < L R`` for matrices of shape ``(L, R)`` and T and T' places), else
    as vectors. Memory beyond the model, for p parameters, q queries, n training examples and a ``memory_budget`` of b:
    ``4 q n`` bytes for the scores, ``min(4 c q p, b / 2)`` for the queries (c is 2, or 8 with conjugate gradients;
    further queries take their turn), at most ``b / 2`` for a batch, and 64 MiB. With a projection to k features the
    queries take ``4 (n + q) k`` bytes instead.

    Args:
        checkpoints: A folder or a list of files of weights. Scores are their mean over these, in place of the
            attributed weights.
        kwargs: Arguments of :class:`PlannedAttributor`.
    """

    #: Number of copies of a query's gradient in memory at once.
    copies: ClassVar[int] = 2

    def __init__(self, *, checkpoints: str | Path | Sequence[str | Path] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.checkpoints = checkpoints
        self._fitted: list[Fitted] = []

    @abstractmethod
    def curvature(self) -> Curvature:
        """A new curvature; each checkpoint fits one."""

    def features(self, batch: AnyBatch) -> Gradients:
        """The gradients to compare, of training examples and queries alike."""
        return batch.loss()

    def projection(self, capture: Capture) -> Projection | None:
        """A projection to so few features that those of all training examples are stored; None to store none."""
        return None

    def kernel_weights(self, batch: AnyBatch) -> Tensor | None:
        """Factors of stored examples in the Fisher matrix, shape ``(B,)``; None for 1."""
        return None

    def example_weights(self, batch: AnyBatch) -> Tensor | None:
        """Factors of stored examples in the scores, shape ``(B,)``; checkpoints average them apart from the rest."""
        return None

    def fit_readout(self, model: nn.Module) -> NetworkReadout | None:
        """The readout at whose outputs the loss is linearised; None for the outputs of the model."""
        return None

    def starting_points(self, model: nn.Module, record: Any, checkpoint: Any) -> list[tuple[Checkpoint | None, Any]]:
        """Checkpoints with their learning rates. No checkpoint: the attributed weights; no rates: equal weights."""
        if record is not None:
            raise ValueError(f"method={self.method!r} reads no record, got record={record!r}. Leave out `record`.")
        if self.checkpoints is None:
            return [(None, None)]
        return [(checkpoint, None) for checkpoint in read_checkpoints(self.checkpoints, model, self.weights_only)]

    def scale(self) -> float:
        """Factor of all scores: ``1 / (c n)``, for means over c checkpoints of effects on a mean loss of n examples."""
        return 1 / (len(self._fitted) * len(self.train_data))

    @override
    def fit_model(self, model: nn.Module, device: torch.device, record: str | Path | None, checkpoint: Any) -> None:
        starts = self.starting_points(model, record, checkpoint)
        self.plan(model, device)
        self._map = self.projection(self.capture)
        self._num_checkpoints = len(starts)
        self._fitted = [self._fit_one(model, start, rates) for start, rates in starts]
        weights = [fitted.example_weights for fitted in self._fitted if fitted.example_weights is not None]
        self._column_weights = torch.stack(weights).mean(0) if weights else None
        self.metadata["checkpoints"] = [
            {"name": start.name, "step": start.step, "learning_rates": _shown(rates)}
            for start, rates in starts
            if start is not None
        ]

    def _fit_one(self, model: nn.Module, checkpoint: Checkpoint | None, rates: Any) -> Fitted:
        curvature = self.curvature()
        with self._at(model, checkpoint):
            readout = self.fit_readout(model)
            reader = self.reader
            if readout is not None:
                reader, readout = reader.linearised_at(readout.train_outputs), readout.without_training()
            of_share = self.capture, self.is_padded, reader, self.share
            side = TrainingSide(*of_share, self._compared, self.seed, self._projected, self.effort, self.batch_bytes)
            self._expect(side, curvature)
            weights = None if self._map is None else self._store(side)
            curvature.fit(side)
        return Fitted(checkpoint, rates, curvature, side, readout, weights)

    def _expect(self, side: TrainingSide, curvature: Curvature) -> None:
        """Announce the phases of the call to its progress bar; each runs once a checkpoint."""
        count, num_queries = self._num_checkpoints, self.expected_queries
        curvature.expect(side, num_queries)
        if self._map is None:
            chunks = len(self._query_chunks(num_queries)) * count
            products = num_queries * self.capture.num_parameters
            expect("Scores", side.num_shared * chunks, side.loss_work + products)
        else:
            expect("Features", side.num_shared * count, side.loss_work + self._map.work(self.effort.shapes))
        expect("Queries", num_queries * count, side.loss_work)

    def _store(self, side: TrainingSide) -> Tensor | None:
        """Store the features of the training examples, from one pass; returns the factors of the examples."""
        batches = side.batches("Features")
        parts, every = [], []
        for batch in batches:
            parts.append((self._compared(batch), self.kernel_weights(batch), self.example_weights(batch)))
            every.append(torch.arange(len(self.train_data))[batch.places])
        features, in_kernel, of_examples = zip(*parts, strict=True)
        order = torch.cat(every).argsort()  # batches of a coupled loss are in random order
        side.stored, side.stored_weights = concatenated(features).rows(order), _joined(in_kernel, order)
        return _joined(of_examples, order)

    def _at(self, model: nn.Module, checkpoint: Checkpoint | None) -> AbstractContextManager[Any]:
        return nullcontext() if checkpoint is None else borrowed(model, checkpoint.load(), None, whole=False)

    def _compared(self, batch: AnyBatch) -> Gradients:
        return self._projected(self.features(batch))

    def _projected(self, gradients: Gradients) -> Gradients:
        return gradients if self._map is None else self._map(gradients)

    @override
    def score_queries(
        self, model: nn.Module, queries: Examples, device: torch.device, target: str
    ) -> Attribution | TopAttribution:
        reader = self.read_queries(model, queries, device, target)
        readers = [self._linearised(model, fitted, reader, target) for fitted in self._fitted]

        def tiles(chunk: slice) -> Callable[[slice], Tensor]:
            sides: dict[int, Gradients] = {}
            return lambda columns: self._tile(model, readers, chunk, columns, sides)

        attribution = self.collect_scores(reader, self._query_chunks(len(reader)), tiles)
        attribution.metadata["curvature"] = [fitted.curvature.described() for fitted in self._fitted]
        return attribution

    def _linearised(self, model: nn.Module, fitted: Fitted, queries: AnyReader, target: str) -> AnyReader:
        """The queries, linearised where the training examples of this fit are."""
        if fitted.readout is None:
            return queries
        with self._at(model, fitted.checkpoint):
            return queries.linearised_at(fitted.readout.outputs_of(queries.examples, target))

    def _query_chunks(self, num_queries: int) -> list[slice]:
        """Slices of the queries, each as many as memory holds gradients of at once."""
        bytes_per_query = 4 * self.copies * self.capture.num_parameters
        step = num_queries if self._map is not None else max(1, self.query_bytes // bytes_per_query)
        return [slice(start, min(start + step, num_queries)) for start in range(0, num_queries, step)]

    def _tile(
        self,
        model: nn.Module,
        readers: Sequence[AnyReader],
        chunk: slice,
        columns: slice,
        sides: dict[int, Gradients],
    ) -> Tensor:
        """Scores of some queries for some training examples, shape ``(q, columns)``; each fit has its reader."""
        dtype = torch.promote_types(self.reader.dtype, torch.float32)
        shape, start = (chunk.stop - chunk.start, columns.stop - columns.start), columns.start
        part = torch.zeros(shape, dtype=dtype, device=self.reader.device)
        for number, fitted in enumerate(self._fitted):
            with self._at(model, fitted.checkpoint):
                side = sides[number] if number in sides else self._query_side(fitted, readers[number], chunk)
                for places, gradients in fitted.side.gradients("Scores", columns):
                    side = side.prepared(gradients)
                    part[:, within(places, start)] += side.inner(gradients)
                if len(self._fitted) == 1:  # with several checkpoints each tile computes them again
                    sides[number] = side
        if self._column_weights is not None:
            part *= self._column_weights[start - self.share.start :][: shape[1]]
        return part * self.scale()

    def _query_side(self, fitted: Fitted, queries: AnyReader, chunk: slice) -> Gradients:
        batches = queries.run(chunk, "Queries")
        return self._solved(fitted, concatenated([self._compared(batch) for batch in batches]))

    def _solved(self, fitted: Fitted, gradients: Gradients) -> Gradients:
        """Gradients times the inverse of the curvature, times the learning rates."""
        solved = fitted.curvature.solve(gradients)
        if fitted.rates is None:
            return solved
        layouts = self.capture.layouts
        return Gradients({name: layouts[name].times(block, fitted.rates) for name, block in solved.items()})

    @override
    def score_training_data(self, model: nn.Module, device: torch.device) -> Tensor:
        influences = torch.zeros(len(self.train_data))
        for fitted in self._fitted:
            share = slice(0, len(self.train_data)) if fitted.curvature.is_collective else self.share
            with self._at(model, fitted.checkpoint):
                for places, gradients in fitted.side.gradients("Self-influence", share):
                    for rows in self._query_chunks(gradients.num_examples):
                        some = gradients.rows(rows)
                        solved = self._solved(fitted, some).row_inner(some).float().cpu()
                        influences[torch.arange(len(influences))[places][rows]] += solved
        mine = influences[self.share] * self.scale()
        if self._column_weights is not None:
            mine *= self._column_weights.float().cpu()
        return gather(mine, len(self.train_data))


def within(places: slice | Tensor, start: int) -> slice | Tensor:
    """Places counted from another start."""
    return slice(places.start - start, places.stop - start) if isinstance(places, slice) else places - start


def _joined(parts: Sequence[Tensor | None], order: Tensor) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.cat(given)[order] if given else None


def _shown(rates: Mapping[str, float] | None) -> float | dict[str, float] | None:
    """Learning rates for the metadata: a single number if all are equal."""
    if rates is None:
        return None
    return next(iter(rates.values())) if len(set(rates.values())) == 1 else dict(rates)
