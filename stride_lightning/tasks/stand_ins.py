"""What takes the place of a Trainer and its loggers while a ``training_step`` runs outside of a fit."""

from __future__ import annotations

import copy
import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerState, TrainerStatus
from torch import nn

from stride_lightning.model.weights import attached_trainer
from stride_lightning.tasks.manual_optimization import ManualOptimization, inert
from stride_lightning.tasks.moments import MOMENT_NAMES, Moment

#: What a Trainer says inside a training step on one process. It is read from the real one only where it is not here.
_DURING_A_STEP = {
    **dict.fromkeys(("training", "is_global_zero"), True),
    **dict.fromkeys(("validating", "testing", "predicting", "sanity_checking", "is_last_batch", "should_stop"), False),
    **dict.fromkeys(("global_rank", "local_rank", "node_rank"), 0),
    **dict.fromkeys(("save_checkpoint", "fit", "validate", "test", "predict", "print"), inert),
    "world_size": 1,
    "progress_bar_callback": None,
    # A Trainer whose fit is over has forgotten its stage.
    "state": TrainerState(TrainerStatus.RUNNING, TrainerFn.FITTING, RunningStage.TRAINING),
}
#: What a Trainer says by default, where none is attached.
_BY_DEFAULT = {
    **dict.fromkeys(("num_devices", "num_nodes", "accumulate_grad_batches"), 1),
    **dict.fromkeys(("gradient_clip_val", "gradient_clip_algorithm", "datamodule"), None),
    **dict.fromkeys(("early_stopping_callback", "checkpoint_callback", "ckpt_path"), None),
    "callbacks": [],
    "checkpoint_callbacks": [],
    "log_every_n_steps": 50,
    "fast_dev_run": False,
    "precision": "32-true",
}


def put_in_place(model: nn.Module, moment: Moment | None) -> tuple[TrainerStandIn, ManualOptimization]:
    """Attach stand-ins to a LightningModule, and to those inside it; whoever calls puts the attributes back."""
    real = attached_trainer(model)
    manual = ManualOptimization(model, real)
    trainer = TrainerStandIn(model, moment or Moment(), real, manual)
    methods = {**manual.methods(), **dict.fromkeys(("log", "log_dict", "print"), inert), "all_gather": _same}
    for module in model.modules():
        if hasattr(type(module), "trainer"):  # some packages take `_trainer` away after a fit
            vars(module).update(methods, _trainer=trainer, _fabric=None)
    return trainer, manual


def put_on_copy(model: nn.Module, real: Any) -> None:
    """Let a copy of a module, and those inside it, read what the Trainer of the original says."""
    if real is not None:
        trainer = TrainerStandIn(model, Moment(), real, ManualOptimization(model, real))
        for module in model.modules():
            if "_trainer" in vars(module):
                vars(module)["_trainer"] = trainer


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of a module is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _same(value: Any, *_: Any, **__: Any) -> Any:
    return value


class TrainerStandIn:
    """A Trainer to read from: it tells the moment, and where a real one is attached, what that one says.

    Setting an attribute does nothing.
    """

    def __init__(self, model: nn.Module, moment: Moment, real: Any, manual: ManualOptimization) -> None:
        logger = Muted()
        vars(self).update(
            _name=type(model).__name__,
            _device=device_of(model),
            _moment=moment,
            _real=real,
            _manual=manual,
            logger=logger,
            loggers=[logger],
            missing=None,
        )

    @property
    def optimizers(self) -> list[Any]:
        """Optimizers that do nothing."""
        optimizers = self._manual.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """Schedulers that do nothing."""
        schedulers = self._manual.lr_schedulers()
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []
        return [SimpleNamespace(scheduler=scheduler) for scheduler in schedulers]

    def __getattr__(self, name: str) -> Any:
        if name in _DURING_A_STEP:
            return _DURING_A_STEP[name]
        if name in MOMENT_NAMES and (value := getattr(self._moment, name)) is not None:
            return value
        if self._real is not None:
            return getattr(self._real, name)
        if name in _BY_DEFAULT:
            return copy.copy(_BY_DEFAULT[name])  # a list may be added to
        if name == "strategy":
            return SingleDeviceStrategy(self._device)
        if name[:2] == "__":
            raise AttributeError(name)
        vars(self)["missing"] = (
            f"The training_step of {self._name} reads `trainer.{name}`, but no Trainer is attached that says it. Pass "
            "the module that the Trainer has fitted, or say what the loss is: `loss=fn` with fn(model, batch) -> (B,)."
        )
        raise AttributeError(self.missing)

    def __setattr__(self, name: str, value: Any) -> None:
        pass


class Muted:
    """A logger that takes every call and does nothing; as a path it is the folder for temporary files."""

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__":
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Muted:
        """Take a call of any method."""
        return self

    def __getitem__(self, key: Any) -> Muted:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __enter__(self) -> Muted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Any:
        return iter(())

    def __fspath__(self) -> str:
        return tempfile.gettempdir()

    __str__ = __fspath__
