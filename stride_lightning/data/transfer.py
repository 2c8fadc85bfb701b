"""The hooks through which a Trainer moves batches, in the stage in which they are moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from stride_lightning.runtime.operations import Operations
from stride_lightning.runtime.randomness import mix, seeded
from stride_lightning.runtime.row_draws import RowDraws

_AROUND = ("on_before_batch_transfer", "on_after_batch_transfer")


def overridden_hook(owner: object, name: str) -> Callable[..., Any] | None:
    """A data hook that a data module or a model defines, not Lightning's default."""
    method = getattr(owner, name, None)  # of the object: LightningDataModule.from_datasets() sets them there
    return None if method is None or method.__qualname__.startswith("DataHooks.") else method


def transferred(
    batch: Any,
    device: torch.device,
    owners: tuple[Any, ...],
    *,
    is_training: bool,
    keys_of: Callable[[], Tensor] | None = None,
    seed: int = 0,
) -> Any:
    """Move a batch through the hooks of its owners, first match wins, so that the model sees the batches of training.

    Args:
        batch: The batch.
        device: Where it goes.
        owners: The data module and the model.
        is_training: Whether hooks see a Trainer that trains; else one that neither trains nor validates.
        keys_of: Gives a number for each example, to which what hooks draw belongs; None leaves the random generators
            alone.
        seed: Beside the keys.
    """

    def hook(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return next((method for owner in owners if (method := overridden_hook(owner, name))), default)

    with ExitStack() as stack:
        if any(overridden_hook(owner, name) for owner in owners for name in _AROUND):
            for owner in owners:
                stack.enter_context(_in_stage(owner, is_training))
            if keys_of is not None:
                keys = keys_of()
                stack.enter_context(seeded(mix(seed, *keys.tolist())))
                stack.enter_context(Operations(RowDraws(keys, seed)))
        batch = hook(_AROUND[0], lambda value, _: value)(batch, 0)
        move = hook("transfer_batch_to_device", lambda value, where, _: move_data_to_device(value, where))
        batch = move(batch, device, 0)
        return hook(_AROUND[1], lambda value, _: value)(batch, 0)


@contextmanager
def _in_stage(owner: Any, is_training: bool) -> Iterator[None]:
    """Let an owner, and its Trainer, be in a stage; one without a Trainer gets what says so."""
    attributes: dict[str, Any] = getattr(owner, "__dict__", {})
    name = "_trainer" if isinstance(owner, nn.Module) else "trainer"
    saved = {key: attributes[key] for key in (name, "training") if key in attributes}
    trainer = saved.get(name)
    stage = getattr(getattr(trainer, "state", None), "stage", None)
    try:
        if trainer is None:
            attributes[name] = _Stage(training=is_training)
        elif hasattr(trainer, "state"):
            trainer.training = is_training
        if "training" in saved:
            attributes["training"] = is_training
        yield
    finally:
        if trainer is not None and hasattr(trainer, "state"):
            trainer.state.stage = stage
        for key in {name, "training"} & attributes.keys():
            del attributes[key]
        attributes.update(saved)


class _Stage(SimpleNamespace):
    """A Trainer's stage, where none is attached."""

    validating = testing = predicting = sanity_checking = False
    world_size, global_rank, local_rank, current_epoch, global_step = 1, 0, 0, 0, 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"A hook that moves batches reads `trainer.{name}`, but no Trainer is attached that says it. Pass the data "
            "module and the module that the Trainer has fitted."
        )
