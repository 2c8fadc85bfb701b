"""Gradients of a layer's parameters from its input and the gradient of its output: one rule per kind of layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from typing_extensions import override

from stride_lightning.model.blocks import Outer


@dataclass
class Call:
    """One run of a module: its arguments, and the places in the graph where its outputs were made."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    edges: list[Any] = field(default_factory=list)


class LayerRule(ABC):
    """Gradients in the weight matrix of a layer as outer products.

    The bias is joined to the matrix if there is one: one more column (or row) whose input is always 1.
    """

    def __init__(self, module: nn.Module, has_bias: bool) -> None:
        self.module, self.has_bias = module, has_bias

    @abstractmethod
    def outer(self, call: Call, coming_back: Tensor, num_examples: int) -> Outer:
        """The factors of every example's gradient, from one call and the gradient of its output."""

    #: Along which axis of the matrix the bias is joined.
    bias_axis = 1
    #: The factor that is made of the layer's input; it is the same for all functions of the outputs.
    entered_side = "right"


class LinearRule(LayerRule):
    """``W x + b``: the gradient of the output times the input."""

    @override
    def outer(self, call: Call, coming_back: Tensor, num_examples: int) -> Outer:
        entered = _places(call.args[0].detach(), num_examples)
        return Outer(_places(coming_back, num_examples), _with_one(entered, self.has_bias), coming_back.shape[-1])


class TransposedLinearRule(LayerRule):
    """``x W + b``, the Conv1D of transformers: the input times the gradient of the output."""

    bias_axis, entered_side = 0, "left"

    @override
    def outer(self, call: Call, coming_back: Tensor, num_examples: int) -> Outer:
        entered = _with_one(_places(call.args[0].detach(), num_examples), self.has_bias)
        return Outer(entered, _places(coming_back, num_examples), entered.shape[-1])


class ConvolutionRule(LayerRule):
    """A convolution is a matrix product at every place, of the patch of the input under the kernel."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @override
    def outer(self, call: Call, coming_back: Tensor, num_examples: int) -> Outer:
        module, dims = self.module, len(self.module.kernel_size)
        if len(coming_back) != num_examples or coming_back.ndim != dims + 2:
            raise UnusualShape
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = F.pad(call.args[0].detach(), module._reversed_padding_repeated_twice, mode=mode)
        for axis in range(dims):
            kernel, dilation = module.kernel_size[axis], module.dilation[axis]
            inputs = inputs.unfold(axis + 2, dilation * (kernel - 1) + 1, module.stride[axis])[..., ::dilation]
        # (B, channels, *places, *kernel) -> (B, places, channels * kernel)
        order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
        patches = _with_one(inputs.permute(order).flatten(1 + dims).flatten(1, dims), self.has_bias)
        return Outer(coming_back.flatten(2).transpose(1, 2), patches, coming_back.shape[1])


class EmbeddingRule(LayerRule):
    """A table lookup: the rows that were read."""

    module: nn.Embedding
    entered_side = "left"

    @override
    def outer(self, call: Call, coming_back: Tensor, num_examples: int) -> Outer:
        (tokens,) = call.args or tuple(call.kwargs.values())
        back = _places(coming_back, num_examples)
        if len(tokens) == 1:  # positions, the same for all examples: the output was repeated
            tokens = tokens.expand(num_examples, *tokens.shape[1:])
        tokens = tokens.flatten(1) if tokens.ndim > 1 else tokens[:, None]
        if tokens.shape != back.shape[:2]:
            raise UnusualShape
        if self.module.padding_idx is not None:
            back = back * (tokens != self.module.padding_idx)[..., None]
        return Outer(tokens, back, self.module.num_embeddings)


class UnusualShape(ValueError):
    """The input or the gradient of a layer does not have one part per example along its first axis."""


def rule_for(module: nn.Module) -> type[LayerRule] | None:
    """The rule of a kind of layer; None if its gradients have no factors that are known here."""
    if isinstance(module, nn.Linear):
        return LinearRule
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return ConvolutionRule
    if isinstance(module, nn.Embedding) and not module.scale_grad_by_freq:  # which looks at the whole batch
        return EmbeddingRule
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers, which need not be installed
        return TransposedLinearRule
    return None


def gradients_through(
    module: nn.Module,
    call: Call,
    coming_back: list[Tensor | None],
    parameters: Mapping[str, Tensor],
    num_examples: int,
    is_cut: Sequence[bool],
    *,
    vectorized: bool,
) -> dict[str, Tensor]:
    """Each example's gradients in some parameters of any module, by running it again for each example.

    ``coming_back`` holds the gradients of the call's output tensors, None for an unused one. ``is_cut`` says which
    leaves of the call have one part per example along their first axis. If ``vectorized``, all examples go at once
    through ``torch.vmap``.

    Returns:
        Gradients of shape ``(B, *parameter.shape)`` by name, in the order of the parameters.
    """
    leaves, layout = pytree.tree_flatten((call.args, call.kwargs))
    cut = [leaf.detach() for leaf, yes in zip(leaves, is_cut, strict=True) if yes]
    used = [back for back in coming_back if back is not None]
    if any(len(tensor) != num_examples for tensor in (*cut, *used)):
        raise UnusualShape

    def outputs(given: dict[str, Tensor], pieces: list[Tensor]) -> list[Tensor]:
        remaining = iter(pieces)
        filled = [next(remaining)[None] if yes else leaf for leaf, yes in zip(leaves, is_cut, strict=True)]
        args, kwargs = pytree.tree_unflatten(filled, layout)
        made = output_tensors(functional_call(module, given, args, kwargs))
        return [tensor for tensor, b in zip(made, coming_back, strict=True) if b is not None]

    def one(pieces: list[Tensor], back: list[Tensor]) -> dict[str, Tensor]:
        pull = vjp(lambda given: outputs(given, pieces), dict(parameters))[1]
        return pull([piece[None] for piece in back])[0]

    def one_alone(pieces: list[Tensor], back: list[Tensor]) -> dict[str, Tensor]:
        # Plain autograd: torch.func cannot differentiate everything, such as an LSTM in single precision.
        given = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        with torch.enable_grad():
            made = outputs(given, pieces)
        back = [piece[None] for piece in back]
        gradients = torch.autograd.grad(made, [*given.values()], back, allow_unused=True, materialize_grads=True)
        return dict(zip(given, gradients, strict=True))

    if not vectorized:
        each = [one_alone([leaf[i] for leaf in cut], [b[i] for b in used]) for i in range(num_examples)]
        return {name: torch.stack([gradients[name] for gradients in each]) for name in parameters}
    # Attention has a vectorised form in this backend only.
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(one)(cut, used)


def lengths(call: Call) -> list[int | None]:
    """Length of the first axis of every leaf of a call; None for a leaf that is no tensor."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    return [len(leaf) if isinstance(leaf, Tensor) and leaf.ndim > 0 else None for leaf in leaves]


def output_tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a module's outputs, in order."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _places(values: Tensor, num_examples: int) -> Tensor:
    """Shape ``(B, places, features)``, of ``(B, d)`` or ``(B, ..., d)``."""
    # Not of the rows of all examples after one another: how many each has may differ.
    if values.ndim < 2 or len(values) != num_examples:
        raise UnusualShape
    return values.reshape(num_examples, -1, values.shape[-1])


def _with_one(entered: Tensor, has_bias: bool) -> Tensor:
    return F.pad(entered, (0, 1), value=1.0) if has_bias else entered
