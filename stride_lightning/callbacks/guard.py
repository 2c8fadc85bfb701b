"""The guard of callbacks: they never end the fit that they watch, and never change it."""

from __future__ import annotations

import functools
import gc
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn  # pyright: ignore[reportPrivateImportUsage]
from typing_extensions import override

from stride_lightning.runtime.distributed import RankError, leaving_together, world_size
from stride_lightning.runtime.progress import call
from stride_lightning.runtime.randomness import preserved_random_state

logger = logging.getLogger(__name__)

#: Environment variable: with the value 1 an error ends the fit, as it would without the guard.
RAISE = "STRIDE_LIGHTNING_RAISE"

_HOOKS = {name for name in vars(L.Callback) if name.startswith("on_")} | {"setup", "teardown"}
_STATE_HOOKS = {"state_dict", "load_state_dict"}  # these run even when the callback is off
_EARLY = ("setup", "load_state_dict", "on_load_checkpoint", "on_fit_start", "on_train_start")
_WHEN: dict[str, str] = {**dict.fromkeys(_EARLY, "before the first step"), "state_dict": "when a checkpoint was saved"}


class GuardedCallback(L.Callback):
    """A callback whose errors never end a fit, and whose work never changes it.

    Every hook that a subclass defines runs inside the guard. The first error is one warning, with its traceback in the
    log at debug level; for the rest of the fit the hooks do nothing. KeyboardInterrupt and SystemExit pass. With
    ``STRIDE_LIGHTNING_RAISE=1`` in the environment the error itself is raised.

    Work on the model or the data stands in a :meth:`working` block. In a distributed run the ranks leave it together,
    so they all turn off if one fails. An error outside such a block waits for the next one.
    """

    _hook = ""  # the hook that is running
    _problem = ""  # the error that turned the callback off, in words
    _stopped = ""  # when that was
    _unshared: Exception | None = None  # an error of this rank that the others do not know of

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in (_HOOKS | _STATE_HOOKS) & vars(cls).keys():
            setattr(cls, name, _guarded(vars(cls)[name]))

    @contextmanager
    def working(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
        """A block of work that every rank enters, and that all leave together if it fails on one.

        It draws no random number of the fit: generators that the model, the data or this callback hold are put back
        like the global ones.
        """
        try:
            with (
                call(show=trainer.progress_bar_callback is not None),
                leaving_together(),
                preserved_random_state(self, pl_module, trainer.train_dataloader, beyond=trainer),
            ):
                try:
                    if self._unshared is not None:
                        raise self._unshared
                    yield
                except Exception as error:
                    if not _raises():
                        _let_go(error)
                    raise
        except Exception as error:
            if not _raises():
                self._turn_off(error, trainer.global_step)
            raise

    def release(self) -> None:
        """Leave the model and its optimizers as they would be without the callback, which has been turned off."""

    def summary(self) -> str:
        """What a callback that was turned off has left behind, in a sentence."""
        return ""

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._problem:
            rank_zero_info(f"{type(self).__name__} stopped {self._stopped}. {self.summary()}")

    def _call(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = hook.__name__
        if self._hook:  # the hook of a subclass calls that of its base
            return hook(self, *args, **kwargs)
        if name == "setup":  # the first hook of a fit
            self._problem, self._unshared = "", None
        if self._problem and name not in _STATE_HOOKS:
            return None
        self._hook = name
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            if _raises():
                raise
            with preserved_random_state():
                _let_go(error)
            if world_size() == 1:
                self._turn_off(error, getattr(args[0], "global_step", 0) if args else 0)
            elif not self._problem:  # else the ranks have agreed already
                self._unshared = self._unshared or error
        finally:
            self._hook = ""
        return {} if name == "state_dict" else None

    def _turn_off(self, error: Exception, step: int) -> None:
        if self._problem:
            return
        self._problem = _described(error)
        self._stopped = _WHEN.get(self._hook, f"at step {step}")
        self.release()
        logger.debug("%s stopped %s", type(self).__name__, self._stopped, exc_info=error)
        message = (
            f"{type(self).__name__} stopped {self._stopped}; training goes on without it. {self._problem} "
            f"(Set {RAISE}=1 to stop at the error and see where it comes from.)"
        )
        try:
            rank_zero_warn(message)
        except UserWarning:  # warnings are errors here, and would end the fit
            logger.error(message)


def _guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def run(self: GuardedCallback, *args: Any, **kwargs: Any) -> Any:
        return self._call(hook, *args, **kwargs)

    return run


def _raises() -> bool:
    return os.environ.get(RAISE, "") == "1"


def _described(error: Exception) -> str:
    """An error in one line; with its kind and place, unless the message is meant to be read alone."""
    text = " ".join(str(error).split())
    if text and isinstance(error, ValueError | TypeError | RankError):
        return text
    *_, last = ["", *(f" ({frame.filename}:{frame.lineno})" for frame in traceback.extract_tb(error.__traceback__))]
    return f"{type(error).__name__}: {text}{last}"


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold: memory, and data being read, which puts random states back when closed."""
    chain, seen = error, set[int]()
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
    gc.collect()
