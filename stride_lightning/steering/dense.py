"""STRIDE for examples with one row of outputs: one pass, a readout on its features, and operators on that."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.readout.features import FIRST_EXAMPLES, Observation, fit_features, observe
from stride_lightning.readout.network import default_layers
from stride_lightning.readout.preconditioner import MAX_WHOLE
from stride_lightning.readout.readout import Points, Readout
from stride_lightning.readout.solver import column_chunks
from stride_lightning.readout.spread import Spread
from stride_lightning.runtime.distributed import gather, shard
from stride_lightning.runtime.parallel import even_slices
from stride_lightning.runtime.progress import expect
from stride_lightning.steering.fit import Answers, FitOptions, FitRecord
from stride_lightning.steering.measures import measure_slopes
from stride_lightning.steering.module import StrideModule
from stride_lightning.steering.opinions import compare_predictions
from stride_lightning.steering.recovery import check_measurements, queries_per_system
from stride_lightning.steering.subsets import Design
from stride_lightning.storage.records import Record
from stride_lightning.tasks.likelihoods import Task


class DenseFit:
    """A :class:`~stride_lightning.steering.fit.Fit`: one pass over the training data, then a readout and operators."""

    module: StrideModule

    def __init__(self, task: Task, options: FitOptions) -> None:
        self.task, self._given, self.layers = task, options, options.layers or []
        self.options: dict[str, Any] = {"rank": options.known_rank} if options.basis == "learned" else {}
        self._settings: dict[str, Any] = {"batch_size": options.batch_size, "show_progress": options.show_progress}
        self.metadata: dict[str, Any] = {}
        self._has_recorded_scales = False

    def choose_layers(self, model: nn.Module, inputs: Any, size: int) -> list[str]:
        """The input features and the input of each layer with a weight matrix, eight at most."""
        return default_layers(model, self.task, inputs, size)

    def prepare(self, model: nn.Module, train: Examples, device: torch.device, record: Record | None = None) -> None:
        """One pass over the training set, at the scales of a record if there is one, else at those of the set."""
        started = time.perf_counter()
        self._model, self._settings["device"] = model, device
        if record is not None:
            self.layers = record.info["layers"]
        elif not self.layers:
            size = min(self._given.batch_size, FIRST_EXAMPLES, len(train))
            self.layers = self.choose_layers(model, self.task.inputs(first_batch(train, size, device)), size)
        scales = None if record is None else _part(record, "statistics", "scales")
        self._has_recorded_scales = scales is not None
        how = {**self._settings, "cache_dir": self._given.cache_dir, "scales": scales}
        self.features, self.train_pass = fit_features(model, self.task, train, self.layers, **how)
        before, self.task = self.task, self.task.scaled_to(self.train_pass.encoded)
        losses = self.train_pass.losses * (before.dispersion / self.task.dispersion)
        self.train_pass = replace(self.train_pass, losses=losses)
        self.fingerprint, self.losses = self.train_pass.fingerprint, self.train_pass.losses.cpu()
        self.train_targets = self.task.shown(self.train_pass.encoded)
        self._pass_seconds = time.perf_counter() - started

    def expect(self, design: Design | None, num_queries: int) -> None:
        """Tell the call in progress what phases will come, by typical numbers of iterations."""
        (n, r), c = self.train_pass.features.shape, self.train_pass.outputs.shape[1]
        smaller = min(n, r)
        product, whole = 4 * n * smaller * c, min(smaller * c, MAX_WHOLE)  # of one column
        expect("Readout", 1, 2 * n * r * smaller + 20 * smaller**3 + 2 * n * whole**2 + 300 * product)
        chunks = column_chunks(smaller, c, self.train_pass.features, num_queries)
        expect("Influence", len(chunks), 5 * product * num_queries / max(1, len(chunks)))
        if design is None:
            return
        k = design.num_subsets
        chunks = column_chunks(smaller, c, self.train_pass.features, k)
        expect("Operators", len(chunks), 20 * product * k / len(chunks))
        if self._given.recovery == "prior":
            systems = len(even_slices(num_queries, queries_per_system(k), self.train_pass.features.device))
            expect("Recovering scores", systems, 4 * n * k**2 * num_queries / max(1, systems))

    def fit(self, design: Design | None, record: Record | None = None) -> None:
        """Fit the readout, and the operators of a design if there is one; start from what a record has of them."""
        started, given = time.perf_counter(), self._given
        width = self.train_pass.features.shape[1]
        start = None if record is None else _part(record, "readout", "coefficients", width)
        operators = None
        if record is not None and design is not None and given.basis == "statistics":
            is_its = design.info() == record.info["design"]
            operators = _part(record, "operators", "coefficients", width) if is_its else None
        self.module = StrideModule(design, self.task, basis=given.basis, rank=given.known_rank, seed=given.seed)
        self.module.fit(self.train_pass, start=start, operators=operators, show_progress=given.show_progress)
        problem = self.readout.problem
        self.train_pass = replace(self.train_pass, features=problem.features)
        self.metadata |= {
            "readout": {
                "num_features": width,
                "num_coordinates": problem.shape[0],
                "noise_variance": None if problem.noise is None else problem.noise.tolist(),
                "scales_from_record": self._has_recorded_scales,
                "from_record": start is not None,
            },
            "operators": None
            if design is None
            else {"num_subsets": design.num_subsets, "from_record": operators is not None},
            "fit_seconds": {"pass": self._pass_seconds, "readout and operators": time.perf_counter() - started},
        }

    @property
    def readout(self) -> Readout:
        """The readout that the operators steer."""
        return self.module.readout

    def ask(self, queries: Examples, target: str = "label") -> Answers:
        """One pass over the queries; every rank measures a share of them and computes their influence."""
        observed, points = self._read(queries, target)
        share, given = shard(len(observed)), self._given
        part, mine = observed.select(share), points.select(share)
        measurements = observed.losses.new_empty(len(observed), 0)
        if self.module.design is not None:
            # Gathered at once, so that a choice made over all queries is the same on every rank.
            measurements = gather(self.module.measure(part, mine), len(observed))
            check_measurements(measurements, self.module.design)
        prior = None
        if given.recovery in ("prior", "closed-form"):
            prior = self.readout.influence(
                mine, self._residuals(queries, share, mine), show_progress=given.show_progress
            )
        return Answers(
            observed.losses,
            measurements,
            observed.fingerprint,
            self.task.shown(observed.encoded),
            share,
            prior,
            # A learned basis steers the network itself.
            compare_predictions(self.task, self.readout, observed, points) if given.basis == "statistics" else {},
            self._spread(points),
        )

    def _residuals(self, queries: Examples, share: slice, points: Points) -> tuple[Tensor, Tensor] | None:
        """Slopes of what is explained of a share of the queries, and residuals of the training examples."""
        if self._given.measure is None:
            return None
        part = queries.subset(range(len(queries))[share])
        how = {"batch_size": self._given.batch_size, "device": self._settings["device"]}
        outputs = self.readout.outputs(points.features)
        slopes = measure_slopes(self._given.measure, self._model, self.task, part, outputs, **how)
        return slopes.to(points.features), self.readout.residuals(self.readout.training_points)

    def _spread(self, points: Points) -> Spread | None:
        """The standard deviation of influence on losses; that on other measures is not known."""
        given = self._given
        if given.measure is not None or given.recovery not in ("prior", "closed-form"):
            return None
        return Spread(self.readout, points, seed=given.seed, show_progress=given.show_progress)

    def _read(self, queries: Examples, target: str) -> tuple[Observation, Points]:
        observed = observe(self._model, self.task, queries, self.features, target=target, **self._settings)
        return observed, self.readout.points(observed)

    def effects(self, queries: Examples, target: str, weights: Tensor) -> Tensor:
        """Rise of each query's loss when the readout is refit with weights ``(n, G)``, shape ``(q, G)``."""
        points, show = self._read(queries, target)[1], self._given.show_progress
        readout = self.readout.for_groups()
        return readout.rises(points, readout.refit(weights, "Groups", show_progress=show))

    def self_influence(self) -> Tensor:
        """Effect of every training example on its own loss, shape ``(n,)``."""
        return self.readout.self_influence(show_progress=self._given.show_progress)

    def record(self) -> FitRecord:
        """Scales and readout, and the operators if there are any."""
        outward = self.readout.coordinates.outward
        tensors = {
            "statistics": {"scales": self.features.scales},
            "readout": {"coefficients": outward(self.readout.coefficients)},
        }
        if self.module.design is not None:
            tensors["operators"] = {"coefficients": outward(self.module.operators)}
        return FitRecord(tensors)


def _part(record: Record, group: str, name: str, width: int | None = None) -> Tensor | None:
    """A tensor of a record, or None where the record has none, or one of other features."""
    values = record.tensors(group).get(name) if group in record.groups else None
    return None if values is None or (width is not None and len(values) != width) else values
