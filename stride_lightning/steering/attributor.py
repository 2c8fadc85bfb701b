"""StrideAttributor: a fit, its answers about queries, and scores recovered from them."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn
from typing_extensions import override

from stride_lightning.attributor import Attributor
from stride_lightning.data.examples import Examples
from stride_lightning.model.layers import check_layers
from stride_lightning.results.attribution import Attribution
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import all_equal, broadcast_object, gather
from stride_lightning.steering.dense import DenseFit
from stride_lightning.steering.fit import Answers, BasisName, Fit, FitOptions
from stride_lightning.steering.language.sequences import SequenceStride
from stride_lightning.steering.recovery import Recovery, RecoveryName, recover
from stride_lightning.steering.subsets import Design, sample_design
from stride_lightning.storage.lookup import choose_record, explain_mismatch
from stride_lightning.storage.records import Record
from stride_lightning.tasks.language import CausalLanguageModeling
from stride_lightning.tasks.likelihoods import Task

LanguageRecoveryName = Literal["prior", "lasso", "ridge", "closed-form"]


class StrideAttributor(Attributor):
    """STRIDE: steering operators imitate training on subsets; their effects on a query are turned into scores.

    Of a language model, tokens are steered: the defaults are then those of :class:`LanguageStrideAttributor`, which
    has options of its own besides.

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
        ridge: Penalty of the operators relative to the mean curvature; read off the data by default.
        recovery: ``"prior"``, ``"lasso"`` as published, or ``"ridge"``.
        penalty: Of the lasso relative to its largest useful value, or of the ridge relative to the mean diagonal;
            by cross-validation over subsets by default.
        seed: Seed of the design, where it is not read from a record, and of a learned basis.
        batch_size: Examples per forward pass; of language models at most, where logits would take too much memory.
        show_progress: Show how far the work is and how much time is left.

    Memory beyond the model, for n training examples, r features, C outputs, K subsets and q queries asked at once, is
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
    #: Values of ``recovery``.
    recoveries: ClassVar[tuple[str, ...]] = get_args(RecoveryName)
    # Options of language models, see LanguageStrideAttributor.
    steps: int = 1
    cache_dir: str | Path | None = None

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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if basis not in get_args(BasisName):
            raise ValueError(f"`basis` must be one of {get_args(BasisName)}, got {basis!r}.")
        if recovery not in (None, *self.recoveries):
            raise ValueError(f"`recovery` must be one of {self.recoveries}, got {recovery!r}.")
        check_layers(layers)
        if penalty is not None and recovery not in ("lasso", "ridge"):
            raise ValueError(
                f"`penalty` belongs to recovery='lasso' or 'ridge'; recovery={recovery!r} has none. Pass one of these "
                "two, or leave out `penalty`."
            )
        if rank is not None and basis != "learned":
            raise ValueError(
                "`rank` belongs to basis='learned'; the statistics basis keeps all its features. Pass basis='learned', "
                "or leave out `rank`."
            )
        self.num_subsets, self.degree, self.layers = num_subsets, degree, layers
        self.basis: BasisName = basis
        self.rank, self.ridge, self.penalty = rank, ridge, penalty
        self._given_recovery, self._given_stability = recovery, stability

    @property
    def recovery(self) -> str:
        """The recovery that was given, or the default of the task."""
        if self._given_recovery is not None:
            return self._given_recovery
        if not hasattr(self, "task"):
            raise RuntimeError(
                "Call fit(model, train_data) before reading `recovery` or `stability`: their defaults depend on the "
                "task."
            )
        return "closed-form" if self.task.has_tokens and self.basis == "statistics" else "prior"

    @property
    def stability(self) -> float:
        """What was given; recovery with a prior wants what retraining gives, the others published operators."""
        return float(self.recovery != "prior") if self._given_stability is None else self._given_stability

    @override
    def fit_model(self, model: nn.Module, device: torch.device, record: str | Path | None, checkpoint: Any) -> None:
        self._check_options()
        start, note = choose_record(record, checkpoint, model, self.weights, self._options_of_records())
        if not all_equal(None if start is None else dict(start.checksums)):
            # They would go separate ways, and wait for each other forever.
            start, note = None, "the ranks have different records; computed on the spot"
        fit = self._prepared(model, device, start)
        if start is not None:
            how = {"is_explicit": record is not None}
            mismatch = explain_mismatch(start, fit.fingerprint, repr(self.task), **how)
            if mismatch is not None:
                start, note = None, mismatch
                fit = self._prepared(model, device, None)
        design = None if self.recovery == "closed-form" else self._choose_design(start)
        fit.expect(design, self.expected_queries)
        fit.fit(design, start)
        #: The fit to the training data.
        self.fitted, self.design = fit, design
        self.metadata |= {
            "options": {"layers": list(fit.layers), "basis": self.basis, "recovery": self.recovery, **fit.options},
            "design": None if design is None else design.info(),
            "data": fit.fingerprint,
            "record": None if start is None else str(start.path),
            "record_note": note,
            **fit.metadata,
        }

    def _check_options(self) -> None:
        """Refuse options that are for another kind of task, or would have no effect."""
        in_closed_form, has_steps = self.recovery == "closed-form", self.steps != 1
        if not self.task.has_tokens and (in_closed_form or has_steps or self.cache_dir is not None):
            raise ValueError(
                "recovery='closed-form', `steps` and `cache_dir` are for language models; the task is "
                f"{self.task!r}. Leave them out."
            )
        if not in_closed_form:
            return
        if self.basis == "learned":
            raise ValueError(
                "recovery='closed-form' fits no operators, so basis='learned' has no part in it. Pass "
                "recovery='prior', or leave out `basis`."
            )
        given = {"num_subsets": self.num_subsets, "degree": self.degree, "stability": self._given_stability}
        idle = [name for name, value in given.items() if value is not None] + ["steps"] * has_steps
        if idle:
            raise ValueError(
                f"recovery='closed-form', the default of language models, fits no operators, so {', '.join(idle)} "
                "would have no effect. Leave out the option, or pass recovery='prior'."
            )

    def _options_of_records(self) -> dict[str, Any]:
        """Options that a record must agree with, where they were given; one of a language model serves any design."""
        if self.task.has_tokens:
            return {"layers": None if self.basis == "learned" else self.layers}
        return {"layers": self.layers, "num_subsets": self.num_subsets, "degree": self.degree}

    def _prepared(self, model: nn.Module, device: torch.device, record: Record | None) -> Fit:
        options = {option.name: getattr(self, option.name) for option in fields(FitOptions)}
        fit = make_fit(self.task, FitOptions(**options))
        fit.prepare(model, self.train_data, device, record)
        return fit

    def _choose_design(self, record: Record | None) -> Design:
        if record is not None:
            design = Design.restore(record.info["design"], record.tensors("design"))
            if self.num_subsets in (None, design.num_subsets) and self.degree in (None, design.degree):
                return design
        return sample_design(len(self.train_data), self.num_subsets, self.degree, seed=self.seed)

    @override
    def score_queries(self, model: nn.Module, queries: Examples, device: torch.device, target: str) -> Attribution:
        started = time.perf_counter()
        answers = self.fitted.ask(queries, target)
        measured = time.perf_counter()
        recovered = self._recover(answers)
        parts = [part.float() for part in (recovered.scores, recovered.std) if part is not None]
        if answers.share is not None:
            parts = [gather(part, len(queries)) for part in parts]
        return Attribution(
            *(part.cpu() for part in parts),
            train_targets=self.fitted.train_targets,
            query_targets=answers.targets,
            metadata={
                "recovered": broadcast_object(recovered.chosen),
                "query_data": answers.fingerprint,
                "attribute_seconds": {"measure": measured - started, "recover": time.perf_counter() - measured},
                "mean_query_loss": float(answers.losses.mean()),
            },
        )

    def _recover(self, answers: Answers) -> Recovery:
        """Scores of this rank's share of the queries, from the measurements of all."""
        share = answers.share or slice(None)
        if self.design is None:
            assert answers.prior is not None
            return Recovery(answers.prior)
        measurements = answers.measurements
        if not len(measurements[share]):
            nothing = measurements.new_empty(0, self.design.num_train)
            return Recovery(nothing, None if self.recovery == "lasso" else nothing)
        settings: dict[str, Any] = {"penalty": self.penalty, "seed": self.seed, "show_progress": self.show_progress}
        if self.recovery == "prior":
            priors = answers.prior, answers.second_opinion
            return recover(measurements[share], self.design, "prior", *priors, **settings)
        # The ridge is one system for all queries, and the lasso solves queries in batches: every rank does all of them,
        # so that the number of ranks changes nothing.
        return recover(measurements, self.design, self.recovery, **settings).select(share)


class LanguageStrideAttributor(StrideAttributor):
    """STRIDE with the options of language models; what ``attribute(method="stride")`` makes, whatever the task.

    :class:`~stride_lightning.steering.language.sequences.SequenceStride` says what it computes and what memory it
    takes. If the task turns out not to be of a language model, it works as :class:`StrideAttributor` does, and its own
    options are refused.

    Args:
        steps: Steps of each operator towards its optimum; 1 is Newton's, in closed form.
        cache_dir: Folder for the activations of training tokens, ``4 (r + c + 1)`` bytes each, so that the model runs
            over them once and an interrupted run goes on; by default they are computed again.
        recovery: As there, or ``"closed-form"``, the influence that operators have on average, without fitting any,
            which is the default of language models.
        **kwargs: As there; ``ridge`` is the damping of the features' second moment, by default .1.

    Reference: arXiv:2606.05165 (STRIDE).
    """

    method = "stride"  # takes the name over: its options are those of both
    recoveries = get_args(LanguageRecoveryName)

    def __init__(
        self,
        *,
        steps: int = 1,
        cache_dir: str | Path | None = None,
        recovery: LanguageRecoveryName | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(recovery=recovery, **kwargs)  # pyright: ignore[reportArgumentType]  # one more value
        check_count("steps", steps)
        self.steps, self.cache_dir = steps, cache_dir


def make_fit(task: Task, options: FitOptions) -> Fit:
    """The fit that a task needs."""
    return SequenceStride(task, options) if isinstance(task, CausalLanguageModeling) else DenseFit(task, options)
