"""What callbacks that leave records have in common: where records go, which there are, and whose data they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # pyright: ignore[reportPrivateImportUsage]
from typing_extensions import override

from stride_lightning.data.examples import Examples
from stride_lightning.data.sources import resolve_train_data

#: Strategies under which every process holds the whole model.
_WHOLE_MODEL_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class RecordingCallback(L.Callback):
    """A callback that writes records into one folder; its state in checkpoints says where they are.

    Args:
        dirpath: Folder of the records; by default a folder named :attr:`folder` in the trainer's log folder.
        train_indices: Positions in the dataset that are trained on, where the sampler does not tell.
    """

    #: Kind of the records, by which lookup knows the callback.
    record_kind: ClassVar[str]
    #: Name of the default folder.
    folder: ClassVar[str]

    def __init__(self, dirpath: str | Path | None, train_indices: list[int] | None) -> None:
        super().__init__()
        self._explicit_dirpath = None if dirpath is None else Path(dirpath)
        self.dirpath, self.train_indices = self._explicit_dirpath, train_indices
        #: Records written so far, oldest first.
        self.records: list[Path] = []

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
        dirpath = self._explicit_dirpath or Path(log_dir or trainer.default_root_dir) / self.folder
        # Absolute, because the checkpoint that names it may be read from another working directory.
        self.dirpath = dirpath.absolute()

    def training_examples(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Examples:
        """The examples that a trainer trains on.

        Raises:
            TypeError, ValueError: If they have no positions.
        """
        loader = trainer.train_dataloader
        if isinstance(loader, list | tuple | dict) or not hasattr(loader, "dataset"):
            raise TypeError(
                f"Training reads from a {type(loader).__name__}; expected one DataLoader over one map-style dataset. "
                "With several loaders, positions in the training data are not defined."
            )
        return resolve_train_data(loader, self.train_indices, pl_module, getattr(trainer, "datamodule", None))


def is_dev_run(trainer: L.Trainer) -> bool:
    """Whether the trainer only tries everything out, with ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))
