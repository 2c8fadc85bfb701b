"""What is measured of the queries: their losses, or minus the values of a function; lower is better, always."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import Reading, fingerprint_of
from stride_lightning.model.layers import in_precision_of
from stride_lightning.model.weights import borrowed
from stride_lightning.retraining.own_steps import NUM_DRAWS, OwnSteps, Part
from stride_lightning.tasks.likelihoods import Task, columns, describe
from stride_lightning.tasks.measures import check_rows_function
from stride_lightning.tasks.own_loss import OwnLoss, RowFunction, name_of

#: Queries on which a measure is tested.
_NUM_TESTED = 4


class QueryValues(ABC):
    """The values of queries under any model of one kind; the queries are read once.

    Args:
        batches: The queries, batch by batch, on the device.
        fingerprint: That of the queries.
    """

    #: Whether ``torch.func`` may vectorise :meth:`of_batch` over models.
    vectorises = False

    def __init__(self, batches: list[Any], fingerprint: dict[str, Any]) -> None:
        self.batches, self.fingerprint = batches, fingerprint

    @abstractmethod
    def of_batch(self, model: nn.Module, batch: Any) -> Tensor:
        """The values of a batch of queries, lower is better, shape ``(b,)``; the model is in eval mode."""

    def of(self, model: nn.Module) -> Tensor:
        """The values of all queries, shape ``(q,)``."""
        with borrowed(model, None, None), torch.no_grad():
            return torch.cat([self.of_batch(model, batch) for batch in self.batches])


class TaskLosses(QueryValues):
    """Losses of a likelihood; batches are inputs and encoded targets."""

    vectorises = True

    def __init__(self, task: Task, batches: list[tuple[Any, Tensor]], fingerprint: dict[str, Any]) -> None:
        super().__init__(batches, fingerprint)
        self.task = task
        # Double precision keeps the digits of small losses, but MPS has none, and a task's weights may not take it.
        self.in_double = all(_takes_double(task, encoded) for _, encoded in batches[:1])

    @override
    def of_batch(self, model: nn.Module, batch: Any) -> Tensor:
        outputs, encoded = columns(self.task.outputs(model, in_precision_of(model, batch[0]))), batch[1]
        if self.in_double:
            outputs, encoded = outputs.double(), encoded.double()
        return self.task.loss(outputs, encoded.to(outputs) if not self.task.has_tokens else encoded)


class FunctionValues(QueryValues):
    """Minus the values of a function, which is raised by what is helpful."""

    def __init__(self, function: RowFunction, batches: list[Any], fingerprint: dict[str, Any]) -> None:
        super().__init__(batches, fingerprint)
        self.function = function

    @override
    def of_batch(self, model: nn.Module, batch: Any) -> Tensor:
        values = self.function(model, in_precision_of(model, batch))
        if not isinstance(values, Tensor) or values.ndim != 1:
            raise ValueError(
                f"`measure` {name_of(self.function)}(model, batch) must return one number per example, shape (B,), got "
                f"{describe(values)}."
            )
        return -(values if values.device.type == "mps" else values.double())


class OwnLosses(QueryValues):
    """Losses of the module's own; every batch is the parts of one query's loss."""

    def __init__(self, steps: OwnSteps, batches: list[list[Part]], fingerprint: dict[str, Any]) -> None:
        super().__init__(batches, fingerprint)
        self.steps = steps

    @override
    def of_batch(self, model: nn.Module, batch: Any) -> Tensor:
        draws = range(NUM_DRAWS if self.steps.is_random else 1)
        losses = [self.steps.of_example(model, batch, draw).detach() for draw in draws]
        return torch.stack(losses).mean(0, keepdim=True)


def query_values(
    queries: Examples,
    task: Task | OwnLoss,
    model: nn.Module,
    *,
    measure: RowFunction | None = None,
    num_outputs: int = 0,
    steps: OwnSteps | None = None,
    target: str = "label",
) -> QueryValues:
    """Read the queries, for losses of a task or of the module's own (by ``steps``), or for a function.

    Raises:
        ValueError: If a query or the function cannot be used; the message names it.
    """
    device = next(model.parameters()).device
    if measure is not None:
        reading = Reading(queries, reader_of(task), batch_size=256, device=device)
        batches = [in_precision_of(model, rows.batch) for rows in reading]
        _check_measure(measure, model, queries, device)
        return FunctionValues(measure, batches, reading.fingerprint)
    if isinstance(task, Task):
        reading = Reading(queries, task, model, batch_size=256, device=device)
        return TaskLosses(task, reading.encoded(num_outputs, target), reading.fingerprint)
    assert steps is not None
    fingerprint = fingerprint_of(queries)
    return OwnLosses(steps, list(steps.parts_of_queries(queries)), fingerprint)


def _check_measure(measure: RowFunction, model: nn.Module, queries: Examples, device: torch.device) -> None:
    tested = queries.subset(range(min(_NUM_TESTED, len(queries))))
    tested.num_workers = 0
    places = torch.arange(len(tested))
    whole, *pieces = (in_precision_of(model, part) for part in tested.drawn([places, *places.split(1)], 0, device))
    check_rows_function(measure, model, whole, pieces, argument="measure", differentiable=False)


class _Unread:
    """Takes the place of a task where batches are handed on as they are."""

    has_tokens = False

    def check_batch(self, model: nn.Module, batch: Any) -> None:
        """Every batch is taken."""

    def targets(self, batch: Any) -> None:
        """No targets are known."""


def reader_of(task: Task | OwnLoss) -> Task:
    """The task that reads targets off batches; for a loss of the module's own one that knows none."""
    return task if isinstance(task, Task) else _Unread()  # type: ignore[return-value]


def _takes_double(task: Task, encoded: Tensor) -> bool:
    """Whether a task's loss works in double precision; a task with weights may fail."""
    try:
        task.loss(torch.zeros_like(encoded, dtype=torch.float64), encoded.double())
    except Exception:
        return False
    return True
