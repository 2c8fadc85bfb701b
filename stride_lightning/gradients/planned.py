"""PlannedAttributor: the base of methods that read gradients, with the plan, the data, and scores tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.attributor import Attributor
from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.data.reading import count_outputs
from stride_lightning.gradients.features import Reader
from stride_lightning.gradients.own_plan import OwnPlan, plan_own_loss
from stride_lightning.gradients.own_reader import OwnReader
from stride_lightning.gradients.reading import AnyReader
from stride_lightning.model.capture import Outputs
from stride_lightning.model.layers import check_layers, cloned, in_precision_of
from stride_lightning.model.plan import plan_capture, probe_places
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.top_attribution import TopAttribution
from stride_lightning.results.top_examples import TopCollector, joined
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import gather, shard, total, world_size
from stride_lightning.runtime.memory import memory_budget
from stride_lightning.runtime.progress import announce
from stride_lightning.tasks.inference import check_outputs
from stride_lightning.tasks.likelihoods import Task, columns
from stride_lightning.tasks.own_loss import Lowered, OwnLoss

#: Bytes of a tile of scores, where only the top of each query is stored.
TILE_BYTES = 2**26


class TaskOutputs(Outputs):
    """Outputs of a model as a task reads them, of shape ``(B, C)``, or ``(B, T, C)`` for tokens."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__(model)
        self._task = [task]  # in a list: a task that is a module must not become a part of this one

    @override
    def forward(self, inputs: Any) -> Tensor:
        return columns(self._task[0].outputs(self.model, inputs))

    @override
    def check(self, outputs: object, num_examples: int) -> None:
        check_outputs(outputs, num_examples, self._task[0])


class PlannedAttributor(Attributor):
    """A method that reads per-example gradients; see the classes built on it.

    Args:
        layers: Names of the modules whose parameters count; by default all trainable parameters.
        top_k: Store only so many proponents and opponents of each query, for data sets with too many scores.
        memory_budget: Bytes for a batch of examples and the gradients of queries together; by default 512 MiB, or half
            of a GPU's free memory. Batches are smaller than ``batch_size`` if they would not fit.
        kwargs: Arguments of :class:`Attributor`.
    """

    #: Graphs of a batch that are held at once.
    graphs: ClassVar[int] = 1

    def __init__(
        self,
        *,
        layers: Sequence[str] | None = None,
        top_k: int | None = None,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_layers(layers)
        self.memory_budget = None if memory_budget is None else check_count("memory_budget", memory_budget)
        self.layers, self.top_k = layers, None if top_k is None else check_count("top_k", top_k)

    def chosen_layers(self, outputs: Outputs, inputs: Any) -> Sequence[str] | None:
        """Names of the modules whose parameters count, for outputs of a model and the inputs of one batch."""
        return self.layers

    def check_data(self, fingerprint: dict[str, Any]) -> None:
        """Refuse other training data than a record's."""

    def options(self) -> dict[str, Any]:
        """Options and automatic choices, for the metadata."""
        return {"layers": None if self.layers is None else list(self.layers), "top_k": self.top_k}

    def plan(self, model: nn.Module, device: torch.device) -> None:
        """Plan how to read gradients, and read the training data once."""
        self.own_plan: OwnPlan | None = None
        if isinstance(self.task, OwnLoss):
            how: dict[str, Any] = {"moment": self.moment, "choose_layers": self.chosen_layers}
            self.own_plan = plan_own_loss(self.task, model, self.train_data, device, **how)
            self.capture, self.effort = self.own_plan.capture, self.own_plan.effort
            self.metadata["loss"] = f"{self.metadata['loss']}: {self.own_plan.described()}"
            announce(f"The loss of an example is {self.metadata['loss']}.", show=self.show_progress)
        else:
            self._plan_likelihood(model, self.task, device)
        announce(self.capture.warning, show=self.show_progress and bool(self.capture.warning))
        #: Bytes for a batch, and bytes for the gradients of queries.
        self.batch_bytes = self.query_bytes = memory_budget(self.memory_budget, device) // 2
        #: Examples of one forward pass.
        self.chunk_size = min(self.batch_size, max(1, self.batch_bytes // (self.graphs * self.effort.num_bytes)))
        self.reader = self.read_training(model, self.train_data, device)
        if isinstance(self.reader, OwnReader):
            self.reader.measure_weights()
        else:
            self.task = self.reader.rescale()
        self.check_data(self.reader.fingerprint)
        if len(self.train_data) < world_size():
            raise ValueError(
                f"Every process needs a training example, but there are {world_size()} processes and "
                f"{len(self.train_data)} training examples. Use fewer processes."
            )
        self.share = shard(len(self.train_data))
        self.metadata |= {"data": self.reader.fingerprint, "options": self.options()}
        self.metadata["gradients"] = self.capture.described()

    def _plan_likelihood(self, model: nn.Module, task: Task, device: torch.device) -> None:
        num_parameters = sum(value.numel() for value in model.parameters() if value.requires_grad)
        places = probe_places(len(self.train_data), max(1, num_parameters))
        probes = self.train_data.subset(places)
        head = first_batch(probes, len(places), device)
        with probes.naming(0):
            self.num_outputs = count_outputs(model, task, cloned(head))  # models may change their inputs
        together = cloned(in_precision_of(model, task.inputs(head)))
        if isinstance(together, Mapping):  # texts, padded alike
            single = [{name: value[row : row + 1] for name, value in together.items()} for row in range(len(places))]
        else:
            alone = (first_batch(self.train_data.subset([place]), 1, device) for place in places)
            single = [in_precision_of(model, task.inputs(batch)) for batch in alone]
        outputs = TaskOutputs(model, task)
        with probes.naming(0):
            self.capture = plan_capture(outputs, single, together, self.chosen_layers(outputs, together))
        #: Work and memory of one example's gradients.
        self.effort = self.capture.effort(together, len(places))

    def read_training(self, model: nn.Module, examples: Examples, device: torch.device) -> AnyReader:
        """Training examples, all or some."""
        if self.own_plan is None:
            return self.read(model, examples, device, "label")
        return self._own_reader(self.own_plan, model, examples, device, are_queries=False)

    @property
    def is_padded(self) -> bool:
        """Whether examples of different lengths are padded to be a batch."""
        if self.own_plan is not None:
            return self.own_plan.is_padded
        return isinstance(self.task, Task) and self.task.has_padding

    def read(self, model: nn.Module, examples: Examples, device: torch.device, target: str) -> Reader:
        """The examples as batches of inputs and encoded targets; they are read once."""
        assert isinstance(self.task, Task)
        options: dict[str, Any] = {"batch_size": self.chunk_size, "show_progress": self.show_progress}
        options["capture"] = self.capture
        return Reader(examples, model, self.task, self.num_outputs, device=device, target=target, **options)

    def read_queries(self, model: nn.Module, queries: Examples, device: torch.device, target: str) -> AnyReader:
        """The queries, whose losses or measures have the gradients that are explained."""
        if self.measure is None and self.own_plan is None:
            return self.read(model, queries, device, target)
        plan = self.own_plan
        if self.measure is not None:
            how: dict[str, Any] = {"moment": self.moment, "choose_layers": self.chosen_layers, "mode": "eval"}
            plan = plan_own_loss(Lowered(self.measure), model, queries, device, like=self.capture, **how)
        assert plan is not None
        return self._own_reader(plan, model, queries, device, are_queries=True)

    def _own_reader(
        self, plan: OwnPlan, model: nn.Module, examples: Examples, device: torch.device, *, are_queries: bool
    ) -> OwnReader:
        how: dict[str, Any] = {"batch_size": self.chunk_size, "seed": self.seed, "show_progress": self.show_progress}
        return OwnReader(examples, self.train_data, plan, model, device=device, are_queries=are_queries, **how)

    def _skipped(self, queries: AnyReader) -> dict[str, Any]:
        """How many examples ``training_step`` skips, for the metadata; nothing if there are none."""
        if not isinstance(self.reader, OwnReader):
            return {}
        train = int(total(torch.tensor(len(self.reader.skipped))))
        counts = {"train": train, "queries": len(queries.skipped) if isinstance(queries, OwnReader) else 0}
        if not any(counts.values()):
            return {}
        announce(
            f"training_step skips {counts['train']} training examples and {counts['queries']} queries when they are "
            "alone: their scores are 0.",
            show=self.show_progress,
        )
        return {"skipped": counts}

    def collect_scores(
        self, queries: AnyReader, chunks: Sequence[slice], tiles: Callable[[slice], Callable[[slice], Tensor]]
    ) -> Attribution | TopAttribution:
        """Scores of all processes' training examples for chunks of queries; with ``top_k`` the top of each query.

        ``tiles(chunk)`` is a function that returns the scores of some training examples, shape ``(chunk, columns)``.
        """
        mine = self.share.stop - self.share.start
        k = None if self.top_k is None else min(self.top_k, len(self.train_data))
        scores = torch.empty(len(queries), mine) if k is None else torch.empty(0)
        collectors: list[TopCollector] = []
        longest = -(-len(self.train_data) // world_size())
        for chunk in chunks:
            size, tile = chunk.stop - chunk.start, tiles(chunk)
            step = longest if k is None else max(1, TILE_BYTES // (4 * size))
            collectors.append(TopCollector(size, k or 1))
            # Every rank has the same number of tiles: with some curvatures all ranks solve together.
            for start in range(self.share.start, self.share.start + longest, step):
                places = slice(min(start, self.share.stop), min(start + step, self.share.stop))
                part = tile(places)
                if not torch.isfinite(part).all():
                    query, column = (~torch.isfinite(part)).nonzero()[0].tolist()
                    raise ValueError(
                        f"The score of query {queries.examples.name(chunk.start + query)} for training example "
                        f"{self.train_data.name(places.start + column)} is not finite: the gradient is too large for "
                        "the precision, or the curvature too small. Check the weights, or give a larger `damping=` (or "
                        "`ridge=`)."
                    )
                if k is None:
                    scores[chunk] = part.float().cpu()
                else:
                    collectors[-1].update(part, torch.arange(places.start, places.stop))
        about: dict[str, Any] = {
            "train_targets": self.reader.shown(),
            "query_targets": queries.shown(),
            "metadata": {"query_data": queries.fingerprint, **self._skipped(queries)},
        }
        if k is None:
            return Attribution(gather(scores, len(self.train_data), dim=1), **about)
        for collector in collectors:
            collector.gather()
        return TopAttribution(joined([collector.compute() for collector in collectors]), len(self.train_data), **about)
