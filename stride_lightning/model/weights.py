"""The weights of a model: their hash, and borrowing the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from threading import RLock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stride_lightning.model.contents import Contents
from stride_lightning.model.digests import digest_of, hash_of_digests, model_digests
from stride_lightning.model.layers import plain_name
from stride_lightning.model.sharded import whole
from stride_lightning.model.state import check_fits, load_state, whole_state
from stride_lightning.runtime.distributed import all_equal, broadcast_object, world_size


def weight_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, whatever device they are on and whether compiled or not.

    It is that of :func:`~stride_lightning.model.digests.model_digests`, so what does not train is hashed once.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> before = weight_hash(layer)
        >>> _ = torch.nn.init.constant_(layer.bias, 7.0)
        >>> before == weight_hash(layer)
        False
    """
    return hash_of_digests(model_digests(model))


def state_hash(state: Mapping[str, Any]) -> str:
    """The :func:`weight_hash` of a model that holds this state."""
    tensors = {plain_name(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return hash_of_digests({name: digest_of(value) for name, value in tensors.items()})


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
    model: nn.Module, state: Mapping[str, Tensor] | None, device: torch.device | None, *, whole: bool = True
) -> Iterator[torch.device]:
    """Put a model in eval mode, on a device, with other weights if given; afterwards the model is as before.

    Args:
        model: The caller's model.
        state: Weights to load, by plain name; refused as by :func:`check_fits`. None leaves the model's weights.
        device: Where to run; the model's device by default. It is yielded.
        whole: Whether only what is frozen may be left to the model; else any weights that are not given stay.
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
            fitting = check_fits(model, state, whole=whole)
            saved = {name: _copy(value) for name, value in whole_state(model).items() if name in fitting}
            load_state(model, fitting)
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
            load_state(model, saved)
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
    names, generator = nn.Module.state_dict(model).keys(), torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, value in model.named_parameters():
        if name in names and value.is_floating_point():
            spread = float(value.detach().float().std()) if value.numel() > 1 else 0.0
            noise = torch.randn(value.shape, generator=generator).to(value)
            state[name] = value.detach() + size * (spread or 0.1) * noise
    with borrowed(model, state, None, whole=False):
        yield


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
