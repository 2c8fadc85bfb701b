"""TracInCallback: saves the weights and learning rates along training that TracIn needs."""

from __future__ import annotations

import math
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # pyright: ignore[reportPrivateImportUsage]
from torch import nn
from typing_extensions import override

from stride_lightning.callbacks.learning_rates import LearningRates
from stride_lightning.callbacks.recording import RecordingCallback, check_frequencies, is_dev_run
from stride_lightning.callbacks.trajectory import Saved, free_name, look_up, relative, written_before
from stride_lightning.data.loading import NoPositionsError
from stride_lightning.data.reading import fingerprint_of
from stride_lightning.model.digests import hash_of_digests, model_digests, state_tensors
from stride_lightning.runtime.distributed import broadcast_object, rank
from stride_lightning.storage.frozen import FROZEN_KIND, FrozenRest, frozen_info, frozen_records
from stride_lightning.storage.records import read_info, remove_record


class TracInCallback(RecordingCallback):
    """Saves what TracIn needs: the weights at chosen epochs or steps, and the learning rates in force there.

    Each record holds the weights that train or have changed since the fit began, the learning rate by which the last
    optimizer step moved every parameter (read at the step itself, before schedulers go on), a fingerprint of the
    training data, and the earlier records of this run. The end of training is recorded too. Learning rates are logged
    to every logger at each record as ``tracin/learning_rate``, with the number of the parameter group behind it if
    there are several.

    Records name the frozen rest of the model by hashes alone, and reading them takes it from the model. Where it is
    unfrozen during the fit, one record more holds it as it was until then.

    A resumed run goes on in the folder of the run that it resumes, as long as that exists and no ``dirpath`` says
    otherwise. A killed run may have written records after its last checkpoint. They count if training comes to the same
    weights again; otherwise new records are written beside them, and only those count.

    The training data are read once when the fit begins. List the callback after those that change the final weights,
    such as weight averaging.

    Args:
        dirpath: Folder of the records; by default ``tracin`` in the trainer's log folder.
        every_n_epochs: Write a record at the end of every n-th epoch; by default of each, unless
            ``every_n_train_steps`` is given.
        every_n_train_steps: Write a record after every n-th optimizer step.
        save_last_k: Keep only the last k records of this run; -1 keeps all.
        **kwargs: ``task``, ``loss`` and ``train_indices`` of every
            :class:`~stride_lightning.callbacks.recording.RecordingCallback`.

    Raises:
        MisconfigurationException: If an argument is wrong. Whatever goes wrong later is a warning, and the callback
            stops; the fit goes on as it would without it.

    Example:
        >>> import lightning.pytorch as L
        >>> trainer = L.Trainer(callbacks=[TracInCallback(every_n_epochs=5)], logger=False)

    Reference: arXiv:2002.08484 (TracInCP, section 3.3).
    """

    runs_model = False
    record_kind = "tracin"  # told apart by its folder alone: a run resumed with another frequency is the same run
    _about: dict[str, Any]  # the data, which all records name; known from the start of training
    _recorded_steps: int  # of the optimizers, at the last record
    _rest: FrozenRest  # from the start of training

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        save_last_k: int = -1,
        **kwargs: Any,
    ) -> None:
        super().__init__(dirpath, **kwargs)
        check_frequencies(save_last_k, every_n_epochs=every_n_epochs, every_n_train_steps=every_n_train_steps)
        if every_n_epochs is None and every_n_train_steps is None:
            every_n_epochs = 1
        self.every_n_epochs, self.every_n_train_steps = every_n_epochs, every_n_train_steps
        self.save_last_k = save_last_k
        self._run: str | None = None  # name of the run, which stays the same when it is resumed
        self._rates = LearningRates()
        self._resumed_dirpath: Path | None = None
        self._path: list[Saved] = []  # like `records`, which the state stores
        self._seen_step = 0
        self._due_epoch: int | None = None  # an epoch whose steps are all taken, and whose end is to be recorded

    @override
    def state_dict(self) -> dict[str, Any]:
        run = {"run": self._run, "learning_rates": self._rates.state(), "due_epoch": self._due_epoch}
        return super().state_dict() | run

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._run, self._due_epoch = state_dict["run"], state_dict["due_epoch"]
        self._rates.restore(state_dict["learning_rates"])
        self._resumed_dirpath = None if state_dict["dirpath"] is None else Path(state_dict["dirpath"])

    @override
    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == 0:  # a callback may be used for one fit after the other
            self._run, self._due_epoch, self.records = None, None, []
            self._rates.restore([])
        self._about = {"data": self._fingerprint(trainer, pl_module)}
        self._rates.watch(trainer.optimizers)
        self._recorded_steps = -1 if step else 0
        self._take_up(step)
        last = read_info(self._path[-1].path) if rank() == 0 and self._path else None
        self._rest = FrozenRest(pl_module, broadcast_object({} if last is None else last["frozen"]["digests"]))
        self._seen_step = step

    def _fingerprint(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any] | None:
        """The fingerprint of the training data; None where single examples have no position."""
        try:
            examples = self.training_examples(trainer, pl_module, most=64)
        except NoPositionsError as error:  # weights and learning rates need no examples
            rank_zero_info(f"TracInCallback: its records will not say which data they are of. {error}")
            return None
        return fingerprint_of(examples)

    @override
    def record_bytes(self, pl_module: L.LightningModule) -> int:
        tensors = self._rest.without_it(pl_module).values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        step, n = trainer.global_step, self.every_n_train_steps
        # The checkpoint may have been saved between a step and its record. If it was saved at an epoch's last batch,
        # Lightning goes on with the next epoch and calls no hook for the end of this one.
        due = self._due_epoch is not None or (n is not None and step > 0 and step % n == 0)
        if due and (not self._path or self._path[-1].step != step):
            self._record(trainer, pl_module)
        self._due_epoch = None

    @override
    def release(self) -> None:
        self._rates.unwatch()
        # The optimizer goes on: a resumed fit must not take these for the rates of its last step.
        self._rates.restore([])
        self._due_epoch = None

    def _take_up(self, step: int) -> None:
        """Go on with the run whose state was loaded, or with that of the last fit, or begin one."""
        if self._run is None:
            if step > 0:
                rank_zero_warn(
                    f"Training starts at step {step}, and its checkpoint holds no state of this TracInCallback. The "
                    "records begin here, and TracIn will not know of the steps before. To go on with an earlier run, "
                    "pass the `dirpath` of that run."
                )
            self.records = []
            self._run = broadcast_object(secrets.token_hex(8))  # from the system: no generator is used
        nothing = Path(), list[Saved](), list[Path]()
        self.dirpath, self._path, missing = broadcast_object(self._find_path(step) if rank() == 0 else nothing)
        self.records = [saved.path for saved in self._path]
        if missing:
            rank_zero_warn(
                f"{len(missing)} records of the run that is resumed are damaged or no longer where they were written: "
                f"{', '.join(map(str, missing))}. Training goes on, and TracIn will leave them out. Move them to "
                f"{self.dirpath} before you resume if you want to keep them."
            )

    def _find_path(self, step: int) -> tuple[Path, list[Saved], list[Path]]:
        """The folder to go on in, the records of this run up to a step, and those that are missing."""
        dirpath, resumed = self.dirpath, self._resumed_dirpath
        if self._explicit_dirpath is None and resumed is not None and resumed.is_dir():
            dirpath = resumed
        saved = {path: look_up(path, self._run) or look_up(dirpath / path.name, self._run) for path in self.records}
        missing = [path for path, record in saved.items() if record is None]
        return dirpath, [record for record in saved.values() if record and record.step <= step], missing

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._note_unfrozen(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._note_unfrozen(trainer, pl_module)

    def _note_unfrozen(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before their first step, write down weights that earlier records take from the model."""
        if not self._rest.is_unfrozen():
            return
        with self.working(trainer, pl_module):
            tensors = self._rest.unfreeze(pl_module)
            if rank() != 0 or not self._path or not tensors:
                return
            digests = model_digests(pl_module, tensors)
            held = frozen_records(self.dirpath, self._run).values()
            if not any(digests.items() <= info["digests"].items() for info in held):
                info = {"kind": FROZEN_KIND, "run": self._run, "digests": digests}
                self.write(trainer, info, {"weights": tensors}, f"frozen-until-step={trainer.global_step}")

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_epochs is not None and trainer.is_last_batch:
            self._due_epoch = trainer.current_epoch if (trainer.current_epoch + 1) % self.every_n_epochs == 0 else None
        n, step, seen = self.every_n_train_steps, trainer.global_step, self._seen_step
        self._seen_step = step
        # A batch may take several steps (several optimizers), so that a multiple may lie between two batches.
        if n is not None and step // n > seen // n:
            self._record(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._record(trainer, pl_module)
        self._due_epoch = None

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._record(trainer, pl_module, final=True)
        self._rates.unwatch()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._rates.unwatch()

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule, *, final: bool = False) -> None:
        """Write a record of the weights as they are, if a step was taken since the last; every rank takes part."""
        if is_dev_run(trainer) or (not final and self._rates.num_steps == self._recorded_steps):
            return
        self._recorded_steps = self._rates.num_steps
        rates = self._rates.by_name(pl_module)  # of the optimizer's parameters, before others stand in for them
        with self.working(trainer, pl_module):
            # Rank 0 alone looks at the weights: where ranks differ (BatchNorm), records hold those of rank 0.
            saved = broadcast_object(self._save(trainer, pl_module, rates, final=final) if rank() == 0 else None)
            if saved is None:
                return
            # Weights that other callbacks swap in at the end, as averaging does, take the place of the step's own.
            path = [*(before for before in self._path if before.step != saved.step), saved]
            self._path = path if self.save_last_k < 0 else path[-self.save_last_k :]
            self.records = [saved.path for saved in self._path]
            if rank() == 0:
                self._remove(path[: -len(self._path)])
                self._log(trainer)

    def _remove(self, stale: list[Saved]) -> None:
        """Delete records, and what was frozen until then if no earlier record is left to need it."""
        paths = [saved.path for saved in stale]
        if stale:
            paths += [
                path
                for path, info in frozen_records(self.dirpath, self._run).items()
                if info["step"] < self._path[0].step
            ]
        for path in paths:
            with suppress(FileNotFoundError):  # a run that was killed may have come further
                remove_record(path)

    def _save(
        self, trainer: L.Trainer, pl_module: L.LightningModule, rates: dict[str, float], *, final: bool
    ) -> Saved | None:
        """The record of these weights, written now or by this run before it was killed; None if it is the last one."""
        step, digests = trainer.global_step, model_digests(pl_module)
        weights = hash_of_digests(digests)
        last = self._path[-1] if self._path else None
        if last is not None and last.weights == weights and (final or last.step == step):
            return None
        rest = self._rest.digests(pl_module, digests)
        tensors = {name: value for name, value in state_tensors(pl_module).items() if name not in rest}
        parameters = (value for value in tensors.values() if isinstance(value, nn.Parameter))
        finite = all(bool(value.isfinite().all()) for value in parameters)  # buffers may hold masks of -inf
        if not finite or not all(map(math.isfinite, rates.values())):
            raise ValueError(
                "Weights or learning rates are not finite: training has diverged. Lower the learning rate."
            )
        first = 0 if self.save_last_k < 0 else max(0, len(self._path) + 1 - self.save_last_k)
        info = {
            "run": self._run,
            "epoch": trainer.current_epoch if self._due_epoch is None else self._due_epoch,
            "step": step,
            "weights": weights,
            "learning_rates": rates,
            "frozen": frozen_info(rest),
            **self._about,
        }
        # Paths are relative to the record, so that folders may be moved together.
        before = [saved for saved in self._path[first:] if saved.step != step]
        earlier = [{"name": relative(saved.path, self.dirpath), "step": saved.step} for saved in before]
        path = written_before(self.dirpath, info, earlier)
        if path is None:
            name = free_name(self.dirpath, f"step={step}")
            info["trajectory"] = [*earlier, {"name": name, "step": step}]
            path = self.write(trainer, info, {"weights": tensors}, name)
        return Saved(path, step, weights)

    def _log(self, trainer: L.Trainer) -> None:
        rates = self._rates.by_group()
        names = [f"/{number}" if len(rates) > 1 else "" for number in range(len(rates))]
        metrics = {f"tracin/learning_rate{name}": rate for name, rate in zip(names, rates, strict=True)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
