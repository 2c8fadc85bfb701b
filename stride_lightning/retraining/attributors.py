"""The gold standards as methods of attribute(): "further-training" and "retraining"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from stride_lightning.attributor import Attributor
from stride_lightning.data.examples import Examples, first_look
from stride_lightning.data.reading import survey
from stride_lightning.results.attribution import Attribution
from stride_lightning.retraining.effects import FurtherTraining
from stride_lightning.retraining.further_training import find_left_out, measure_effects
from stride_lightning.retraining.ground_truth import GroundTruth
from stride_lightning.retraining.leaving_out import LeavingOut
from stride_lightning.retraining.optimizers import MakeOptimizer
from stride_lightning.retraining.query_values import reader_of
from stride_lightning.retraining.retrain import retrain
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import all_equal
from stride_lightning.steering.attributor import StrideAttributor
from stride_lightning.steering.recovery import RecoveryName, recover
from stride_lightning.steering.subsets import Design
from stride_lightning.storage.lookup import choose_record, explain_mismatch
from stride_lightning.tasks.likelihoods import Task
from stride_lightning.tasks.measures import functions_of, in_words, measure_info, measure_of
from stride_lightning.tasks.own_loss import FunctionLoss

_NO_BATCH_SIZE = (
    "Training needs a batch size, and `train_data` does not give one. Pass a DataLoader with a batch_size, or "
    "`train_batch_size=`."
)


class FurtherTrainingAttributor(Attributor):
    """Trains the final model further without each example, and scores the example by the effect on each query.

    The gold standard of attribution to a final model: it approximates nothing, and costs a short training run for each
    example and seed. If :class:`~stride_lightning.FurtherTrainingCallback` left a record of these weights, data and
    queries with the same options, the record is used.

    Args:
        left_out: Positions in the training dataset of the examples to score; by default those of the record, else all.
        epochs: Epochs of further training; by default the record's largest number, else 1.
        num_seeds: Number of orders of batches to average over, by default the record's, else 5. The attribution's
            ``std`` is the standard error over them.
        optimizer: Function that makes the optimizer of a model's parameters; by default the model's
            ``configure_optimizers``, without its schedule.
        train_batch_size: Examples of a training batch; by default that of the training DataLoader.
        memory_budget: Bytes for the copies that train together.
        **kwargs: As in :class:`~stride_lightning.Attributor`; ``seed`` is the first of the seeds.

    Reference: arXiv:2412.03906, section 3.
    """

    method = "further-training"
    unit = "nats of query loss"
    asks_at_once = True
    needs_gradients = False

    def __init__(
        self,
        *,
        left_out: Sequence[int] | Tensor | None = None,
        epochs: int | None = None,
        num_seeds: int | None = None,
        optimizer: MakeOptimizer | None = None,
        train_batch_size: int | None = None,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.left_out = left_out
        self.epochs = None if epochs is None else check_count("epochs", epochs)
        self.num_seeds = None if num_seeds is None else check_count("num_seeds", num_seeds)
        self.optimizer, self.train_batch_size, self.memory_budget = optimizer, train_batch_size, memory_budget

    @override
    def fit_model(self, model: nn.Module, device: torch.device, record: str | Path | None, checkpoint: Any) -> None:
        self._explicit = record is not None
        saved_record, self._note = choose_record(record, checkpoint, model, self.weights, {}, "further-training")
        if not all_equal(None if saved_record is None else dict(saved_record.checksums)):
            # Otherwise some ranks would compute, and wait forever for those that read a record.
            saved_record, self._note = None, "the ranks have different records; computed on the spot"
        surveyed = survey(self.train_data, reader_of(self.task))
        self._fingerprint, self._targets = surveyed.fingerprint, surveyed.targets
        self._chosen = None if self.left_out is None else find_left_out(self.left_out, self.train_data)[0]
        self._saved: FurtherTraining | None = None
        self._leaving_out: LeavingOut | None = None
        if saved_record is not None:
            self._saved = FurtherTraining.from_record(saved_record)
            how = {"is_explicit": self._explicit}
            mismatch = explain_mismatch(saved_record, self._fingerprint, repr(self.task), **how)
            if mismatch is None and (mismatch := self._conflict(self._saved, model)) and self._explicit:
                raise ValueError(mismatch)
            if mismatch is not None:
                self._saved, self._note = None, mismatch
        if self._saved is None:
            self._prepare(model, device)
        path = None if saved_record is None or self._saved is None else str(saved_record.path)
        self.metadata |= {"data": self._fingerprint, "record": path}

    def _conflict(self, saved: FurtherTraining, model: nn.Module) -> str | None:
        """The options of a record that differ from the given ones, in words; None if there are none."""
        stored, differing = saved.metadata, []
        loss = self.task.fn if isinstance(self.task, FunctionLoss) else None
        functions = functions_of(loss=loss, measure=self.measure).get("functions", {})
        for argument, identity in functions.items():
            if stored.get("functions", {}).get(argument) != identity:
                differing.append(argument)
        if self.measure is None and measure_of(stored) != measure_info(None):
            differing.append(f"measure (it holds what {in_words(measure_of(stored))})")
        if self._chosen is not None and not set(self._chosen.tolist()) <= set(saved.left_out.tolist()):
            differing.append("left_out")
        if self.epochs is not None and self.epochs not in saved.epochs:
            differing.append(f"epochs ({saved.epochs} there)")
        if self.num_seeds is not None and self.num_seeds != len(saved.seeds):
            differing.append(f"num_seeds ({len(saved.seeds)} there)")
        if self.train_batch_size is not None and self.train_batch_size != stored["batch_size"]:
            differing.append(f"train_batch_size ({stored['batch_size']} there)")
        if self.optimizer is not None and repr(self.optimizer(model.parameters())) != stored["optimizer"]:
            differing.append(f"optimizer ({' '.join(stored['optimizer'].split())} there)")
        if not differing:
            return None
        return (
            f"The record was made with other options: {', '.join(differing)}. Leave out these options to use the "
            "record, or `record` to compute the effects anew."
        )

    def _prepare(self, model: nn.Module, device: torch.device) -> LeavingOut:
        """The further training, made and tried out once."""
        if self._leaving_out is None:
            if self.train_batch_size is None and self.train_data.loading is None:
                raise ValueError(_NO_BATCH_SIZE)
            head = first_look(self.train_data, 64, device)
            how = {"optimizer": self.optimizer, "memory_budget": self.memory_budget, "measure": self.measure}
            how |= {"batch_size": self.train_batch_size, "moment": self.moment, "reason": self.metadata["loss"]}
            self._leaving_out = LeavingOut(model, self.train_data, head, self.task, **how)
        return self._leaving_out

    @override
    def score_queries(self, model: nn.Module, queries: Examples, device: torch.device, target: str) -> Attribution:
        surveyed = survey(queries, reader_of(self.task))
        query_data, result, note = surveyed.fingerprint, self._saved, self._note
        if result is not None and (target != "label" or result.metadata["query_data"] != query_data):
            if self._explicit:
                raise ValueError(
                    "The record holds effects on other queries. Leave out `record` to compute the effects anew."
                )
            result, note = None, "the record is of other queries; computed on the spot"
        record = None if result is None else self.metadata["record"]
        if result is None:
            leaving_out = self._prepare(model, device)
            result = measure_effects(
                leaving_out,
                queries,
                leaving_out.query_values(queries, target),
                left_out=self.train_data.positions if self._chosen is None else self._chosen,
                epochs=1 if self.epochs is None else self.epochs,
                seeds=range(self.seed, self.seed + (5 if self.num_seeds is None else self.num_seeds)),
                path=None,
                metadata={"weights": self.weights, "query_data": query_data, "data": self._fingerprint},
                show_progress=self.show_progress,
            )
        epochs = result.epochs[-1] if self.epochs is None else self.epochs
        positions = result.left_out if self._chosen is None else self._chosen
        place_of = {position: place for place, position in enumerate(result.left_out.tolist())}
        columns, error = [place_of[position] for position in positions.tolist()], result.std_error(epochs)
        self._scored = find_left_out(positions, self.train_data)[1]
        how = {name: result.metadata[name] for name in ("optimizer", "batch_size", "seeds", "one_by_one_because")}
        return Attribution(
            result.effects(epochs)[:, columns],
            None if error is None else error[:, columns],
            train_targets=None if self._targets is None else self._targets[self._scored],
            query_targets=surveyed.targets if target == "label" else None,
            metadata={
                **{"query_data": query_data, "record": record, "record_note": note},
                "further_training": {**how, "epochs": epochs},
            },
        )

    @override
    def scored_examples(self) -> Examples:
        everything = self._scored.equal(torch.arange(len(self.train_data)))
        return self.train_data if everything else self.train_data.subset(self._scored.tolist())


class RetrainingAttributor(Attributor):
    """Datamodels: scores recovered from the losses of models that were retrained on random subsets.

    Args:
        truth: Result of :func:`~stride_lightning.retrain` for the queries, or its folder; by default models are
            retrained.
        model_fn: Function that makes a fresh, untrained model; needed without ``truth``.
        max_epochs: Epochs of retraining.
        num_subsets: Number of subsets K.
        fraction: Share of the training examples in each subset.
        num_seeds: Number of models for each subset.
        optimizer: Function that makes the optimizer of a model's parameters; by default ``configure_optimizers``.
        train_batch_size: Examples of a training batch; by default that of the training DataLoader.
        path: Folder for the retrained losses; a killed run continues from there.
        recovery: ``"prior"`` starts from the scores of STRIDE, which need no retraining. ``"lasso"`` is the published
            form of datamodels; ``"ridge"`` is the third choice.
        penalty: Penalty of the lasso or the ridge; by default chosen by cross-validation over subsets.
        memory_budget: Bytes for the models that train together.
        **kwargs: As in :class:`~stride_lightning.Attributor`.

    Reference: arXiv:2202.00622 (datamodels).
    """

    method = "retraining"
    unit = "nats of query loss"
    asks_at_once = True
    needs_gradients = False

    def __init__(
        self,
        *,
        truth: GroundTruth | str | Path | None = None,
        model_fn: Callable[[], nn.Module] | None = None,
        max_epochs: int | None = None,
        num_subsets: int = 200,
        fraction: float = 0.5,
        num_seeds: int = 1,
        optimizer: MakeOptimizer | None = None,
        train_batch_size: int | None = None,
        path: str | Path | None = None,
        recovery: RecoveryName = "prior",
        penalty: float | None = None,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if truth is None and (model_fn is None or max_epochs is None):
            raise ValueError(
                "method='retraining' needs models retrained on subsets: pass `truth=`, a result of retrain(), or "
                "`model_fn=` and `max_epochs=` to retrain now."
            )
        StrideAttributor(recovery=recovery, penalty=penalty)  # refuses what does not go together
        self._stride = StrideAttributor(recovery="closed-form", **kwargs)
        self.truth = GroundTruth.load(truth) if isinstance(truth, str | Path) else truth
        self.recovery: RecoveryName = recovery
        self.penalty = penalty
        self.train_batch_size = train_batch_size
        self._how = {"num_subsets": num_subsets, "fraction": fraction, "num_seeds": num_seeds, "path": path}
        self._how |= {"model_fn": model_fn, "max_epochs": max_epochs, "optimizer": optimizer}
        self._how |= {"batch_size": train_batch_size, "memory_budget": memory_budget, "seed": self.seed}

    @override
    def fit_model(self, model: nn.Module, device: torch.device, record: str | Path | None, checkpoint: Any) -> None:
        if record is not None and self.recovery != "prior":
            raise ValueError(
                f"Only recovery='prior' reads a record, got recovery={self.recovery!r} with record={record!r}. Leave "
                "out `record`."
            )
        surveyed = survey(self.train_data, reader_of(self.task))
        self._fingerprint, self._targets = surveyed.fingerprint, surveyed.targets
        self.metadata |= {"data": self._fingerprint, "options": {"recovery": self.recovery}}
        if self.truth is not None:
            self.truth.check_data(self.metadata, "`train_data`")
            if self.truth.num_train != len(self.train_data):
                raise ValueError(
                    f"`truth` has {self.truth.num_train} training examples, but `train_data` has "
                    f"{len(self.train_data)}. Pass the training data of `truth`."
                )
        elif self.train_batch_size is None and self.train_data.loading is None:
            raise ValueError(_NO_BATCH_SIZE)
        if self.recovery == "prior":
            if not isinstance(self.task, Task):
                raise ValueError(
                    f"recovery='prior' starts from the scores of STRIDE, which need a likelihood, got {self.task!r}. "
                    "Use recovery='lasso' or 'ridge'."
                )
            self._stride.take_over(self)
            self._stride.fit_model(model, device, record, checkpoint)

    @override
    def score_queries(self, model: nn.Module, queries: Examples, device: torch.device, target: str) -> Attribution:
        if target != "label":
            raise ValueError(
                f"method='retraining' measures losses of labelled queries, got target={target!r}. Use target='label'."
            )
        surveyed, truth = survey(queries, reader_of(self.task)), self.truth
        if truth is None:
            how = {**self._how, "device": device, "show_progress": self.show_progress, "measure": self.measure}
            how |= {"loss": self.task.fn} if isinstance(self.task, FunctionLoss) else {"task": self.task}
            truth = retrain(queries=queries, train_data=self.train_data, **how)
        truth.check_data({"query_data": surveyed.fingerprint}, "`queries`")
        truth.check_measure({"measure": measure_info(self.measure)}, "The attribution")
        if truth.num_queries != len(queries):
            raise ValueError(
                f"`truth` has {truth.num_queries} queries, but {len(queries)} were given. Pass the queries of `truth`."
            )
        # In double precision: with more subsets than examples the systems are close to singular.
        measurements = -truth.losses_by_seed.double().mean(0).T.contiguous()
        prior = None
        if self.recovery == "prior":
            prior = self._stride.score_queries(model, queries, device, "label").scores.double()
        how = {"penalty": self.penalty, "seed": self.seed, "show_progress": self.show_progress}
        recovered = recover(measurements, Design.from_masks(truth.masks), self.recovery, prior, **how)
        return Attribution(
            recovered.scores.float().cpu(),
            None if recovered.std is None else recovered.std.float().cpu(),
            train_targets=self._targets,
            query_targets=surveyed.targets,
            metadata={"query_data": surveyed.fingerprint, "recovered": recovered.chosen, "retraining": truth.metadata},
        )
