"""STRIDE for examples with one row of outputs: one evaluation pass, and operators on its features."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.model.layers import in_precision_of
from stride_lightning.runtime.distributed import gather, shard
from stride_lightning.runtime.parallel import num_workers
from stride_lightning.steering.basis import Basis, Observation, choose_layers, fit_basis, observe
from stride_lightning.steering.fit import Answers, Cost, FitOptions, FitRecord
from stride_lightning.steering.module import StrideModule
from stride_lightning.steering.recovery import check_measurements
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

    def estimate(self, design: Design | None) -> DenseCost:
        """What the operators of a design will take, and queries after them."""
        assert design is not None
        cost = estimate_cost(self.train_pass, design.num_subsets, self._given.recovery)
        self.metadata["estimate"] = vars(cost)
        return cost

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


@dataclass(frozen=True)
class DenseCost(Cost):
    """The same with the seconds of a query; the disk is for operators, if they are recorded."""

    seconds_per_query: float

    @property
    def is_long(self) -> bool:
        """Whether someone will wait: seconds for the fit, or for a hundred queries."""
        return super().is_long or 100 * self.seconds_per_query > 2

    def __str__(self) -> str:
        memory, disk = self.memory_bytes / 2**20, self.disk_bytes / 2**20
        seconds = f"about {self.seconds:.0f} s to fit and {self.seconds_per_query:.1g} s per query"
        return f"{seconds}, {memory:.0f} MiB of memory, {disk:.0f} MiB if the operators are saved"


def estimate_cost(observed: Observation, num_subsets: int, recovery: str) -> DenseCost:
    """Estimate the cost of a fit from its arithmetic and this machine's measured speed of a matrix product.

    Memory: ``4 (2 n r + n (3 C + 1) + C r K) + t (2304 C r + 64 n)`` bytes and 200 MB of blocks for each of t threads;
    queries come on top.
    """
    (n, r), c, k = observed.features.shape, observed.outputs.shape[1], num_subsets
    probe, started = observed.features[:512, :512], time.perf_counter()
    for _ in range(4):
        float((probe @ probe.T)[0, 0])
    rate = 8 * len(probe) * probe.numel() / max(time.perf_counter() - started, 1e-9)
    products = 25 * k + 300 + (k if recovery == "prior" else 0)  # gradients, the search for a ridge, the mean
    threads = num_workers(observed.features.device)
    memory = 4 * (2 * n * r + n * (3 * c + 1) + c * r * k) + threads * (2304 * c * r + 64 * n + 200 * 2**20)
    # Two conjugate gradient solves of some fifteen products each, and a system with its variances; or, with the lasso,
    # five folds and eleven penalties of a hundred iterations, which wait for memory more than they compute.
    prior, lasso = 30.0 * 4 * n * r * c + 4.0 * n * k**2, 5 * 5 * 11 * 100.0 * 4 * k * min(n, 2 * k)
    per_query = {"prior": prior, "lasso": lasso, "ridge": 4.0 * n * k}[recovery] / rate
    return DenseCost(4.0 * n * r * c * products / rate, memory, 4 * c * r * k + 4 * r * r + n * k // 8, per_query)
