"""Checkpoints of a Trainer: where they are, reading them, and the weights that they hold."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from stride_lightning.model.pickled_objects import pickled_objects
from stride_lightning.model.shards import read_weights, rest_of
from stride_lightning.model.state import check_fits, left_to
from stride_lightning.model.weights import attached_trainer
from stride_lightning.runtime.checks import first_line


def load_checkpoint(ckpt_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        ckpt_path: The file, or the folder of a distributed checkpoint, whose weights are put together.
        weights_only: As in ``torch.load``: unless it is False, no code that is stored in the file runs.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or holds objects and ``weights_only`` is not False; their keys are named.
    """
    path = Path(ckpt_path)
    file = rest_of(path) or path
    if not file.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only)
        if file != path:
            checkpoint["state_dict"] = read_weights(path, weights_only)
    except Exception as error:  # a damaged file raises anything
        if weights_only is not False and (objects := pickled_objects(file)):
            shown = ", ".join(f"{key!r} ({kind})" for key, kind in list(objects.items())[:3])
            more = f" and {len(objects) - 3} more" if len(objects) > 3 else ""
            raise ValueError(
                f"The checkpoint {path} holds objects besides tensors and plain values: {shown}{more}. Loading them "
                "may run code that is stored in the file. If you trust the file, pass weights_only=False."
            ) from error
        if isinstance(error, AttributeError | ImportError):
            raise ValueError(
                f"The checkpoint {path} holds an object whose class cannot be imported here ({error}). Import the "
                "module that defines it, or make it importable."
            ) from error
        is_refused = isinstance(error, UnpicklingError) and weights_only is not False
        detail = (
            "torch refuses it with weights_only=True" if is_refused else f"{type(error).__name__}: {first_line(error)}"
        )
        raise ValueError(
            f"The checkpoint {path} cannot be read; it may be damaged, cut short or no checkpoint ({detail}). "
            "Copy it again, or pass another."
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"The checkpoint {path} holds a {type(checkpoint).__name__}, expected a dictionary. Pass one that a "
            "Trainer wrote."
        )
    return checkpoint


def resolve_ckpt_path(ckpt_path: str | Path, model: nn.Module) -> Path:
    """The file of a checkpoint that is given by path, or as ``"best"`` or ``"last"`` of the model's trainer."""
    if ckpt_path not in ("best", "last"):
        return Path(ckpt_path)
    trainer = attached_trainer(model)
    if trainer is None:
        raise ValueError(
            f"ckpt_path={ckpt_path!r} is looked up in the model's trainer, but {type(model).__name__} is not attached "
            "to one. Pass the path of a checkpoint file."
        )
    path = getattr(trainer.checkpoint_callback, f"{ckpt_path}_model_path", "")
    if not path:
        hint = "save_last=True" if ckpt_path == "last" else "a ModelCheckpoint"
        raise ValueError(
            f"ckpt_path={ckpt_path!r}: the model's trainer has saved no {ckpt_path} checkpoint. Train with {hint}, or "
            "pass the path of a checkpoint file."
        )
    return Path(path)


def weights_in(checkpoint: Mapping[str, Any], model: nn.Module) -> tuple[Mapping[str, Any], str]:
    """The weights in a checkpoint, and a sentence about those that are not in it because they are frozen, if any.

    Raises:
        ValueError: If they do not fit the model, or lack weights that are trained.
    """
    state = checkpoint.get("state_dict", checkpoint)
    check_fits(model, state)
    rest = left_to(model, state)
    if not rest:
        return state, ""
    shown = ", ".join(rest[:2]) + (", ..." if len(rest) > 2 else "")
    return state, (
        f"{len(rest)} frozen tensors ({shown}) are not in the checkpoint, so the model's are taken as they are"
    )


def warn_of_frozen(checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """Warn of parameters that the optimizer of a checkpoint has moved and that require no gradient in the model."""
    states = checkpoint.get("optimizer_states") or []
    moved = len(states[0].get("state", ())) if len(states) == 1 else 0  # several may hold the same parameters
    trains = sum(parameter.requires_grad for parameter in model.parameters())
    if moved > trains:
        warnings.warn(
            f"The checkpoint's optimizer has trained {moved} parameters, and {trains} of {type(model).__name__} "
            "require gradients now: scores are about these alone. Set requires_grad as it was at the end of training.",
            stacklevel=2,
        )
