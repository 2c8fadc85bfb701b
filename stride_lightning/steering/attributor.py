"""StrideAttributor: design, operators, measurements and recovery put together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.attributor import Attributor
from stride_lightning.data.examples import Examples, first_batch
from stride_lightning.model.layers import check_layers, in_precision_of
from stride_lightning.results.attribution import Attribution
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import all_equal, broadcast_object, gather, shard
from stride_lightning.runtime.parallel import num_workers
from stride_lightning.runtime.progress import announce
from stride_lightning.steering.activations import choose_layers
from stride_lightning.steering.basis import Basis, Observation, fit_basis, observe
from stride_lightning.steering.language.attribution import attribute_sequences, fitted_sequences
from stride_lightning.steering.lasso import cross_validate_penalty, solve_lasso
from stride_lightning.steering.module import BasisName, StrideModule
from stride_lightning.steering.recovery import Recovery, check_measurements, recover_ridge, recover_with_prior
from stride_lightning.steering.subsets import Design, sample_design
from stride_lightning.storage.lookup import choose_record, explain_mismatch

RecoveryName = Literal["prior", "lasso", "ridge", "closed-form"]


class StrideAttributor(Attributor):
    """STRIDE: steering operators imitate training on subsets; their effects on a query are turned into scores.

    Args:
        num_subsets: Number of subsets K; by default 200 up to 10,000 examples, then 200 more for every factor of 10.
        degree: Subsets each example is in; by default ``K / 2`` while ``n K <= 1e8``, else 10.
        layers: Names of the modules whose inputs make the basis. By default the input features and the input of each
            layer with a weight matrix, eight at most (five of a language model). With a learned basis of a language
            model, the one module whose input is steered.
        basis: ``"statistics"``, or ``"learned"`` as published.
        rank: Rank of a learned basis.
        stability: Weight of the stability term, which ties operators to the frozen model outside their subset (see
            :class:`~stride_lightning.steering.module.StrideModule`); by default 0 with ``recovery="prior"``, where
            operators are refits of the readouts, else 1 as published.
        ridge: Penalty of the operators relative to the mean curvature; read off the data by default. Of language
            models, the damping of the features' second moment, by default .1.
        recovery: ``"prior"``, ``"lasso"`` as published, or ``"ridge"``; of language models also ``"closed-form"``, the
            influence that operators have on average, without fitting any, which is their default.
        penalty: Of the lasso relative to its largest useful value, or of the ridge relative to the mean diagonal;
            by cross-validation over subsets by default.
        steps: Of language models: steps of each operator towards its optimum; 1 is Newton's, in closed form.
        cache_dir: Of language models: folder for the activations of training tokens, ``4 (r + c + 1)`` bytes each, so
            that the model runs over them once and an interrupted run goes on; by default they are computed again.
        seed: Seed of the design, where it is not read from a record, and of a learned basis.
        batch_size: Examples per forward pass; of language models at most, where logits would take too much memory.
        show_progress: Show progress bars, and a cost estimate before long work.

    Language models are attributed by :class:`~stride_lightning.steering.language.sequences.SequenceStride`, which says
    what it computes and what memory it takes. Otherwise, memory beyond the model, for n training examples, r features,
    C outputs, K subsets and q queries asked at once, is
    ``4 (2 n r + n (3 C + 1) + C r K + 8 q n) + t (2304 C r + 64 n)`` bytes and 200 MB of blocks for each of t threads.
    Nothing is of size ``n K C`` or ``n`` times the model's parameters.

    Example:
        Fit once, ask as often as you like:

        >>> from torch.utils.data import TensorDataset
        >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> data = TensorDataset(x, x.sum(1))
        >>> attributor = StrideAttributor(num_subsets=16, show_progress=False).fit(nn.Linear(3, 1), data)
        >>> len(attributor.attribute(data)), len(attributor.attribute(TensorDataset(x[:2], x[:2].sum(1))))
        (40, 2)

    Reference: arXiv:2606.05165 (STRIDE).
    """

    method = "stride"

    def __init__(
        self,
        *,
        num_subsets: int | None = None,
        degree: int | None = None,
        layers: list[str] | None = None,
        basis: BasisName = "statistics",
        rank: int | None = None,
        stability: float | None = None,
        ridge: float | None = None,
        recovery: RecoveryName | None = None,
        penalty: float | None = None,
        steps: int = 1,
        cache_dir: str | Path | None = None,
        seed: int = 0,
        batch_size: int = 256,
        show_progress: bool = True,
    ) -> None:
        super().__init__(seed=seed, batch_size=batch_size, show_progress=show_progress)
        if basis not in get_args(BasisName):
            raise ValueError(f"`basis` must be one of {get_args(BasisName)}, got {basis!r}.")
        if recovery not in (None, *get_args(RecoveryName)):
            raise ValueError(f"`recovery` must be one of {get_args(RecoveryName)}, got {recovery!r}.")
        check_layers(layers)
        if penalty is not None and recovery not in ("lasso", "ridge"):
            raise ValueError(f"`penalty` belongs to recovery='lasso' or 'ridge'; recovery={recovery!r} has none.")
        check_count("steps", steps)
        if rank is not None and basis != "learned":
            raise ValueError("`rank` belongs to basis='learned'; the statistics basis keeps all its features.")
        self.num_subsets, self.degree, self.layers = num_subsets, degree, layers
        self.basis: BasisName = basis
        self.rank, self.ridge = rank, ridge
        self._recovery_asked: RecoveryName | None = recovery
        self._stability_asked, self.penalty = stability, penalty
        self.steps, self.cache_dir = steps, cache_dir

    # ---- fit ------------------------------------------------------------------------------------------------

    @override
    def fit_model(self, model: nn.Module, device: torch.device, record: str | Path | None, checkpoint: Any) -> None:
        started = time.perf_counter()
        self._sequences = fitted_sequences(self, model, device, record, checkpoint) if self.task.has_tokens else None
        if self._sequences is not None:
            return
        self._check_options()
        self._start_from_record(model, device, record, checkpoint)
        self._choose_design()
        cost = estimate_cost(self._train_pass, self.design.num_subsets, self.recovery)
        announce(f"STRIDE: {cost}", show=self.show_progress and cost.is_long)
        passed = time.perf_counter()
        self.module = StrideModule(
            self.design,
            self.task,
            basis=self.basis,
            rank=self.rank or 16,
            stability=self.stability,
            ridge=self.ridge,
            seed=self.seed,
        )
        stored = self._record is not None and "operators" in self._record.groups and self._takes_operators()
        if stored:
            assert self._record is not None
            self.module.restore(self._record.info["operators"], self._record.tensors("operators"), device)
        else:
            self.module.fit_operators(self._train_pass, show_progress=self.show_progress)
        self._train_mean = self.module.mean_prediction(self._train_pass) if self.recovery == "prior" else None
        self.metadata |= {
            "options": {
                "layers": list(self._basis.layers),
                "basis": self.basis,
                "recovery": self.recovery,
                "stability": self.module.stability,
                **({"rank": self.module.rank} if self.basis == "learned" else {}),
            },
            "design": self.design.info(),
            "data": self._train_pass.fingerprint,
            "record": None if self._record is None else str(self._record.path),
            "record_note": self._record_note,
            "operators": {**self.module.chosen, "from_record": stored},
            "num_features": self._train_pass.features.shape[1],
            "estimate": vars(cost),
            "fit_seconds": {"pass": passed - started, "operators": time.perf_counter() - passed},
        }

    @property
    def recovery(self) -> RecoveryName:
        """What was asked for, or the default of the task."""
        if self._recovery_asked is not None:
            return self._recovery_asked
        return "closed-form" if self.task.has_tokens and self.basis == "statistics" else "prior"

    @property
    def stability(self) -> float:
        """What was asked for; recovery with a prior wants what retraining gives, the others published operators."""
        return float(self.recovery != "prior") if self._stability_asked is None else self._stability_asked

    def _check_options(self) -> None:
        if self.recovery == "closed-form" or self.steps != 1 or self.cache_dir is not None:
            raise ValueError(
                "recovery='closed-form', `steps` and `cache_dir` are for language models; the task is "
                f"{self.task!r}. Leave them out."
            )

    def _start_from_record(
        self,
        model: nn.Module,
        device: torch.device,
        explicit: str | Path | None,
        checkpoint: Any,
    ) -> None:
        """One pass over the training set, in the basis of a record if one fits, else in a basis of its own."""
        settings: dict[str, Any] = {
            "batch_size": self.batch_size,
            "device": device,
            "show_progress": self.show_progress,
        }
        self.find_record(model, explicit, checkpoint)
        if self._record is not None:
            layers = self._record.info["layers"]
            self._basis = Basis.from_tensors(layers, self._record.tensors("basis"))
            self._train_pass = observe(model, self.task, self.train_data, self._basis, **settings)
            if self.keeps_record(self._train_pass.fingerprint, explicit):
                return
        layers = self.layers
        if layers is None:
            size = min(self.batch_size, 64, len(self.train_data))
            inputs = in_precision_of(model, self.task.inputs(first_batch(self.train_data, size, device)))
            layers = choose_layers(model, lambda: self.task.outputs(model, inputs), size)
        self._basis, self._train_pass = fit_basis(model, self.task, self.train_data, layers, **settings)

    def find_record(self, model: nn.Module, explicit: str | Path | None, checkpoint: Any) -> None:
        """Choose the record to start from, the same on every rank."""
        self._record, self._record_note = choose_record(explicit, checkpoint, model, self.weights, self._asked())
        if not all_equal(None if self._record is None else dict(self._record.checksums)):
            # They would go separate ways, and wait for each other forever.
            self._record, self._record_note = None, "not every rank found the same record; computed on the spot"

    def keeps_record(self, fingerprint: dict[str, Any], explicit: str | Path | None) -> bool:
        """Whether the record is of this data and task; one that the caller named is refused if not, others dropped."""
        assert self._record is not None
        note = explain_mismatch(self._record, fingerprint, repr(self.task))
        if note is None:
            return True
        if explicit is not None:
            raise ValueError(note)
        self._record, self._record_note = None, note
        return False

    def _asked(self) -> dict[str, Any]:
        """Options that a record must agree with, where they were given."""
        layers = None if self.layers is None else list(self.layers)
        if self.task.has_tokens:  # whose record serves any design
            return {"layers": None if self.basis == "learned" else layers}
        return {"layers": layers, "num_subsets": self.num_subsets, "degree": self.degree}

    def _choose_design(self) -> None:
        if self._record is not None:
            self.design = Design.restore(self._record.info["design"], self._record.tensors("design"))
        else:
            self.design = sample_design(len(self.train_data), self.num_subsets, self.degree, seed=self.seed)

    def _takes_operators(self) -> bool:
        """Whether a record's operators are what these options ask for."""
        return self.basis == "statistics" and self.stability == 0 and self.ridge is None

    # ---- attribute ------------------------------------------------------------------------------------------

    @override
    def score_queries(self, model: nn.Module, queries: Examples, device: torch.device, target: str) -> Attribution:
        if self._sequences is not None:
            return attribute_sequences(self, self._sequences, queries, target)
        asked = observe(
            model,
            self.task,
            queries,
            self._basis,
            batch_size=self.batch_size,
            device=device,
            target=target,
            show_progress=self.show_progress,
        )
        # Every rank recovers a share of the queries.
        share = shard(len(asked))
        mine = asked.select(share)
        started = time.perf_counter()
        # Gathered at once, so that a choice made over all queries is the same on every rank.
        measurements = gather(self.module.measure(mine), len(asked))
        check_measurements(measurements, self.design)
        measured = time.perf_counter()
        nothing = Recovery(measurements.new_empty(0, len(self.train_data)))
        recovered = self._recover(mine, measurements, share) if len(mine) else nothing
        scores = gather(recovered.scores.float(), len(asked))
        has_std = self.recovery != "lasso"
        std = recovered.std if recovered.std is not None else recovered.scores
        return Attribution(
            scores.cpu(),
            gather(std.float(), len(asked)).cpu() if has_std else None,
            train_targets=self.task.shown(self._train_pass.encoded),
            query_targets=self.task.shown(asked.encoded),
            metadata={
                "recovered": broadcast_object(recovered.chosen),
                "query_data": asked.fingerprint,
                "attribute_seconds": {"measure": measured - started, "recover": time.perf_counter() - measured},
                "mean_query_loss": float(asked.losses.mean()),
            },
        )

    def recover_whole(self, measurements: Tensor, design: Design) -> Recovery:
        """Scores of all queries by the lasso or the ridge.

        The ridge is one system for all queries, and the lasso solves queries in batches: every rank does them whole, so
        that the number of ranks changes nothing.
        """
        if self.recovery == "ridge":
            return recover_ridge(measurements, design, penalty=self.penalty, show_progress=self.show_progress)
        penalty: float | Tensor | None = self.penalty
        if penalty is None:
            penalty = cross_validate_penalty(measurements, design, seed=self.seed, show_progress=self.show_progress)
        solution = solve_lasso(measurements, design, penalty, show_progress=self.show_progress)
        chosen = {
            "penalty": float(torch.as_tensor(penalty).median()),
            "duality_gap_max": float(solution.gap.max()),
            "nonzeros_mean": float((solution.scores != 0).sum(1).float().mean()),
        }
        return Recovery(solution.scores, None, chosen)

    def _recover(self, queries: Observation, everything: Tensor, share: slice) -> Recovery:
        """Scores of this rank's share of the queries, from the measurements of all."""
        if self.recovery != "prior":
            return self.recover_whole(everything, self.design).select(share)
        assert self._train_mean is not None
        prior, second = self.module.priors(
            self._train_pass, queries, self._train_mean, show_progress=self.show_progress
        )
        return recover_with_prior(everything[share], self.design, prior, second, show_progress=self.show_progress)


@dataclass(frozen=True)
class Cost:
    """What attribution is expected to take: seconds, peak bytes of memory, bytes on disk if operators are recorded."""

    seconds: float
    seconds_per_query: float
    memory_bytes: int
    disk_bytes: int

    @property
    def is_long(self) -> bool:
        """Whether someone will wait: seconds for the fit, or for a hundred queries."""
        return self.seconds > 2 or 100 * self.seconds_per_query > 2

    def __str__(self) -> str:
        return (
            f"about {self.seconds:.0f} s to fit and {self.seconds_per_query:.1g} s per query, "
            f"{self.memory_bytes / 2**20:.0f} MiB of memory, "
            f"{self.disk_bytes / 2**20:.0f} MiB if the operators are saved"
        )


def estimate_cost(observed: Observation, num_subsets: int, recovery: str) -> Cost:
    """Estimate the cost of a fit from its arithmetic and this machine's measured speed of a matrix product.

    Memory: ``4 (2 n r + n (3 C + 1) + C r K) + t (2304 C r + 64 n)`` bytes and 200 MB of blocks for each of t threads;
    queries come on top.
    """
    (n, r), c, k = observed.features.shape, observed.outputs.shape[1], num_subsets
    probe = observed.features[:512, :512]
    started = time.perf_counter()
    for _ in range(4):
        float((probe @ probe.T)[0, 0])
    rate = 8 * probe.shape[0] ** 2 * probe.shape[1] / max(time.perf_counter() - started, 1e-9)
    products = 25 * k + 300 + (k if recovery == "prior" else 0)  # gradients, the search for a ridge, the mean
    threads = num_workers(observed.features.device)
    memory = 4 * (2 * n * r + n * (3 * c + 1) + c * r * k) + threads * (2304 * c * r + 64 * n + 200 * 2**20)
    # Two conjugate gradient solves of some fifteen products each, and a system with its variances; or, with the lasso,
    # five folds and eleven penalties of a hundred iterations, which wait for memory more than they compute.
    prior, lasso = 30.0 * 4 * n * r * c + 4.0 * n * k**2, 5 * 5 * 11 * 100.0 * 4 * k * min(n, 2 * k)
    per_query = {"prior": prior, "lasso": lasso, "ridge": 4.0 * n * k}[recovery] / rate
    return Cost(4.0 * n * r * c * products / rate, per_query, memory, 4 * c * r * k + 4 * r * r + n * k // 8)
