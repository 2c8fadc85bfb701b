"""StrideAttributor: a fit, its answers about queries, and scores recovered from them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.attributor import Attributor
from stride_lightning.data.examples import Examples
from stride_lightning.data.objectives import Objective
from stride_lightning.data.sources import check_same_on_ranks, resolve_queries
from stride_lightning.model.layers import check_layers
from stride_lightning.results.attribution import Attribution
from stride_lightning.runtime.distributed import all_equal, broadcast_object, gather, leaving_together
from stride_lightning.runtime.progress import call
from stride_lightning.steering.dense import DenseFit
from stride_lightning.steering.fit import Answers, BasisName, Fit, FitOptions, ScoresName
from stride_lightning.steering.groups import remaining
from stride_lightning.steering.language.sequences import SequenceStride
from stride_lightning.steering.recovery import Recovery, recover
from stride_lightning.steering.subsets import NUM_SUBSETS, Design, default_num_subsets, sample_design
from stride_lightning.storage.lookup import choose_record, explain_mismatch
from stride_lightning.storage.records import Record
from stride_lightning.tasks.language import CausalLanguageModeling
from stride_lightning.tasks.likelihoods import Task


class StrideAttributor(Attributor):
    """STRIDE: steering operators imitate training on subsets; their effects on a query are turned into scores.

    A readout is refit from scratch on the network's features (:class:`~stride_lightning.readout.readout.Readout`), and
    the operator of a subset is the readout refit on that. Scores explain the loss of the readout; ``query_info`` holds
    its loss and prediction for each query beside those of the network. Of a language model, tokens are steered, at the
    model's own logits: :class:`~stride_lightning.steering.language.sequences.SequenceStride`.

    Args:
        num_subsets: Number of subsets K; by default that of the record, else 16, and with ``recovery="lasso"`` or
            ``"ridge"``, or a learned basis, 200 up to 10,000 examples, then 200 more for every factor of 10.
        degree: Subsets each example is in; by default ``K / 2`` while ``n K <= 1e8``, else 10.
        layers: Names of the modules whose inputs make the features. By default the input features and the input of each
            layer with a weight matrix, eight at most (five of a language model). With a learned basis of a language
            model, the one module whose input is steered.
        basis: ``"statistics"``, the readout; or ``"learned"`` as published.
        rank: Rank of a learned basis.
        recovery: ``"closed-form"``, the influence of each example on the readout, without any operator: the default.
            Or from the operators of subsets: ``"prior"``, which starts from that influence and is the default where
            ``num_subsets``, ``degree`` or ``basis`` is given; ``"lasso"`` as published; or ``"ridge"``.
        penalty: Of the lasso relative to its largest useful value, or of the ridge relative to the mean diagonal;
            by cross-validation over subsets by default.
        cache_dir: Folder for features that do not fit memory, which are folded to fewer without it; of language models,
            for the activations of training tokens, so that the model runs over them once and an interrupted run
            continues.
        seed: Seed of the design, where it is not read from a record, of a learned basis, and of standard deviations.
        batch_size: Examples per forward pass; of language models at most, where logits would take too much memory.
        show_progress: Show how far the work is and how much time is left.

    Memory beyond the model, for n training examples, r features (4096 at most if n is larger), ``k = min(n, r)``, C
    outputs, K subsets and q queries asked at once, is ``4 (n r + k^2 + k C K)`` bytes, and on top the larger of two:
    130 MB, or ``28 k^2`` if that is more, while the readout is fit; and, while it answers, ``4 s q n`` for scores
    (``s = 6`` where they are recovered from subsets, 1 with ``recovery="closed-form"``, 5 for standard deviations when
    they are read) with five blocks of ``4 n C c`` (32 MB each at most) and ``32 k C c`` (64 MB at most) for the
    ``c <= 64`` columns that are solved together. Models in double precision take twice that. Nothing is of size
    ``n K C`` or ``n`` times the model's parameters.

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
    task: Task

    def __init__(
        self,
        *,
        num_subsets: int | None = None,
        degree: int | None = None,
        layers: list[str] | None = None,
        basis: BasisName = "statistics",
        rank: int | None = None,
        recovery: ScoresName | None = None,
        penalty: float | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if basis not in get_args(BasisName):
            raise ValueError(f"`basis` must be one of {get_args(BasisName)}, got {basis!r}.")
        if recovery not in (None, *get_args(ScoresName)):
            raise ValueError(f"`recovery` must be one of {get_args(ScoresName)}, got {recovery!r}.")
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
        self.rank, self.penalty, self.cache_dir = rank, penalty, cache_dir
        self._given_recovery = recovery

    @property
    def recovery(self) -> str:
        """The recovery that was given; else with a prior where operators are asked for, and in closed form."""
        wants_operators = self.basis == "learned" or self.num_subsets is not None or self.degree is not None
        return self._given_recovery or ("prior" if wants_operators else "closed-form")

    @override
    def checked_task(self, objective: Objective, model: nn.Module) -> Task:
        return likelihood_of(objective, model)

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
            "record_note": note if start is None else f"{note}{missing_parts(start, self.task)}",
            **fit.metadata,
        }

    def _check_options(self) -> None:
        """Refuse options that would have no effect."""
        if self.measure is not None and (self.recovery != "closed-form" or self.task.has_tokens):
            raise ValueError(
                "STRIDE explains a `measure` by the closed form, for models with one row of outputs per example. Pass "
                "recovery='closed-form' without subsets, or use another method, such as 'ekfac'."
            )
        if self.recovery != "closed-form":
            return
        if self.basis == "learned":
            raise ValueError(
                "recovery='closed-form' fits no operators, so basis='learned' has no part in it. Pass "
                "recovery='prior', or leave out `basis`."
            )
        idle = [name for name in ("num_subsets", "degree") if getattr(self, name) is not None]
        if idle:
            raise ValueError(
                f"recovery='closed-form' fits no operators, so {', '.join(idle)} would have no effect. Leave out the "
                "option, or pass recovery='prior'."
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
        """The design of the record where it serves the recovery and the options, else a new one."""
        count = len(self.train_data)
        has_prior = self.recovery == "prior" and self.basis == "statistics"
        if record is not None and "design" in record.groups:
            design = Design.restore(record.info["design"], record.tensors("design"))
            # Without a prior, the few subsets that a callback draws by default say too little.
            serves = has_prior or design.num_subsets > NUM_SUBSETS
            is_wanted = serves if self.num_subsets is None else self.num_subsets == design.num_subsets
            if is_wanted and self.degree in (None, design.degree):
                return design
        wanted = self.num_subsets
        if wanted is None:
            wanted = NUM_SUBSETS if has_prior else default_num_subsets(count)
        return sample_design(count, wanted, self.degree, seed=self.seed)

    @override
    def score_queries(self, model: nn.Module, queries: Examples, device: torch.device, target: str) -> Attribution:
        started = time.perf_counter()
        answers = self.fitted.ask(queries, target)
        measured = time.perf_counter()
        recovered = self._recover(answers)
        parts = [
            None if part is None else part.float() for part in (recovered.scores, recovered.std, recovered.agreement)
        ]
        if answers.share is not None:
            parts = [None if part is None else gather(part, len(queries)) for part in parts]
        scores, std, factor = (None if part is None else part.cpu() for part in parts)
        assert scores is not None
        agree = answers.opinions.get("readout agrees")
        return Attribution(
            scores,
            std if answers.spread is None else replace(answers.spread, factor=factor, of_recovery=std),
            train_targets=self.fitted.train_targets,
            query_targets=answers.targets,
            query_info=answers.opinions,
            metadata={
                "recovered": broadcast_object(recovered.chosen),
                "query_data": answers.fingerprint,
                "attribute_seconds": {"measure": measured - started, "recover": time.perf_counter() - measured},
                "mean_query_loss": float(answers.losses.mean()),
            }
            | ({} if agree is None else {"agreement": {"agree": sum(agree), "queries": len(agree)}}),
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
            agreement = nothing[:, 0] if self.recovery == "prior" else None
            return Recovery(nothing, None if self.recovery == "lasso" else nothing, agreement=agreement)
        settings: dict[str, Any] = {"penalty": self.penalty, "seed": self.seed, "show_progress": self.show_progress}
        if self.recovery == "prior":
            return recover(measurements[share], self.design, "prior", answers.prior, **settings)
        # The ridge is one system for all queries, and the lasso solves queries in batches: every rank does all of them,
        # so that the number of ranks changes nothing.
        return recover(measurements, self.design, self.recovery, **settings).select(share)

    @override
    def score_training_data(self, model: nn.Module, device: torch.device) -> Tensor:
        effects = self.fitted.self_influence()
        return super().score_training_data(model, device) if effects is None else effects.cpu()

    def effect(
        self,
        queries: Any,
        groups: Sequence[Sequence[int]] | Tensor,
        *,
        action: Literal["remove"] = "remove",
        target: Literal["label", "predicted"] = "label",
    ) -> Tensor:
        """Effect of groups of training examples on queries; call :meth:`fit` before.

        The readout is refit without each group. That predicts retraining better than the sum of the scores: examples of
        a group may stand in for each other.

        Args:
            queries: As in :meth:`attribute`.
            groups: Positions in the training dataset of the members of each group, or bool of shape
                ``(num_groups, num_train)``.
            action: What happens to a group: ``"remove"`` leaves it out.
            target: As in :meth:`attribute`.

        Returns:
            Rise of the loss of each query, in the unit of the task's loss, float32 of shape
            ``(num_queries, num_groups)``; positive where the removal hurts.

        Raises:
            ValueError: If a group is all of the training data, or names an example that is not part of them.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
            >>> data = TensorDataset(x, x.sum(1))
            >>> attributor = StrideAttributor(show_progress=False).fit(nn.Linear(3, 1), data)
            >>> attributor.effect(TensorDataset(x[:2], x[:2].sum(1)), [[0, 1, 2], range(20)]).shape
            torch.Size([2, 2])
        """
        self.check_fitted("effect(queries, groups)")
        if self.measure is not None:
            raise ValueError("effect() tells effects on losses. Call fit() without `measure`.")
        if action != "remove":
            raise ValueError(f"`action` must be 'remove', got {action!r}.")
        if target not in ("label", "predicted"):
            raise ValueError(f"`target` must be 'label' or 'predicted', got {target!r}.")
        weights = remaining(groups, self.train_data.positions)
        with call(show=self.show_progress), leaving_together():
            examples = resolve_queries(queries, self.model, self.train_data, show=self.show_progress)
            check_same_on_ranks(examples)
            with self.borrowed_model():
                return self.fitted.effects(examples, target, weights).float().cpu()


def missing_parts(record: Record, task: Task) -> str:
    """What a record lacks, which is computed on the spot."""
    parts = (
        {"design": "design", "moments": "moments of tokens"}
        if task.has_tokens
        else {"design": "design", "statistics": "scales of features", "readout": "readout"}
    )
    missing = [words for group, words in parts.items() if group not in record.groups]
    return f"; it has no {' and no '.join(missing)}, so that was computed on the spot" if missing else ""


def likelihood_of(objective: Objective, model: nn.Module) -> Task:
    """The likelihood that stands for training; STRIDE is refused where there is none."""
    if isinstance(objective.task, Task):
        return objective.task
    raise ValueError(
        f"STRIDE needs a likelihood, and {type(model).__name__} was trained on {objective.reason}. Use another method, "
        "such as 'ekfac' or 'trak', which take any loss."
    )


def make_fit(task: Task, options: FitOptions) -> Fit:
    """The fit that a task needs."""
    if task.has_tokens and not isinstance(task, CausalLanguageModeling):
        raise ValueError(
            f"method='stride' has no readout for a {task.name}, whose examples have outputs at many places. Use a "
            "method that reads gradients, such as method='ekfac'."
        )
    return SequenceStride(task, options) if isinstance(task, CausalLanguageModeling) else DenseFit(task, options)
