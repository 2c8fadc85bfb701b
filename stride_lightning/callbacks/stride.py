"""StrideCallback: watches a fit and leaves records that attribution starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # pyright: ignore[reportPrivateImportUsage]
from typing_extensions import override

from stride_lightning.callbacks.recording import RecordingCallback, check_frequencies, is_dev_run, misconfigured
from stride_lightning.data.collating import MissingExample
from stride_lightning.data.examples import FIRST_LOOK, Examples
from stride_lightning.model.layers import check_layers, in_precision_of
from stride_lightning.model.weights import borrowed, rank_zero_state, weight_hash
from stride_lightning.readout.activations import capture_inputs
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import rank
from stride_lightning.steering.attributor import likelihood_of, make_fit
from stride_lightning.steering.fit import Fit, FitOptions
from stride_lightning.steering.statistics import StreamingStatistics
from stride_lightning.steering.subsets import NUM_SUBSETS, Design, sample_design
from stride_lightning.storage.records import remove_record
from stride_lightning.tasks.likelihoods import Task

#: Examples of a batch whose activations are sampled: statistics of wide layers cost more than the forward pass.
STATISTICS_EXAMPLES = 128


@dataclass(frozen=True)
class _Watched:
    """What the callback knows once training has begun."""

    examples: Examples
    task: Task
    layers: list[str]
    design: Design
    statistics: dict[str, StreamingStatistics]


class StrideCallback(RecordingCallback):
    """Watches training and writes subset-perturbation checkpoints, the records that attribution starts from.

    While the model trains, the callback samples the activations that enter the chosen layers (in eval mode, on the
    batch at hand, every few steps). It logs their statistics to every logger as ``stride/<layer>/norm``,
    ``effective_rank`` and ``dead_fraction``. At the end, and every n epochs or steps on demand, it makes one eval pass
    and writes a record: the design (which example is in which subset), the statistics, the readout (of texts: the
    moments of their tokens), the loss of every training example and subset, a fingerprint of the data, and a hash of
    the weights. A readout or moments of more than 16 MiB are left out, and attribution computes them again. Hooks live
    only inside the callback's own forward passes.

    List it after callbacks that change the final weights, such as weight averaging.

    Args:
        dirpath: Folder of the records; by default ``stride`` in the trainer's log folder.
        layers: Names of the modules whose inputs make the features. By default the input features and the input of
            each layer with a weight matrix, eight at most.
        num_subsets: Number of subsets K.
        degree: Subsets each example is in; by default half of them, or 10 for very large training sets.
        seed: Seed of the design.
        every_n_epochs: Also write a record at the end of every n-th epoch.
        every_n_train_steps: Also write a record after every n-th optimizer step.
        save_last_k: Keep only the last k records of this run; -1 keeps all.
        fit_operators: Fit the steering operators at the end, so that attribution need not.
        statistics_every_n_steps: Sample activations every so many optimizer steps.
        batch_size: Examples per forward pass when a record is made.
        **kwargs: ``task``, ``loss`` and ``train_indices`` of every
            :class:`~stride_lightning.callbacks.recording.RecordingCallback`.

    Raises:
        MisconfigurationException: If an argument is wrong. Whatever goes wrong later is a warning, and the callback
            stops; the fit goes on as it would without it.

    Example:
        >>> import lightning.pytorch as L
        >>> trainer = L.Trainer(callbacks=[StrideCallback()], logger=False)

    Reference: arXiv:2606.05165 (STRIDE).
    """

    record_kind = "stride"
    told_apart_by = ("layers", "num_subsets", "degree", "seed", "every_n_epochs", "every_n_train_steps")
    _watched: _Watched  # from the start of training

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        layers: list[str] | None = None,
        num_subsets: int = NUM_SUBSETS,
        degree: int | None = None,
        seed: int = 0,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        save_last_k: int = -1,
        fit_operators: bool = False,
        statistics_every_n_steps: int = 50,
        batch_size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(dirpath, **kwargs)
        with misconfigured():
            check_layers(layers)
            check_count("seed", seed, 0)
            if degree is not None:
                check_count("degree", degree)
            sample_design(2, num_subsets, degree)  # refuses numbers that make no design of any data
        check_frequencies(
            save_last_k,
            every_n_epochs=every_n_epochs,
            every_n_train_steps=every_n_train_steps,
            statistics_every_n_steps=statistics_every_n_steps,
            batch_size=batch_size,
        )
        self.layers, self.num_subsets, self.degree, self.seed = layers, num_subsets, degree, seed
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.save_last_k, self.fit_operators = save_last_k, fit_operators
        self.statistics_every_n_steps, self.batch_size = statistics_every_n_steps, batch_size
        self._sampled_step = self._recorded_step = -1
        self._recorded_weights = ""

    @override
    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sampled_step, self._recorded_step, self._recorded_weights = -1, -1, ""
        examples = self.training_examples(trainer, pl_module, most=self.batch_size)
        objective, batch = self.look(examples, pl_module, self.batch_size)
        task = likelihood_of(objective, pl_module)
        with borrowed(pl_module, None, None), torch.no_grad():
            inputs = in_precision_of(pl_module, task.inputs(batch))
            if self.layers is None:
                is_text = isinstance(inputs, Mapping) and "input_ids" in inputs
                size = len(inputs["input_ids"]) if is_text else min(self.batch_size, FIRST_LOOK, len(examples))
                layers = make_fit(task, FitOptions()).choose_layers(pl_module, inputs, size)
            else:
                layers = list(self.layers)
                with capture_inputs(pl_module, layers) as captured:
                    task.outputs(pl_module, inputs)
                if silent := [name for name in layers if name not in captured]:
                    raise ValueError(f"Layers {silent} do not run in the model's forward pass. Name others.")
        design = sample_design(len(examples), self.num_subsets, self.degree, seed=self.seed)
        self._watched = _Watched(examples, task, layers, design, {name: StreamingStatistics() for name in layers})

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._sampled_step or step % self.statistics_every_n_steps:
            return
        self._sampled_step = step  # once per optimizer step, however many batches it accumulates
        with self.working(trainer, pl_module):
            if rank() == 0:
                self._sample(trainer, pl_module, batch)

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Add the activations of a batch to the statistics, and log them."""
        watched = self._watched
        with (
            torch.no_grad(),
            borrowed(pl_module, None, None),
            trainer.precision_plugin.forward_context(),
            capture_inputs(pl_module, watched.layers) as captured,
        ):
            inputs = watched.task.inputs(batch)
            captured.reads(inputs)
            watched.task.outputs(pl_module, inputs)
        metrics = {}
        for name, features in captured.items():
            statistics = watched.statistics[name]
            statistics.update(features[:STATISTICS_EXAMPLES])
            metrics |= {f"stride/{name or 'model'}/{key}": value for key, value in statistics.scalars().items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self.every_n_train_steps is not None and step > 0 and step % self.every_n_train_steps == 0
        if due and step != self._recorded_step:
            self._record(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._record(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._record(trainer, pl_module, final=True)

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, *, final: bool = False) -> None:
        """Evaluate the training set at the present weights and write a record; every rank takes part."""
        watched, step = self._watched, trainer.global_step
        fit_operators = final and self.fit_operators
        shows = trainer.progress_bar_callback is not None
        with self.working(trainer, pl_module):
            with borrowed(pl_module, rank_zero_state(pl_module), None) as device, torch.no_grad():
                weights = weight_hash(pl_module)
                # Weights, not steps: weight averaging may have changed them since the record of the last step.
                again = weights == self._recorded_weights
                if again and not fit_operators:
                    return
                self._recorded_step, self._recorded_weights = step, weights
                options = FitOptions(layers=watched.layers, batch_size=self.batch_size, show_progress=shows)
                fit = make_fit(watched.task, options)
                try:
                    fit.prepare(pl_module, watched.examples, device)
                except MissingExample:
                    watched = self._without_missing()
                    fit.prepare(pl_module, watched.examples, device)
                if fit_operators:
                    fit.expect(watched.design, 0)
                fit.fit(watched.design if fit_operators else None)
            if rank() == 0 and not is_dev_run(trainer):
                self._write(trainer, weights, fit)
                self._remove_stale(replaced=again)

    def _without_missing(self) -> _Watched:
        """A design for the examples that are not None."""
        examples = self._watched.examples.without_missing(show=False)
        rank_zero_info(f"StrideCallback: {examples.notes[-1]}")
        design = sample_design(len(examples), self.num_subsets, self.degree, seed=self.seed)
        self._watched = replace(self._watched, examples=examples, design=design)
        return self._watched

    def _write(self, trainer: L.Trainer, weights: str, fit: Fit) -> None:
        watched, design, losses = self._watched, self._watched.design, fit.losses
        record, large = fit.record().of_moderate_size()
        for group, size in large.items():
            rank_zero_info(
                f"StrideCallback: the record does not hold its {group}, which would take {size / 2**20:,.0f} MiB. "
                "attribute() computes them again, in one more pass over the training data."
            )
        statistics = {
            f"{index}.{name}": value
            for index, layer in enumerate(watched.layers)
            for name, value in watched.statistics[layer].tensors().items()
            if watched.statistics[layer].count
        }
        subsets = design.responses(losses[None].float())[0] / design.sizes.clamp(min=1)
        tensors = {"design": design.tensors(), "losses": {"train": losses, "subsets": subsets}} | record.tensors
        tensors["statistics"] = statistics | tensors.get("statistics", {})
        info: dict[str, Any] = {
            "weights": weights,
            "data": fit.fingerprint,
            "layers": list(watched.layers),
            "task": repr(watched.task),
            "mode": "eval",
            "design": design.info(),
            "train_loss": float(losses.mean()),
            **record.info,
        }
        self.records.append(self.write(trainer, info, tensors))

    def _remove_stale(self, *, replaced: bool) -> None:
        """Remove the record without operators that one with operators replaced, and all but the last k of this fit."""
        stale = [self._written.pop(-2)] if replaced else []
        while self.save_last_k > 0 and len(self._written) > self.save_last_k:
            stale.append(self._written.pop(0))
        for path in stale:
            self.records.remove(path)
            remove_record(path)
