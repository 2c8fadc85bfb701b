"""The base of callbacks that leave records: where records go, which there are, and which data they are of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # pyright: ignore[reportPrivateImportUsage]
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader
from typing_extensions import override

from stride_lightning.callbacks.guard import GuardedCallback
from stride_lightning.data.collating import MissingExample
from stride_lightning.data.examples import Examples, first_look
from stride_lightning.data.loading import NoPositionsError
from stride_lightning.data.objectives import Objective, check_objective, resolve_objective, says_rows_loss
from stride_lightning.data.sources import checked_positions, resolve_train_data
from stride_lightning.data.streams import is_stream
from stride_lightning.model.sharded import whole, whole_on_rank_zero
from stride_lightning.model.weights import borrowed
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import rank
from stride_lightning.runtime.versions import versions
from stride_lightning.storage.files import hidden_name, write_file
from stride_lightning.storage.records import write_record
from stride_lightning.tasks.moments import first_moment, moment_of
from stride_lightning.tasks.own_loss import OwnLoss, RowFunction
from stride_lightning.tasks.task import Task

#: Wrappers of modules under which the whole model is in every process, or can be gathered there.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


class RecordingCallback(GuardedCallback):
    """A callback that writes records into one folder; its state in checkpoints says where they are.

    A subclass sets itself up in :meth:`begin`, before the first step, and does all other work in a ``working`` block.

    Args:
        dirpath: Folder of the records; by default a folder named as their kind in the trainer's log folder.
        train_indices: Positions in the dataset that are trained on, if the sampler does not give them.
        task: The likelihood that training maximises, or ``OwnLoss()``; by default as :func:`attribute` chooses it.
        loss: What training minimises, in place of ``task``: ``loss(model, batch)`` returns the loss of each example.
    """

    #: Kind of the records, by which lookup knows the callback.
    record_kind: ClassVar[str]
    #: Whether the callback runs the model, so that every process needs it whole while the callback works.
    runs_model: ClassVar[bool] = True
    #: Arguments besides the folder by which the state of one instance is told from that of another.
    told_apart_by: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        train_indices: list[int] | None = None,
        task: Task | OwnLoss | None = None,
        loss: RowFunction | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            name = type(self).__name__
            raise TypeError(f"{name} has no argument {', '.join(sorted(unknown))}. help({name}) shows its arguments.")
        super().__init__()
        with misconfigured():
            check_objective(task, loss)
            if train_indices is not None:
                checked_positions(train_indices)
            self._explicit_dirpath = None if dirpath is None else Path(dirpath)
        self.dirpath: Path = self._explicit_dirpath  # pyright: ignore[reportAttributeAccessIssue]  # set in setup()
        self.train_indices, self.task, self.loss = train_indices, task, loss
        #: Records written so far, oldest first.
        self.records: list[Path] = []
        self._written: list[Path] = []  # by this fit
        self._has_missing = False  # whether the dataset of this fit holds None

    @cached_property  # Lightning reads it at every hook of every step
    @override
    def state_key(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        dirpath = None if self._explicit_dirpath is None else str(self._explicit_dirpath)
        return self._generate_state_key(dirpath=dirpath, **{name: getattr(self, name) for name in self.told_apart_by})

    @override
    def state_dict(self) -> dict[str, Any]:
        # Plain types only: anything else would break the user's own resume under weights_only loading.
        return {"dirpath": None if self.dirpath is None else str(self.dirpath), "records": list(map(str, self.records))}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = [Path(path) for path in state_dict["records"]]

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._written, self._has_missing = [], False
        log_dir = trainer.log_dir  # first, as it is a collective call: every rank must make it
        dirpath = self._explicit_dirpath or Path(log_dir or trainer.default_root_dir) / self.record_kind
        # Absolute, because the checkpoint that names it may be read from another working directory.
        self.dirpath = dirpath.absolute()

    @contextmanager
    @override
    def working(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
        with (
            super().working(trainer, pl_module),
            whole(pl_module) if self.runs_model else whole_on_rank_zero(pl_module),
        ):
            yield

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with self.working(trainer, pl_module):
            _check_wrapper(trainer, pl_module)
            if any(map(is_lazy, [*pl_module.parameters(), *pl_module.buffers()])):
                raise ValueError(
                    "The model has lazy layers that have seen no batch yet. Call the model on one before fit()."
                )
            with borrowed(pl_module, None, None):  # hooks of the module that read batches may count, too
                try:
                    self.begin(trainer, pl_module)
                except MissingExample:
                    self._has_missing = True
                    self.begin(trainer, pl_module)
            if rank() == 0 and not is_dev_run(trainer):
                self._check_folder(self.record_bytes(pl_module))

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the model and the data before the first step, and refuse what cannot work."""

    def record_bytes(self, pl_module: L.LightningModule) -> int:
        """Bytes that a record takes at least."""
        return 0

    @override
    def summary(self) -> str:
        names = [path.name for path in self._written if path in self.records]
        return f"In this fit it wrote {', '.join(names)} in {self.dirpath}." if names else "It wrote no record."

    def look(self, examples: Examples, pl_module: L.LightningModule, batch_size: int = 64) -> tuple[Objective, Any]:
        """What stands for training, and the first batch."""
        device = pl_module.device
        with borrowed(pl_module, None, None), torch.no_grad():
            moment = moment_of(pl_module, None) or first_moment(pl_module)
            how: dict[str, Any] = {"task": self.task, "loss": self.loss, "moment": moment, "batch_size": batch_size}
            objective = resolve_objective(pl_module, examples, device, **how)
        rank_zero_info(f"{type(self).__name__}: the loss of an example is {objective.reason}")
        return objective, first_look(examples, batch_size, device)

    def training_examples(self, trainer: L.Trainer, pl_module: L.LightningModule, most: int | None = None) -> Examples:
        """The examples that a trainer trains on, which must have positions; at most ``most`` in a ``fast_dev_run``."""
        loaders: Any = trainer.fit_loop._combined_loader
        for dataset in (getattr(loader, "dataset", None) for loader in loaders.flattened):
            if is_stream(dataset):
                raise NoPositionsError(
                    f"Training reads from a stream ({type(dataset).__name__}), which the callback would have to read "
                    "again. Call attribute() after training, with the stream as `train_data`."
                )
        # A single DataLoader gives batches as they are, without a structure around them.
        source = loaders.iterables if isinstance(loaders.iterables, DataLoader) else loaders
        datamodule = getattr(trainer, "datamodule", None)
        examples = resolve_train_data(
            source,
            self.train_indices,
            pl_module,
            datamodule,
            has_rows_loss=says_rows_loss(self.task, self.loss),
            show=False,
        )
        if self._has_missing:
            examples = examples.without_missing(show=False)
        notes = list(examples.notes)
        if getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
            notes.append("The Trainer makes new loaders on the way; records are about the examples of the first one.")
        for note in notes:
            rank_zero_info(f"{type(self).__name__}: {note}")
        if most is not None and is_dev_run(trainer):
            return examples.subset(range(min(most, len(examples))))
        return examples

    def write(
        self, trainer: L.Trainer, info: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], name: str = ""
    ) -> Path:
        """Write a record of the present step, under the step's number unless it has a name."""
        model, step = type(trainer.lightning_module).__name__, trainer.global_step
        about = {"model": model, "epoch": trainer.current_epoch, "step": step, "versions": versions()}
        moment = moment_of(trainer.lightning_module, None) or first_moment(trainer.lightning_module)
        about = {"kind": self.record_kind, **about, "moment": asdict(moment), **info}
        with _into(self.dirpath):
            path = write_record(self.dirpath, name or f"step={step}", about, tensors)
        self._written.append(path)
        rank_zero_info(f"{type(self).__name__} wrote {path}")
        return path

    def _check_folder(self, num_bytes: int) -> None:
        """Refuse a folder that takes no file, or has no room for a record."""
        with _into(self.dirpath):
            self.dirpath.mkdir(parents=True, exist_ok=True)
            probe = hidden_name(self.dirpath / "probe")
            try:
                write_file(probe, bytes(4096))
            finally:
                probe.unlink(missing_ok=True)
            usage = shutil.disk_usage(self.dirpath)
        if usage.total and usage.free < num_bytes:  # some network drives say 0 of 0
            raise ValueError(
                f"{self.dirpath} has {usage.free:,} bytes left, and a record takes at least {num_bytes:,}. Make room, "
                "or choose another folder with `dirpath=`."
            )


def _check_wrapper(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Refuse strategies that hold the model in a way of their own."""
    wrapper = trainer.model
    is_known = any(base.__name__ in _WRAPPERS for base in type(wrapper).__mro__)
    if (wrapper is not pl_module and not is_known) or pl_module.device.type == "xla":
        raise ValueError(
            f"The callback cannot read a model that {type(trainer.strategy).__name__} holds in "
            f"{type(wrapper).__name__}. Train with the strategy 'ddp', 'fsdp' or ModelParallelStrategy, or call "
            "attribute() after training instead."
        )


@contextmanager
def _into(folder: Path) -> Iterator[None]:
    """Name the folder where a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"Nothing can be written into {folder} ({error}). Make it writable or make room, or choose another folder "
            "with `dirpath=`."
        ) from error


@contextmanager
def misconfigured() -> Iterator[None]:
    """Turn errors of arguments into those that Lightning's users expect."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(str(error)) from error


def check_frequencies(save_last_k: int, **frequencies: int | None) -> None:
    """Refuse wrong numbers of records to keep, and of epochs, steps or examples; None means never."""
    with misconfigured():
        for name, value in frequencies.items():
            if value is not None:
                check_count(name, value)
        if not isinstance(save_last_k, int) or save_last_k < -1 or save_last_k == 0:
            raise ValueError(f"`save_last_k` must be -1 (keep all) or positive, got {save_last_k!r}.")


def is_dev_run(trainer: L.Trainer) -> bool:
    """Whether the trainer only tries everything out (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))
