"""Layers of a model by name, and values in its precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: Names under which torch's wrappers, of FSDP and of activation checkpointing, hold the module inside.
WRAPPED = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def uncompiled() -> Any:
    """A context in which compiled modules run eagerly."""
    return torch.compiler.set_stance("force_eager")


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that dotted name, looking through ``torch.compile`` wrappers."""
    module = getattr(model, "_orig_mod", model)
    for part in name.split(".") if name else []:
        child = getattr(module, part, None)
        if not isinstance(child, nn.Module):
            known = ", ".join(repr(known) for known in layer_names(model)[:12])
            raise ValueError(f"{name!r} is not a submodule of {type(model).__name__}. Layers with weights: {known}.")
        module = getattr(child, "_orig_mod", child)
    return module


@contextmanager
def before_layers(model: nn.Module, layers: Iterable[str], hook: Callable[..., Any]) -> Iterator[None]:
    """Call ``hook(name, module, args, kwargs)`` before a named layer runs, inside the block only.

    Compiled modules run uncompiled meanwhile, since a compiled graph never calls hooks that were added later.
    """
    with ExitStack() as hooks, uncompiled():
        for name in layers:
            module = find_module(model, name)
            hooks.enter_context(module.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
        yield


def is_of_checkpointing(error: Exception) -> bool:
    """Whether torch raised an error because the model runs activation checkpointing (``torch.utils.checkpoint``)."""
    return any(words in str(error) for words in ("use_reentrant", "saved tensor hooks"))


def check_layers(layers: Sequence[str] | None) -> None:
    """Refuse a string, which is a sequence of letters, and lists without names or with one twice."""
    if isinstance(layers, str):
        raise TypeError(f"`layers` must be a list of names, got the string {layers!r}: write layers=[{layers!r}].")
    if layers is not None and not layers:
        raise ValueError("`layers` is empty: name at least one module, or leave it out for the default.")
    if layers is not None and len(set(layers)) < len(layers):
        raise ValueError(f"`layers` must be names of modules, each once; got {list(layers)}.")


def layer_names(model: nn.Module) -> list[str]:
    """Names of the layers with a weight matrix, embeddings left out: their inputs can be a basis."""
    names = []
    for name, module in model.named_modules():
        has_matrix = any(weight.ndim >= 2 for weight in module.parameters(recurse=False))
        if has_matrix and not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            names.append(plain_name(name))
    return names


def plain_name(name: str) -> str:
    """A dotted name without the parts that ``torch.compile`` and wrappers of torch add."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod" and part not in WRAPPED)


def cloned(inputs: Any) -> Any:
    """Inputs that a model may change in place, as one that normalises them does."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def in_precision_of(model: nn.Module, value: Any) -> Any:
    """Tensors (in tuples, lists and dicts) as plain tensors, those of numbers in the precision of a model's weights."""
    if isinstance(value, Tensor):
        kind, plain = cast("Any", type(value)), cast("Any", Tensor)
        # Subclasses that carry more, as monai's MetaTensor, change the methods of tensors. Wrappers of tensors stay.
        if kind is not plain and kind.__torch_dispatch__ is plain.__torch_dispatch__:
            value = value.as_subclass(Tensor)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), value.dtype)
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(in_precision_of(model, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(in_precision_of(model, item) for item in value)
    if isinstance(value, dict):
        return {key: in_precision_of(model, item) for key, item in value.items()}
    return value
