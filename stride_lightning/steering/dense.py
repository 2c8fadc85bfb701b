"""STRIDE for examples with one row of outputs: one evaluation pass, and operators on its features."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.model.layers import in_precision_of
from stride_lightning.runtime.distributed import gather, shard
from stride_lightning.runtime.parallel import even_slices
from stride_lightning.runtime.progress import expect
from stride_lightning.steering.basis import Basis, choose_layers, fit_basis, observe
from stride_lightning.steering.fit import Answers, FitOptions, FitRecord
from stride_lightning.steering.influence import QUERY_CHUNK
from stride_lightning.steering.module import StrideModule
from stride_lightning.steering.penalty import NUM_RIDGES
from stride_lightning.steering.recovery import check_measurements, queries_per_system
from stride_lightning.steering.solvers import MAX_CHUNK
from stride_lightning.steering.subsets import Design
from stride_lightning.storage.records import Record
from stride_lightning.tasks.likelihoods import Task


class DenseFit:
    """A :class:`~stride_lightning.steering.fit.Fit`: one pass over the training data, then operators of a design."""

    module: StrideModule | None = None

    def __init__(self, task: Task, options: FitOptions) -> None:
        self.task, self._given, self.layers = task, options, options.layers or []
        self.options: dict[str, Any] = {"stability": options.stability}
        if options.basis == "learned":
            self.options["rank"] = options.known_rank
        self._settings: dict[str, Any] = {"batch_size": options.batch_size, "show_progress": options.show_progress}
        self.metadata: dict[str, Any] = {}

    def choose_layers(self, model: nn.Module, inputs: Any, size: int) -> list[str]:
        """The input features and the input of each layer with a weight matrix, eight at most."""
        return choose_layers(model, lambda: self.task.outputs(model, inputs), size)

    def prepare(self, model: nn.Module, train: Examples, device: torch.device, record: Record | None = None) -> None:
        """One pass over the training set, in the basis of a record if there is one, else in a basis of its own."""
        started = time.perf_counter()
        self._model, self._settings["device"] = model, device
        if record is not None:
            self.layers = record.info["layers"]
            self.basis = Basis.from_tensors(self.layers, record.tensors("basis"))
            self.train_pass = observe(model, self.task, train, self.basis, **self._settings)
        else:
            if not self.layers:
                size = min(self._given.batch_size, 64, len(train))
                inputs = in_precision_of(model, self.task.inputs(first_batch(train, size, device)))
                self.layers = self.choose_layers(model, inputs, size)
            self.basis, self.train_pass = fit_basis(model, self.task, train, self.layers, **self._settings)
        self.fingerprint, self.losses = self.train_pass.fingerprint, self.train_pass.losses.cpu()
        self.train_targets = self.task.shown(self.train_pass.encoded)
        self._pass_seconds = time.perf_counter() - started

    def expect(self, design: Design | None, num_queries: int) -> None:
        """Tell the call in progress what phases will come, by typical numbers of iterations."""
        if design is None:
            return
        (n, r), c, k = self.train_pass.features.shape, self.train_pass.outputs.shape[1], design.num_subsets
        gradient, device = 4 * n * r * c, self.train_pass.features.device  # of one operator
        ridges = sum(len(even_slices(number, MAX_CHUNK, device)) for number in NUM_RIDGES)
        expect("Choosing the ridge", ridges, 40 * gradient * sum(NUM_RIDGES) / ridges)
        chunks = len(even_slices(k, MAX_CHUNK, device))
        expect("Fitting operators", chunks, 12 * gradient * k / chunks)
        if self._given.recovery == "prior":
            chunks = len(even_slices(num_queries, QUERY_CHUNK, device))
            expect("Influence", 2 * chunks, 15 * gradient * num_queries / max(1, chunks))
            chunks = len(even_slices(num_queries, queries_per_system(k), device))
            expect("Recovering scores", chunks, 4 * n * k**2 * num_queries / max(1, chunks))

    def fit(self, design: Design | None, record: Record | None = None) -> None:
        """Fit the operators of a design, or take those of a record if they are what the options ask for."""
        if design is None:
            return
        started = time.perf_counter()
        given = self._given
        options: dict[str, Any] = {name: getattr(given, name) for name in ("basis", "stability", "ridge", "seed")}
        self.module = module = StrideModule(design, self.task, rank=given.known_rank, **options)
        as_recorded = given.basis == "statistics" and given.stability == 0 and given.ridge is None
        stored = record is not None and "operators" in record.groups and as_recorded
        if record is not None and stored:
            module.restore(record.info["operators"], record.tensors("operators"), self._settings["device"])
        else:
            module.fit_operators(self.train_pass, show_progress=given.show_progress)
        self._train_mean = module.mean_prediction(self.train_pass) if given.recovery == "prior" else None
        self.metadata |= {
            "operators": {**module.chosen, "from_record": stored},
            "num_features": self.train_pass.features.shape[1],
            "fit_seconds": {"pass": self._pass_seconds, "operators": time.perf_counter() - started},
        }

    def ask(self, queries: Examples, target: str = "label") -> Answers:
        """One pass over the queries; every rank measures a share of them and finds their priors."""
        assert self.module is not None
        observed = observe(self._model, self.task, queries, self.basis, target=target, **self._settings)
        share = shard(len(observed))
        part = observed.select(share)
        # Gathered at once, so that a choice made over all queries is the same on every rank.
        measurements = gather(self.module.measure(part), len(observed))
        check_measurements(measurements, self.module.design)
        priors: tuple[Tensor, ...] = ()
        if self._train_mean is not None and len(part):
            how = {"show_progress": self._given.show_progress}
            priors = self.module.priors(self.train_pass, part, self._train_mean, **how)
        targets = self.task.shown(observed.encoded)
        return Answers(observed.losses, measurements, observed.fingerprint, targets, share, *priors)

    def record(self) -> FitRecord:
        """The basis, and the operators if there are any."""
        basis, module = {"basis": self.basis.tensors()}, self.module
        if module is None:
            return FitRecord(basis)
        return FitRecord(basis | {"operators": module.tensors()}, {"operators": module.info()})
