"""The loss of a module's own as a loss of batches to train on, and of single examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from stride_lightning.data.examples import Examples
from stride_lightning.model.layers import in_precision_of
from stride_lightning.retraining.batchability import tried_out
from stride_lightning.retraining.loss_kinds import NUM_PROBES, gradient_or_none, kind_of_loss, weight_ratio
from stride_lightning.runtime.randomness import mix
from stride_lightning.tasks.own_loss import FunctionLoss, OwnLoss
from stride_lightning.tasks.training_step import Mode, Moment

#: Draws of random numbers over which the loss of a query is averaged.
NUM_DRAWS = 8
#: Fixed batches in which a query takes the place of one example, where a loss couples the examples of a batch.
NUM_BATCHES = 8


@dataclass(frozen=True)
class Part:
    """A batch whose loss, times a factor, is a part of an example's loss."""

    batch: Any
    keys: Tensor  # of its examples; their random draws are seeded from them
    factor: float


class OwnSteps:
    """A module's own loss, of batches and of single examples, by its kind.

    An example's loss, in the unit of a mean over the examples of a batch, is a sum of parts:

    * ``mean``: the loss of a batch of the example alone;
    * ``sum``: what it adds to the loss of another example, so that no penalty on weights is in it;
    * ``weighted``: the loss of a batch of it alone, times its weight, scaled to a mean of 1 over the training set;
    * ``coupled``: ``|B| L(B) - (|B| - 1) L(B without it)``, for seeded batches of the loader's size.

    Where ``training_step`` returns None, the loss is 0.

    Args:
        task: The loss.
        model: The model, on its device; it stays as it is.
        train: The training data.
        batch_size: Examples of a batch.
        moment: The moment of training at which the loss is taken.
    """

    def __init__(
        self, task: OwnLoss, model: nn.Module, train: Examples, batch_size: int, moment: Moment | None = None
    ) -> None:
        self.loss, self.model, self.train, self.moment = task, model, _read_here(train), moment
        self.batch_size = min(batch_size, len(train))
        self.device = next(model.parameters()).device
        probes = self.train.subset(_spread(len(train), NUM_PROBES).tolist())
        kind = kind_of_loss(task, model, probes, self.device, moment)
        self.kind, self.is_random = kind.kind, kind.is_random
        self.mode: Mode = kind.mode
        self._weights: dict[int, float] = {}

    def described(self) -> dict[str, Any]:
        """Plain values for the metadata."""
        return {"own_loss": {"loss": repr(self.loss), "kind": self.kind, "mode": self.mode}}

    def of_batch(self, model: nn.Module, batch: Any, places: Tensor, draw: int) -> Tensor | None:
        """The loss that training takes a step on, with dropout; None where ``training_step`` skips the batch."""
        step = self.loss.of(model, self.moment, "eval" if self.mode == "eval" else "fit")
        loss = step(in_precision_of(model, batch), self.train.positions[places], draw)
        return loss / len(places) if loss is not None and isinstance(self.loss, FunctionLoss) else loss

    def of_example(self, model: nn.Module, parts: Sequence[Part], draw: int, *, dropout: bool = False) -> Tensor:
        """The loss of an example, a scalar; its graph is there if any part has one."""
        step = self.loss.of(model, self.moment, "fit" if dropout and self.mode == "train" else self.mode)
        losses = [(part.factor, step(part.batch, part.keys, draw)) for part in parts]
        zero = torch.zeros((), device=self.device)
        return sum((factor * loss for factor, loss in losses if loss is not None), zero)

    def share(self, num_examples: int) -> float:
        """The factor of an example's loss in the loss of a batch of so many, if the example is in every batch."""
        return (num_examples if self.kind == "sum" else 1) / len(self.train)

    def parts(self, place: int, seed: int) -> list[Part]:
        """The parts of a training example's loss, read under a seed."""
        return self._parts(self.train, place, seed, num_batches=1)

    def parts_of_queries(self, queries: Examples) -> Iterator[list[Part]]:
        """The parts of each query's loss."""
        queries = _read_here(queries)
        if self.kind == "mean":
            yield from (self._parts(queries, place, 0, offset=len(self.train.dataset)) for place in range(len(queries)))
            return
        beside = _beside(self.train, queries)
        for place in range(len(queries)):
            yield self._parts(beside, len(self.train) + place, 0, num_batches=NUM_BATCHES)

    def _parts(self, source: Examples, place: int, seed: int, *, num_batches: int = 1, offset: int = 0) -> list[Part]:
        """Parts of the loss of an example of ``source``, in which training examples come first."""
        alone = torch.tensor([place])
        if self.kind == "mean":
            batches = [(alone, 1.0)]
        elif self.kind == "sum":
            partner = torch.tensor([0 if place else len(self.train) - 1])
            batches = [(torch.cat([alone, partner]), 1.0), (partner, -1.0)]
        elif self.kind == "weighted":
            weight = self._weight(source, place)
            batches = [(alone, weight)] if weight else []
        else:
            batches = []
            for number in range(num_batches):
                others = self._others(place, mix(seed, number) if place < len(self.train) else number)
                batches.append((torch.cat([alone, others]), (len(others) + 1) / num_batches))
                batches.append((others, -len(others) / num_batches))
        read = source.drawn([places for places, _ in batches], seed, self.device)
        return [
            Part(in_precision_of(self.model, batch), source.positions[places] + offset, factor)
            for batch, (places, factor) in zip(read, batches, strict=True)
        ]

    def _others(self, place: int, seed: int) -> Tensor:
        """The other examples of a batch; the same for all queries."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return order[order != place][: self.batch_size - 1]

    def _weight(self, source: Examples, place: int) -> float:
        """The weight of an example, in units of the mean over the training set."""
        position = int(source.positions[place])
        if position not in self._weights:
            ratio = self._ratios(source, [torch.tensor([place])])[0] / self._mean_weight
            self._weights[position] = ratio if ratio > 1e-6 else 0.0
        return self._weights[position]

    @cached_property
    def _partners(self) -> Tensor:
        return _spread(len(self.train), max(self.batch_size, NUM_PROBES))  # not all of them ignored

    @cached_property
    def _mean_weight(self) -> float:
        """The mean weight over the training set, in units of the weight of all partners."""
        batches = torch.arange(len(self.train)).split(self.batch_size)
        return sum(self._ratios(self.train, batches)) / len(self.train)

    def _ratios(self, source: Examples, batches: Sequence[Tensor]) -> list[float]:
        """The weight of the examples of each batch over that of the partners, from gradients at shifted weights."""
        ratios = []
        with tried_out(self.model):
            step = self.loss.of(self.model, self.moment, self.mode)
            pairs = [places for batch in batches for places in (batch, torch.cat([batch, self._partners]))]
            gradients: list[Tensor | None] = []
            for places, batch in zip(
                [self._partners, *pairs], source.drawn([self._partners, *pairs], 0, self.device), strict=True
            ):
                batch = in_precision_of(self.model, batch)
                gradients.append(gradient_or_none(step, batch, source.positions[places]))
            partners, *others = gradients
        if partners is None or not partners.any():
            raise ValueError(
                "The weights of examples in the loss cannot be read: the loss of a batch of "
                f"{self.batch_size} examples is not finite. Pass `loss=fn` with fn(model, batch) -> (B,)."
            )
        for alone, together in zip(others[::2], others[1::2], strict=True):
            ratios.append(weight_ratio(alone, together, partners)[0])
        return ratios


def _read_here(examples: Examples) -> Examples:
    """The same examples, read in this process."""
    here = examples.subset(range(len(examples)))
    here.num_workers = 0
    return here


def _spread(num_examples: int, count: int) -> Tensor:
    """Places spread evenly over the examples."""
    return torch.linspace(0, num_examples - 1, min(count, num_examples), dtype=torch.float64).long()


def _beside(train: Examples, queries: Examples) -> Examples:
    """Training examples and then queries, in batches as the training loader makes them."""
    return Examples(
        ConcatDataset([train.dataset, queries.dataset]),
        collate_fn=train.collate_fn,
        positions=torch.cat([train.positions, len(train.dataset) + queries.positions]),
        owners=train.owners,
        kind=queries.kind,
    )
