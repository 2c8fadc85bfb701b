"""Batches of examples whose loss is the module's own, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stride_lightning.data.examples import HELD_BYTES, Examples
from stride_lightning.data.fingerprints import Fingerprint
from stride_lightning.gradients.features import Linearised
from stride_lightning.gradients.own_batch import OwnBatch, Run, curvature_roots, slopes_of
from stride_lightning.gradients.own_plan import OwnPlan
from stride_lightning.gradients.probes import refuse_not_finite
from stride_lightning.gradients.single import gradient_of, weight_by_gradients
from stride_lightning.gradients.step_outputs import SkippedStep, StepInputs, StepOutputs
from stride_lightning.model.capture import Backward
from stride_lightning.model.layers import in_precision_of
from stride_lightning.runtime.progress import counting
from stride_lightning.runtime.randomness import mix

#: Batches in which a coupled loss sees each example.
NUM_BATCHES = 4
#: Smaller weights than this of the partner's are 0; of an example without a loss alone those that rounding makes.
MIN_WEIGHT, ROUNDING = 1e-6, 1e-3
#: Added to the positions of queries, so that they share no random numbers with training examples.
QUERY_KEYS = 2**40


class OwnReader:
    """A data set as batches for the module's own loss; see :class:`~stride_lightning.gradients.features.Reader`.

    A weighted mean gets a fixed training example as a partner in every batch: its share says by which sum of weights
    the batch was divided. A coupled loss sees every training example in ``NUM_BATCHES`` fixed batches of the loader's
    size, and every query in as many, where it takes the place of one training example.

    Args:
        examples: The examples.
        train: The training examples.
        plan: How gradients are read.
        model: The model, whose precision batches get.
        batch_size: Examples of a batch.
        device: Device of the computation.
        are_queries: Whether the examples are queries.
        show_progress: Show a progress bar.
    """

    #: Largest number of tokens that count in one example's loss.
    most_tokens = 1

    def __init__(
        self,
        examples: Examples,
        train: Examples,
        plan: OwnPlan,
        model: nn.Module,
        *,
        batch_size: int,
        device: torch.device,
        are_queries: bool,
        seed: int,
        show_progress: bool = True,
    ) -> None:
        self.examples, self.train, self.plan, self._model = examples, train, plan, model
        self.batch_size, self.device, self.show_progress = batch_size, device, show_progress
        self._are_queries, self._seed = are_queries, seed
        if not plan.has_rows or (plan.kind == "coupled" and are_queries):
            self.batch_size = 1
        #: Number of outputs along which curvature is taken.
        self.num_outputs = plan.num_outputs
        self.dtype = next(iter(plan.capture.parameters.values())).dtype
        #: Positions of examples that ``training_step`` skips: their loss is 0.
        self.skipped: set[int] = set()
        self._weights: dict[int, float] = {}
        self._held: dict[tuple[int, ...], Any] = {}
        self._free = HELD_BYTES
        fingerprint = Fingerprint(content=not examples.is_random)
        with counting(len(examples), "Reading", show=show_progress) as bar:
            for places, (batch, digests) in zip(
                self._slices(0, len(self)), examples.batches(self.batch_size, device), strict=True
            ):
                fingerprint.update(digests)
                self._hold(tuple(range(places.start, places.stop)), in_precision_of(model, batch))
                bar.update(len(digests))
        self.fingerprint = fingerprint.summary()

    def __len__(self) -> int:
        return len(self.examples)

    def shown(self) -> None:
        """No targets are known of a loss of the module's own."""

    def linearised_at(self, points: Tensor) -> OwnReader:
        """Only the loss of a likelihood is linearised elsewhere than at the model's outputs."""
        raise ValueError("Residuals of a readout need a likelihood, and the loss is the module's own.")

    def linearised(self, share: slice | None = None) -> Iterator[Linearised]:
        """The outputs of some examples with their graph, and the curvature of their losses there."""
        start, stop, _ = (share or slice(None)).indices(len(self))
        with self.plan.capture.watch() as backward:
            alone = self._partner_alone(backward)
        for places, entries in self._entries(start, stop):
            yield from self._linearised(places, entries, alone)

    def _linearised(self, places: slice | Tensor, entries: list[list[int]], alone: Any) -> Iterator[Linearised]:
        size, count = len(self.examples.positions[places]), len(entries) * self.plan.num_draws
        for run in self._runs(entries, alone):
            if run.weight == 0:
                continue
            try:
                outputs = self.plan.capture.outputs(run.inputs)
            except SkippedStep:
                if not self._is_split(places):
                    continue
                for part in self._singles(places):
                    yield from self._linearised(*part, alone)
                return
            roots = curvature_roots(self.plan, slopes_of(self.plan, run, outputs.detach()))
            roots[size:] = 0  # a partner, and examples of the training set beside queries
            yield outputs, partial(_times, roots / count**0.5)

    def run(self, share: slice | None = None, description: str = "") -> Iterator[OwnBatch]:
        """Batches of a share of the examples; a description shows progress."""
        start, stop, _ = (share or slice(None)).indices(len(self))
        with counting(stop - start, description, show=self.show_progress and bool(description)) as bar:
            yield from self._batches(start, stop, bar.update)

    def _batches(self, start: int, stop: int, tick: Callable[[int], Any]) -> Iterator[OwnBatch]:
        with self.plan.capture.watch() as backward:
            alone = self._partner_alone(backward)
            for places, entries in self._entries(start, stop):
                for batch in self._tried(places, entries, alone, backward):
                    yield batch
                    tick(len(batch))

    def _tried(
        self, places: slice | Tensor, entries: list[list[int]], alone: Any, back: Backward
    ) -> Iterator[OwnBatch]:
        """A batch; where ``training_step`` skips it, its examples one by one."""
        batch = OwnBatch(places, self.examples.positions[places], self._runs(entries, alone), self.plan, back)
        if self.plan.kind == "coupled" or not batch.is_skipped:
            yield batch
        elif self._is_split(places):
            for part in self._singles(places):
                yield from self._tried(*part, alone, back)
        else:
            if batch.runs[0].weight != 0:
                self.skipped.add(int(batch.positions[0]))
            yield batch

    def _is_split(self, places: slice | Tensor) -> bool:
        """Whether examples are read one by one where ``training_step`` skips their batch."""
        return isinstance(places, slice) and places.stop - places.start > 1

    def _singles(self, places: slice | Tensor) -> Iterator[tuple[slice, list[list[int]]]]:
        assert isinstance(places, slice)
        for place in range(places.start, places.stop):
            yield slice(place, place + 1), [[place, *self._beside]]

    def _runs(self, entries: Sequence[Sequence[int]], alone: Sequence[Tensor | None]) -> list[Run]:
        runs = []
        for row in entries:
            batch, keys = self._read(row)
            refuse = partial(self._refuse, row)
            weight = self._weight(row[0]) if self.plan.kind == "weighted" and not self.plan.has_rows else None
            draws = [StepInputs(batch, keys, draw) for draw in range(self.plan.num_draws)]
            runs += [Run(inputs, alone[inputs.draw], weight, refuse) for inputs in draws]
        return runs

    def _refuse(self, entries: Sequence[int], rows: Sequence[int]) -> NoReturn:
        """Refuse the examples of rows in which something is not finite, or those of them where it is not so alone."""
        chosen = [entries[row] for row in rows]
        alone = [entry for entry in chosen if not self._is_finite_alone(entry)]
        names = [self._name(entry) for entry in alone or chosen]
        refuse_not_finite(names, alone=bool(alone))

    def _is_finite_alone(self, entry: int) -> bool:
        loss = self.plan.step(*self._read([entry]))
        return loss is None or bool(torch.isfinite(loss))

    def _name(self, entry: int) -> str:
        examples, place = (self.examples, entry) if entry >= 0 else (self.train, -1 - entry)
        return f"{examples.kind} {examples.name(place)}"

    # ---- which examples stand together; a training example beside those that are read is ``-1 - place`` ----

    def _entries(self, start: int, stop: int) -> Iterator[tuple[slice | Tensor, list[list[int]]]]:
        """Places, and the batches in which their examples stand, where they come first."""
        if self.plan.kind == "coupled":
            yield from self._coupled_queries(start, stop) if self._are_queries else self._coupled(start, stop)
            return
        for places in self._slices(start, stop):
            yield places, [[*range(places.start, places.stop), *self._beside]]

    def _slices(self, start: int, stop: int) -> Iterator[slice]:
        for first in range(start - start % self.batch_size, stop, self.batch_size):
            yield slice(max(first, start), min(first + self.batch_size, stop))

    def _coupled(self, start: int, stop: int) -> Iterator[tuple[Tensor, list[list[int]]]]:
        size, order = self._coupled_size, self._order(0)
        half = size if size == len(self) else max(1, size // 2)
        for number, group in enumerate(order.split(half)):
            counted = group[(group >= start) & (group < stop)]
            if not len(counted):
                continue
            rest = group[(group < start) | (group >= stop)].tolist()
            rounds = range(1 if size == len(self) else NUM_BATCHES)
            others = [self._others(group, size - len(group), number, i) for i in rounds]
            yield counted, [[*counted.tolist(), *rest, *more] for more in others]

    def _others(self, group: Tensor, count: int, number: int, draw: int) -> list[int]:
        order = self._order(mix(number, draw))
        return order[~torch.isin(order, group)][:count].tolist()

    def _coupled_queries(self, start: int, stop: int) -> Iterator[tuple[slice, list[list[int]]]]:
        size = self._coupled_size
        if size == len(self.train):
            fixed = [list(range(1, size))]
        else:
            fixed = [self._order(number)[1:size].tolist() for number in range(NUM_BATCHES)]
        for place in range(start, stop):
            yield slice(place, place + 1), [[place, *(-1 - other for other in others)] for others in fixed]

    @property
    def _coupled_size(self) -> int:
        loading = self.train.loading
        return min(len(self.train), self.batch_size if loading is None else loading.batch_size)

    def _order(self, number: int) -> Tensor:
        return torch.randperm(len(self.train), generator=torch.Generator().manual_seed(mix(self._seed, number)))

    # ---- reading ----

    def _key(self, entry: int) -> int:
        if entry < 0:
            return int(self.train.positions[-1 - entry])
        return int(self.examples.positions[entry]) + (QUERY_KEYS if self._are_queries else 0)

    def _batch(self, entries: Sequence[int]) -> Any:
        """The batch of some examples; models may change theirs, so each gets a copy."""
        if (key := tuple(entries)) not in self._held:
            positions = [self.examples.name(e) if e >= 0 else -1 - self.train.name(-1 - e) for e in entries]
            together = _Together(self.examples.dataset, self.train.dataset)
            part = self.examples.with_data(together, torch.tensor(positions))
            (batch,) = (batch for batch, _ in part.batches(len(entries), self.device))
            batch = in_precision_of(self._model, batch)
            self._hold(key, batch)
            return batch
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._held[key])

    def _hold(self, key: tuple[int, ...], batch: Any) -> None:
        leaves = pytree.tree_leaves(batch)
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        if all(isinstance(leaf, Tensor | str | int | float) for leaf in leaves) and size <= self._free:
            self._free -= size
            self._held[key] = batch

    # ---- the weights of a weighted mean ----

    def _partner_alone(self, backward: Backward) -> list[Tensor | None]:
        """Slopes of the partner in a batch of its own, for every draw."""
        if self.plan.kind != "weighted" or not self.plan.has_rows:
            return [None] * self.plan.num_draws
        batch, keys = self._read([self._partner])
        slopes = []
        for draw in range(self.plan.num_draws):
            backward.run(StepInputs(batch, keys, draw), 1)
            slopes.append(self._outputs.slopes())
        return slopes

    @property
    def _partner(self) -> int:
        return -1 - self.plan.partner

    @property
    def _beside(self) -> list[int]:
        """What stands in every batch after the examples that are read."""
        return [self._partner] if self.plan.kind == "weighted" and self.plan.has_rows else []

    def _read(self, entries: Sequence[int]) -> tuple[Any, Tensor]:
        return self._batch(entries), torch.tensor([self._key(entry) for entry in entries], device=self.device)

    def _weight(self, entry: int) -> float:
        """The weight of an example whose row cannot be told apart, from a batch of it and the partner."""
        if entry not in self._weights:
            groups = [entry], [entry, self._partner], [self._partner]
            alone, together, partner = map(self._mean_gradient, groups)
            # An example of no weight has no loss alone, or divides by its weight.
            has_loss = bool(torch.isfinite(alone).all())
            weight = weight_by_gradients(together, alone if has_loss else torch.zeros_like(alone), partner)
            self._weights[entry] = 0.0 if abs(weight) <= (MIN_WEIGHT if has_loss else ROUNDING) else weight
        return self._weights[entry]

    def _mean_gradient(self, entries: Sequence[int]) -> Tensor:
        """The gradient of the loss of a batch, shape ``(p,)``, over all draws."""
        inputs = [StepInputs(*self._read(entries), draw) for draw in range(self.plan.num_draws)]
        return torch.stack([gradient_of(self.plan.capture, each).dense()[0] for each in inputs]).mean(0)

    @property
    def _outputs(self) -> StepOutputs:
        assert isinstance(self.plan.capture.outputs, StepOutputs)
        return self.plan.capture.outputs

    def measure_weights(self) -> None:
        """Measure the mean weight of the training examples, where the partner's is 1, by one pass."""
        if self.plan.kind == "weighted":
            sums = [batch.sum_of_weights() for batch in self.run(description="Weights")]
            self.plan.mean_weight = float(sum(sums)) / len(self)


def _times(roots: Tensor, changes: Tensor) -> Tensor:
    """Curvature from its roots ``(B, C, K)``, times changes of outputs ``(q, B, C)``."""
    inner = torch.einsum("bck,qbc->qbk", roots, changes)
    return torch.einsum("bck,qbk->qbc", roots, inner)


@dataclass
class _Together:
    """A dataset of some examples by their position, and of training examples by ``-1 - position``."""

    dataset: Any
    train: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        return self.dataset[position] if position >= 0 else self.train[-1 - position]
