"""What callbacks that leave records have in common: where records go, which there are, and whose data they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # pyright: ignore[reportPrivateImportUsage]
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from typing_extensions import override

from stride_lightning.data.examples import Examples
from stride_lightning.data.sources import resolve_train_data
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.versions import versions
from stride_lightning.storage.records import write_record
from stride_lightning.tasks.inference import check_task
from stride_lightning.tasks.likelihoods import Task

#: Strategies under which every process holds the whole model.
_WHOLE_MODEL_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class RecordingCallback(L.Callback):
    """A callback that writes records into one folder; its state in checkpoints says where they are.

    Args:
        dirpath: Folder of the records; by default a folder named as their kind in the trainer's log folder.
        train_indices: Positions in the dataset that are trained on, where the sampler does not tell.
        task: What a batch means; inferred from the first batch by default.
    """

    #: Kind of the records, by which lookup knows the callback.
    record_kind: ClassVar[str]
    #: Arguments besides the folder by which the state of one instance is told from that of another.
    told_apart_by: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        train_indices: list[int] | None = None,
        task: Task | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(sorted(unknown))}.")
        super().__init__()
        with misconfigured():
            check_task(task)
        self._explicit_dirpath = None if dirpath is None else Path(dirpath)
        self.dirpath: Path = self._explicit_dirpath  # pyright: ignore[reportAttributeAccessIssue]  # by setup at last
        self.train_indices, self.task = train_indices, task
        #: Records written so far, oldest first.
        self.records: list[Path] = []

    @cached_property  # Lightning asks for it at every hook of every step
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
        strategy = type(trainer.strategy).__name__
        if strategy not in _WHOLE_MODEL_STRATEGIES:
            raise MisconfigurationException(
                f"{type(self).__name__} needs the whole model in every process; {strategy} is not supported. "
                f"Supported: {', '.join(_WHOLE_MODEL_STRATEGIES)}. Train without the callback and call "
                "attribute() afterwards."
            )
        log_dir = trainer.log_dir  # a collective call: every rank must make it
        dirpath = self._explicit_dirpath or Path(log_dir or trainer.default_root_dir) / self.record_kind
        # Absolute, because the checkpoint that names it may be read from another working directory.
        self.dirpath = dirpath.absolute()

    def refusing(self) -> AbstractContextManager[None]:
        """A block whose errors say that the callback cannot work with the model and data."""
        return misconfigured(f"{type(self).__name__} cannot work with this model and data. ")

    def training_examples(self, trainer: L.Trainer, pl_module: L.LightningModule, most: int | None = None) -> Examples:
        """The examples that a trainer trains on, refused without positions; of ``fast_dev_run`` at most so many."""
        loader = trainer.train_dataloader
        if isinstance(loader, list | tuple | dict) or not hasattr(loader, "dataset"):
            raise TypeError(
                f"Training reads from a {type(loader).__name__}; expected one DataLoader over one map-style dataset. "
                "With several loaders, positions in the training data are not defined."
            )
        examples = resolve_train_data(loader, self.train_indices, pl_module, getattr(trainer, "datamodule", None))
        if most is not None and is_dev_run(trainer):
            return examples.subset(range(min(most, len(examples))))
        return examples

    def write(
        self, trainer: L.Trainer, info: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], name: str = ""
    ) -> Path:
        """Write a record of the present step, by default under its number."""
        model, step = type(trainer.lightning_module).__name__, trainer.global_step
        about = {"model": model, "epoch": trainer.current_epoch, "step": step, "versions": versions()}
        about = {"kind": self.record_kind, **about, **info}
        path = write_record(self.dirpath, name or f"step={step}", about, tensors)
        rank_zero_info(f"{type(self).__name__} wrote {path}")
        return path


@contextmanager
def misconfigured(prefix: str = "") -> Iterator[None]:
    """Turn errors into those that Lightning's users expect."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"{prefix}{error}") from error


def check_frequencies(save_last_k: int, **frequencies: int | None) -> None:
    """Refuse what is no number of records to keep, or of epochs, steps or examples; None stands for never."""
    with misconfigured():
        for name, value in frequencies.items():
            if value is not None:
                check_count(name, value)
        if not isinstance(save_last_k, int) or save_last_k < -1 or save_last_k == 0:
            raise ValueError(f"`save_last_k` must be -1 (keep all) or positive, got {save_last_k!r}.")


def is_dev_run(trainer: L.Trainer) -> bool:
    """Whether the trainer only tries everything out, with ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))
