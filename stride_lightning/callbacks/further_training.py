"""FurtherTrainingCallback: at the end of a fit, trains on without chosen examples and records what that does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # pyright: ignore[reportPrivateImportUsage]
from typing_extensions import override

from stride_lightning.callbacks.recording import RecordingCallback, is_dev_run, misconfigured
from stride_lightning.data.examples import Examples, first_look
from stride_lightning.data.objectives import Objective
from stride_lightning.data.sources import resolve_queries
from stride_lightning.model.weights import borrowed, rank_zero_state, weight_hash
from stride_lightning.retraining.further_training import (
    FurtherTraining,
    find_left_out,
    measure_effects,
    read_amounts,
    read_positions,
)
from stride_lightning.retraining.leaving_out import LeavingOut
from stride_lightning.retraining.optimizers import MakeOptimizer, check_optimizer
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import rank
from stride_lightning.tasks.measures import check_function
from stride_lightning.tasks.moments import first_moment, moment_of
from stride_lightning.tasks.own_loss import RowFunction


@dataclass(frozen=True)
class _Questions:
    """What the callback knows once training has begun."""

    examples: Examples
    queries: Examples
    objective: Objective


class FurtherTrainingCallback(RecordingCallback):
    """Measures the gold standard at the end of a fit: how training on without an example changes chosen queries.

    When training ends, copies of the model are trained on. Each copy leaves out one example: its share is taken out of
    every batch. Effects are logged to every logger, under ``further-training/``, and written into a record that
    ``attribute(method="further-training")`` finds by the weights. The model and the rest of the fit stay as they are.

    List it after callbacks that change the final weights, such as weight averaging. Copies are trained on without
    gradient clipping and without the model's hooks that change gradients; a warning says so when the fit begins.

    Args:
        queries: Examples whose losses are measured: a Dataset, DataLoader or LightningDataModule.
        left_out: Positions in the training dataset; by default all, or 100 spread evenly if there are more.
        epochs: Epochs of further training after which effects are measured; one number or several.
        num_seeds: Orders of batches averaged over.
        optimizer: Makes the optimizer of a model's parameters; by default the model's ``configure_optimizers``
            without its schedule, at the initial learning rate.
        batch_size: Examples of a batch; by default those of one optimizer step of the fit, over all processes.
        loss: What training minimises, in place of ``task``: ``fn(model, batch)`` returns the loss of each example.
        measure: What is measured of the queries, ``fn(model, batch) -> (B,)`` with the module in eval mode; by default
            their loss. Positive effects raise it.
        seed: The first of the seeds.
        memory_budget: Bytes that copies trained together may take.
        **kwargs: ``dirpath``, ``task`` and ``train_indices`` of every
            :class:`~stride_lightning.callbacks.recording.RecordingCallback`.

    Raises:
        MisconfigurationException: If an argument is wrong. Whatever goes wrong later is a warning, and the callback
            stops; the fit goes on as it would without it.

    Example:
        >>> import lightning.pytorch as L
        >>> from torch.utils.data import TensorDataset
        >>> queries = TensorDataset(torch.randn(3, 2), torch.tensor([0, 1, 1]))
        >>> trainer = L.Trainer(callbacks=[FurtherTrainingCallback(queries, left_out=[0, 5])], logger=False)

    Reference: arXiv:2412.03906, section 3.
    """

    record_kind = "further-training"
    told_apart_by = ("epochs", "num_seeds", "seed")
    _questions: _Questions  # from the start of training

    def __init__(
        self,
        queries: Any,
        *,
        left_out: Sequence[int] | None = None,
        epochs: int | Sequence[int] = 1,
        num_seeds: int = 5,
        optimizer: MakeOptimizer | None = None,
        batch_size: int | None = None,
        loss: RowFunction | None = None,
        measure: RowFunction | None = None,
        seed: int = 0,
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss=loss, **kwargs)
        with misconfigured():
            check_count("num_seeds", num_seeds)
            check_count("seed", seed, 0)
            for name, value in {"batch_size": batch_size, "memory_budget": memory_budget}.items():
                if value is not None:
                    check_count(name, value)
            check_optimizer(optimizer)
            check_function(measure, "measure")
            if left_out is not None:
                read_positions(left_out)
            if not hasattr(queries, "train_dataloader"):  # a data module is set up when the fit begins
                resolve_queries(queries)
            self.epochs = read_amounts(epochs)
        self.queries, self.left_out, self.num_seeds, self.optimizer = queries, left_out, num_seeds, optimizer
        self.batch_size, self.seed, self.memory_budget = batch_size, seed, memory_budget
        self.measure = measure
        #: Effects measured at the end of the last fit; None if there are none.
        self.result: FurtherTraining | None = None

    @override
    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.result = None
        examples = self.training_examples(trainer, pl_module)
        # A shallow copy: a data module may be the fit's own, which must not see another setup().
        queries = resolve_queries(copy.copy(self.queries), pl_module, examples)
        find_left_out(self.left_out, examples)
        objective, head = self.look(examples, pl_module)
        self._questions = _Questions(examples, queries, objective)
        with borrowed(pl_module, None, None), torch.no_grad():
            # This tries everything out now: the end of a long fit would be too late.
            leaving_out = self._leaving_out(trainer, pl_module, head, warn=True)
            leaving_out.check_queries(queries, leaving_out.query_values(queries))
        if trainer.gradient_clip_val:
            rank_zero_warn(
                f"The Trainer clips gradients (gradient_clip_val={trainer.gradient_clip_val}). Further training does "
                "not: it measures effects without clipping. Leave out gradient_clip_val to train alike."
            )

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_dev_run(trainer):
            return
        with self.working(trainer, pl_module):
            self.result = self._measure(trainer, pl_module)
            if rank() == 0:
                self.records.append(self.write(trainer, self.result.info(), {"effects": self.result.tensors()}))
                self._log(trainer, self.result)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> FurtherTraining:
        known = self._questions
        with borrowed(pl_module, rank_zero_state(pl_module), None) as device, torch.no_grad():
            leaving_out = self._leaving_out(trainer, pl_module, first_look(known.examples, 64, device), warn=False)
            values = leaving_out.query_values(known.queries)
            weights = weight_hash(pl_module)
        return measure_effects(
            leaving_out,
            known.queries,
            values,
            left_out=self.left_out,
            epochs=self.epochs,
            seeds=range(self.seed, self.seed + self.num_seeds),
            path=None,
            metadata={"weights": weights, "query_data": values.fingerprint, "step": trainer.global_step},
            show_progress=trainer.progress_bar_callback is not None,
        )

    def _leaving_out(self, trainer: L.Trainer, pl_module: L.LightningModule, head: Any, *, warn: bool) -> LeavingOut:
        known, size, loading = self._questions, self.batch_size, self._questions.examples.loading
        if size is None and loading is not None:  # the examples of one optimizer step
            replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
            size = loading.batch_size * replicas * trainer.accumulate_grad_batches
        how = {"optimizer": self.optimizer, "memory_budget": self.memory_budget, "warn": warn, "batch_size": size}
        how |= {
            "measure": self.measure,
            "reason": known.objective.reason,
            "moment": moment_of(pl_module, None) or first_moment(pl_module),
        }
        return LeavingOut(pl_module, known.examples, head, known.objective.task, **how)

    def _log(self, trainer: L.Trainer, result: FurtherTraining) -> None:
        """Log the size of the effects after each amount of training, and the effects after the last in full."""
        metrics: dict[str, float] = {}
        for epoch in result.epochs:
            values = {"effect_rms": result.effects(epoch), "std_error_rms": result.std_error(epoch)}
            for name, value in values.items():
                if value is not None:
                    metrics[f"further-training/epochs={epoch}/{name}"] = float(value.square().mean().sqrt())
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        attribution = result.attribution()
        examples, attribution.queries = self._questions.examples, self._questions.queries
        attribution.train_data = examples.subset(find_left_out(result.left_out, examples)[1].tolist())
        attribution.log(trainer.loggers, step=trainer.global_step)
