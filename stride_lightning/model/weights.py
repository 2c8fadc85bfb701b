"""The weights of a model: loading them from a checkpoint, their hash, and borrowing the model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from threading import RLock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stride_lightning.model.contents import Contents
from stride_lightning.model.layers import plain_name
from stride_lightning.model.pickled_objects import pickled_objects
from stride_lightning.model.sharded import whole
from stride_lightning.model.shards import read_weights, rest_of
from stride_lightning.runtime.checks import first_line
from stride_lightning.runtime.distributed import all_equal, broadcast_object, world_size


def weight_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, whatever device they are on and whether compiled or not.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> before = weight_hash(layer)
        >>> _ = torch.nn.init.constant_(layer.bias, 7.0)
        >>> before == weight_hash(layer)
        False
    """
    return state_hash(model.state_dict())


def state_hash(state: Mapping[str, Any]) -> str:
    """The :func:`weight_hash` of a model that holds this state."""
    hasher = hashlib.sha256()
    tensors = {plain_name(name): value for name, value in state.items() if isinstance(value, Tensor)}
    for name in sorted(tensors):
        value = tensors[name]
        hasher.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        hasher.update(raw_bytes(value))
    return hasher.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    r"""The bytes of a dense tensor's values, in order, whatever its device and strides.

    Example:
        >>> raw_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)
        b'\x01\x03\x02\x04'
    """
    # A clone, because torch calls a tensor of one element contiguous whatever its stride.
    values = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return values.flatten().view(torch.uint8).numpy().tobytes()


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


def attached_trainer(model: nn.Module) -> Any | None:
    """The trainer a LightningModule is attached to, if any."""
    try:
        trainer = getattr(model, "trainer", None)
    except RuntimeError:  # Lightning raises it where a module was never attached
        return None
    return trainer if hasattr(trainer, "callbacks") else None  # Fabric attaches something that looks like a trainer


def rank_zero_state(model: nn.Module) -> dict[str, Any] | None:
    """Rank 0's weights where they differ between ranks (BatchNorm's statistics do under DDP), else None.

    A collective call. Rank 0's weights are the ones that checkpoints hold.
    """
    if world_size() == 1 or all_equal(weight_hash(model)):
        return None
    return cast("dict[str, Any]", broadcast_object(model.state_dict()))


_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """A block of a call that borrows a model, which is whole inside: other threads that ask for the model wait."""
    with _locks.setdefault(model, RLock()), whole(model):
        yield


@contextmanager
def borrowed(
    model: nn.Module, state: Mapping[str, Tensor] | None, device: torch.device | None
) -> Iterator[torch.device]:
    """Put a model in eval mode, on a device, with other weights if given; afterwards the model is as before.

    Args:
        model: The caller's model.
        state: Weights to load, by plain name; refused as by :func:`check_fits`. None leaves the model's weights.
        device: Where to run; the model's device by default. It is yielded.
    """
    # A forward pass may count, log, or keep what it computed: attributes, buffers and metrics are put back, and
    # `self.log` does nothing meanwhile.
    contents = Contents(model)
    buffers = [(buffer, buffer.detach().clone(), _version(buffer)) for buffer in model.buffers()]
    tensors = [
        (value, value.detach().clone(), value._version)
        for module in model.modules()
        for value in vars(module).values()
        if type(value) is Tensor and not value.is_inference()
    ]
    silenced = [name for name in ("log", "log_dict") if hasattr(model, name) and name not in vars(model)]
    home = next((value.device for value in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    device = home if device is None else device
    saved = None
    try:
        if state is not None:
            fitting = check_fits(model, state)
            saved = {
                name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
                for name, value in model.state_dict().items()
            }
            model.load_state_dict(fitting)
        if device != home:
            model.to(device)
        model.eval()
        for name in silenced:
            setattr(model, name, lambda *_, **__: None)
        yield device
    finally:
        if device != home:
            model.to(home)
        if saved is not None:
            model.load_state_dict(saved)
        contents.restore()
        with torch.no_grad():
            for buffer, value, version in buffers:
                if version is None or buffer._version != version:  # else a graph that holds it would be spoilt
                    buffer.copy_(value)
            for tensor, value, version in tensors:
                if tensor._version != version:
                    tensor.copy_(value)


@contextmanager
def moved(model: nn.Module, size: float = 1.0) -> Iterator[None]:
    """Move a model's weights inside the block by noise of their own spread: at some weights losses look alike."""
    state, generator = dict(model.state_dict()), torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if name in state and value.is_floating_point():
            spread = float(value.detach().float().std()) if value.numel() > 1 else 0.0
            noise = torch.randn(value.shape, generator=generator).to(value)
            state[name] = value.detach() + size * (spread or 0.1) * noise
    with borrowed(model, state, None):
        yield


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def check_fits(model: nn.Module, state: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The weights under the names that the model has for them, not loaded; both sides may or may not be compiled.

    Raises:
        ValueError: If they are of another architecture, naming the parameters after ``where``.

    Example:
        >>> sorted(check_fits(nn.Linear(2, 1), nn.Linear(2, 1).state_dict()))
        ['bias', 'weight']
    """
    names = {plain_name(name): name for name in model.state_dict()}
    ours = {plain_name(name): value for name, value in model.state_dict().items()}
    # Records hold tensors alone. Other state (`get_extra_state`) stays as the model has it.
    extra = {name: value for name, value in ours.items() if not isinstance(value, Tensor)}
    given = extra | {plain_name(name): value for name, value in state.items()}
    missing, unexpected = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    wrong = []
    for name in sorted(names.keys() & given.keys()):
        shapes = [tuple(value.shape) for value in (given[name], ours[name]) if isinstance(value, Tensor)]
        if len(set(shapes)) == 2:
            wrong.append(f"{name} is {shapes[0]}, the model has {shapes[1]}")
    if missing or unexpected or wrong:
        parts = [
            f"missing: {', '.join(missing[:5])}" if missing else "",
            f"not in the model: {', '.join(unexpected[:5])}" if unexpected else "",
            f"other shape: {'; '.join(wrong[:3])}" if wrong else "",
        ]
        raise ValueError(
            f"{where}The checkpoint's weights do not fit {type(model).__name__} "
            f"({' | '.join(filter(None, parts))}). Build the model with the settings it was trained with, and if it "
            "makes its layers in configure_model() or setup(), call that first."
        )
    return {names[name]: value for name, value in given.items()}
