"""The slopes of a measure of queries at the outputs of the readout, which take the place of the network's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stride_lightning.data.examples import Examples
from stride_lightning.model.layers import find_module, in_precision_of, plain_name, uncompiled
from stride_lightning.model.tap import Key, recorded_outputs
from stride_lightning.tasks.own_loss import Lowered, RowFunction, name_of
from stride_lightning.tasks.task import Task, columns


def measure_slopes(
    measure: RowFunction,
    model: nn.Module,
    task: Task,
    queries: Examples,
    outputs: Tensor,
    *,
    batch_size: int,
    device: torch.device,
) -> Tensor:
    """Slopes of minus a measure of each query at the outputs of the readout, shape ``(q, C)``.

    The measure runs the network. Inside it, the outputs of the readout take the place of the network's.

    Args:
        measure: ``measure(model, batch)`` returns a number for each query, shape ``(B,)``.
        model: In eval mode on ``device``.
        task: The likelihood, which reads the network's outputs.
        queries: The queries.
        outputs: Outputs of the readout for the queries, shape ``(q, C)``.
        batch_size: Queries per forward pass.
        device: Device of the computation.

    Raises:
        ValueError: If the measure does not depend on the outputs that the task reads.
    """
    step = Lowered(measure).of(model, None, "eval")
    parts, start = [], 0
    for batch, digests in queries.batches(batch_size, device):
        batch = in_precision_of(model, batch)
        places = slice(start, start + len(digests))
        keys = queries.positions[places].to(device)
        with torch.no_grad():
            expected = columns(task.outputs(model, in_precision_of(model, task.inputs(batch)))).flatten(1)
        key = _output_read(step, model, (batch, keys), expected, measure)
        parts.append(_slopes(step, model, (batch, keys), key, outputs[places]))
        start = places.stop
    return torch.cat(parts)


def _output_read(step: Any, model: nn.Module, inputs: Any, expected: Tensor, measure: RowFunction) -> Key:
    """The module's output with the values that the task reads, on which the measure depends."""
    names = [plain_name(name) for name, _ in model.named_modules()]
    with recorded_outputs(model, names) as recorded:
        value = step(*inputs)
    alike = {
        key: tensor
        for key, tensor in recorded.items()
        if tensor.numel() == expected.numel() and torch.allclose(tensor.reshape(expected.shape).to(expected), expected)
    }
    slopes = torch.autograd.grad(value, [*alike.values()], allow_unused=True) if alike else ()
    keys = [key for key, slope in zip(alike, slopes, strict=True) if slope is not None]
    if not keys:
        raise ValueError(
            f"STRIDE explains functions of the network's outputs, and {name_of(measure)}(model, batch) does not read "
            "those of the batch that the task reads. Call the model on the batch inside it, or use another method, "
            "such as 'ekfac'."
        )
    return keys[-1]


def _slopes(step: Any, model: nn.Module, inputs: Any, key: Key, outputs: Tensor) -> Tensor:
    name, call, index = key
    leaf = outputs.detach().requires_grad_()
    calls = -1

    def hook(_: nn.Module, __: Any, result: Any) -> Any:
        nonlocal calls
        calls += 1
        leaves, structure = pytree.tree_flatten(result)
        if calls == call:
            leaves[index] = leaf.to(leaves[index]).reshape(leaves[index].shape)
        return pytree.tree_unflatten(leaves, structure)

    with find_module(model, name).register_forward_hook(hook), uncompiled(), torch.enable_grad():
        value = step(*inputs)
    (slopes,) = torch.autograd.grad(value, leaf)
    return slopes
