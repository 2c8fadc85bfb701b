"""A block after which objects are as before, whatever ran in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stride_lightning.model.contents import Contents
from stride_lightning.model.write_guard import WriteGuard
from stride_lightning.runtime.operations import Operations, Watcher


@contextmanager
def undisturbed(*owners: object, watchers: tuple[Watcher, ...] = ()) -> Iterator[None]:
    """Put objects back after the block: attributes, containers, generators, tensors, gradients.

    Inside the block the tensors have no gradients, so that one that is there at the end comes from the block. A graph
    that was made inside can be used afterwards.

    Args:
        owners: Modules and other objects; everything that they hold counts, but not the Trainer, loaders and data sets.
        watchers: What else sees the operations in the block.

    Example:
        >>> import torch
        >>> layer = torch.nn.BatchNorm1d(2)
        >>> with undisturbed(layer):
        ...     _ = layer(torch.randn(5, 2))
        ...     layer.calls = 1
        >>> layer.num_batches_tracked, hasattr(layer, "calls")
        (tensor(0), False)
    """
    contents = Contents(*owners)
    leaves = [(tensor, tensor.requires_grad, tensor.grad) for tensor in contents.tensors if tensor.is_leaf]
    try:
        for tensor, _, gradient in leaves:
            if gradient is not None:
                tensor.grad = None
        with WriteGuard(contents.tensors) as guard, Operations(guard, *watchers):
            yield
    finally:
        contents.restore()
        for tensor, is_trained, gradient in leaves:
            if tensor.requires_grad is not is_trained:
                tensor.requires_grad_(is_trained)
            if tensor.grad is not gradient:
                tensor.grad = gradient
