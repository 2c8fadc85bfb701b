"""A model whose weights are spread over processes (FSDP, tensor parallelism): its whole state, and a block for it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.model.layers import WRAPPED
from stride_lightning.runtime.distributed import gather_objects, is_running, meet, rank, world_size
from stride_lightning.runtime.memory import free_bytes

#: Registers of hooks that every module has.
_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("hooks"))
#: Packages whose hooks and methods spread the work of a module over processes.
_SHARDING = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed._composable")
#: How names of attributes begin in which a module holds what shards it: process groups, which nothing can copy.
_ATTRIBUTES = ("__composable_api_state_key", "_device_mesh")


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of a model's weights.

    Example:
        >>> is_sharded(nn.Linear(2, 1))
        False
    """
    if not is_running():  # a mesh of one process shards, too
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    root = _root_of(model)
    # FSDP2 leaves parameters whole after a forward pass without a backward pass.
    of_fsdp = any(isinstance(module, FSDPModule) for module in root.modules())
    return _is_fsdp(root) or of_fsdp or any(isinstance(tensor, DTensor) for tensor in _tensors_of(root))


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Turn a sharded model into a plain one inside the block, with all of its weights in every process.

    The parameters are gathered; the classes, wrappers and hooks that shard modules are set aside. After the block the
    sharded parameters stand where they were. If the model is sharded, every rank must enter the block; if not, nothing
    happens.

    Raises:
        ValueError: If a process has no room for the whole model.
    """
    if not is_sharded(model):
        yield
        return
    root = _root_of(model)
    with _made_plain(_gathered(root, _device_of(root), is_here=True)):
        yield


@contextmanager
def whole_on_rank_zero(model: nn.Module) -> Iterator[None]:
    """As :func:`whole`, but on rank 0 alone, with the weights on the CPU; the model of other ranks stays sharded.

    If the model is sharded, every rank must enter the block; if not, nothing happens.

    Raises:
        ValueError: If rank 0 has no room for the whole model.
    """
    if not is_sharded(model):
        yield
        return
    with _made_plain(_gathered(_root_of(model), torch.device("cpu"), is_here=rank() == 0)):
        yield


@contextmanager
def _made_plain(layouts: list[_Layout]) -> Iterator[None]:
    try:
        for layout in layouts:
            layout.make_plain()
        yield
    finally:
        for layout in layouts:
            layout.put_back()


class _Layout:
    """A module's parts without sharding, and with it."""

    def __init__(self, module: nn.Module, plain: dict[int, Tensor]) -> None:
        self.module, self.cls = module, type(module)
        self.plain: dict[str, dict[Any, Any]] = {
            "_parameters": {name: plain.get(id(value), value) for name, value in module._parameters.items()},
            "_buffers": {name: plain.get(id(value), value) for name, value in module._buffers.items()},
            "_modules": {name: _unwrapped(value) for name, value in module._modules.items()},
        }

    def make_plain(self) -> None:
        attributes = vars(self.module)
        for name in _HOOKS:
            self.plain[name] = {key: hook for key, hook in attributes[name].items() if not _shards(hook)}
        self.sharded = {name: dict(attributes[name]) for name in self.plain}
        self.attributes = {
            name: value
            for name, value in attributes.items()
            if name.startswith(_ATTRIBUTES)
            or name in self.plain["_parameters"]  # FSDP may hide parameters behind attributes
            or (isinstance(value, MethodType) and _shards(value))
        }
        for name in self.attributes:
            del attributes[name]
        self._fill(self.plain)
        self.module.__class__ = _plain_class(self.cls)

    def put_back(self) -> None:
        self.module.__class__ = self.cls
        self._fill(self.sharded)
        vars(self.module).update(self.attributes)

    def _fill(self, registers: dict[str, dict[Any, Any]]) -> None:
        for name, content in registers.items():
            register = vars(self.module)[name]
            register.clear()
            register.update(content)


def _gathered(root: nn.Module, device: torch.device, *, is_here: bool) -> list[_Layout]:
    """Layouts of all modules but wrappers, with whole parameters on a device; none if they are not wanted here."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    num_bytes = _num_bytes(root)
    _check_room(num_bytes if is_here else 0, device)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    unsharded = FullyShardedDataParallel.summon_full_params(root, writeback=False) if _is_fsdp(root) else nullcontext()
    with unsharded, torch.no_grad():
        plain = _copies(root, device, is_here=is_here)
        modules = root.modules() if is_here else ()
        return [_Layout(module, plain) for module in modules if not WRAPPED & module._modules.keys()]


def _copies(root: nn.Module, device: torch.device, *, is_here: bool) -> dict[int, Tensor]:
    """Whole copies of all parameters and of sharded buffers, by the id of the tensor."""
    from torch.distributed.tensor import DTensor

    sources = {id(value): value for value in root.parameters()}
    sources |= {id(value): value for value in root.buffers() if isinstance(value, DTensor)}
    # All memory is taken before the first collective: a rank that has too little must not leave others waiting.
    copies = {
        key: torch.empty(value.shape, dtype=value.dtype, device=device) for key, value in sources.items() if is_here
    }
    spare = torch.empty(2 * max(map(_bytes_of, sources.values())), dtype=torch.uint8, device=_device_of(root))
    del spare
    meet()
    for key, value in sources.items():
        full = _full(value) if isinstance(value, DTensor) else value
        if is_here:
            copies[key].copy_(full)
    return {
        key: nn.Parameter(copy, sources[key].requires_grad) if isinstance(sources[key], nn.Parameter) else copy
        for key, copy in copies.items()
    }


def _full(shard: Any) -> Tensor:
    return shard.to(shard.device_mesh.device_type).full_tensor()  # a shard on the CPU goes where the processes talk


def _check_room(num_bytes: int, device: torch.device) -> None:
    """Refuse, on all ranks alike, what has no room on one."""
    # On a CPU the processes of one machine share the memory.
    place = socket.gethostname() if device.type == "cpu" else f"{socket.gethostname()} {device} {rank()}"
    needed, free = dict[str, int](), dict[str, int]()
    for where, number, room in gather_objects((place, num_bytes, free_bytes(device))):
        needed[where] = needed.get(where, 0) + number
        free[where] = min(room, free.get(where, room))
    for where, number in needed.items():
        if number > free[where]:
            raise ValueError(
                f"The model's weights are spread over {world_size()} processes, and gathering them takes {number:,} "
                f"bytes of memory on {where}, which has {free[where]:,} left. Attribute the checkpoint after "
                "training, where more memory is free."
            )


def _root_of(model: nn.Module) -> nn.Module:
    """The wrapper of FSDP around a LightningModule, which its strategy holds; else the model."""
    root = getattr(vars(model).get("_trainer"), "model", None)
    return root if root is not None and _is_fsdp(root) else model


def _is_fsdp(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def _unwrapped(module: Any) -> Any:
    """A module without wrappers of FSDP and of activation checkpointing."""
    while module is not None and (names := WRAPPED & module._modules.keys()):
        module = module._modules[names.pop()]
    return module


def _plain_class(cls: type) -> type:
    """The class of a module before FSDP2 put its own in front."""
    from torch.distributed.fsdp import FSDPModule

    return next(base for base in cls.__mro__ if not issubclass(base, FSDPModule))


def _shards(function: Any) -> bool:
    """Whether a hook or method is torch's, by where it was written: a method that it wraps lends it its name."""
    written = getattr(getattr(function, "__func__", function), "__globals__", {}).get("__name__")
    return (written or getattr(function, "__module__", None) or "").startswith(_SHARDING)


def _tensors_of(root: nn.Module) -> Iterator[Tensor]:
    return chain(root.parameters(), root.buffers())


def _num_bytes(root: nn.Module) -> int:
    num_bytes = sum(map(_bytes_of, _tensors_of(root)))
    return sum(gather_objects(num_bytes)) if _is_fsdp(root) else num_bytes  # FSDP shows only the process's part


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _device_of(root: nn.Module) -> torch.device:
    """Where the processes exchange weights."""
    from torch.distributed.tensor import DTensor

    meshes = (tensor.device_mesh.device_type for tensor in _tensors_of(root) if isinstance(tensor, DTensor))
    return torch.device(next(meshes, next(_tensors_of(root)).device))
