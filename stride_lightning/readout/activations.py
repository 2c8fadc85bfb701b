"""What enters the layers of a model: capture and pooling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stride_lightning.model.layers import before_layers

#: Spatial axes are average-pooled until an input has at most this many features.
MAX_POOLED_FEATURES = 4000
#: Wider inputs are folded to this many features by a seeded count sketch.
MAX_LAYER_FEATURES = 4000

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Captured(dict[str, Tensor]):
    """Features of each layer by name; of texts, tokens that the mask hides are left out."""

    mask: Tensor | None = None

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(
            f"Layer {name!r} did not run in the model's forward pass, so it has no input to build a basis from. "
            "Name layers that do, with `layers=[...]`."
        )

    def reads(self, inputs: Any) -> None:
        """Forget the last batch, and note which tokens of the next are padding."""
        self.clear()
        self.mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


@contextmanager
def capture_inputs(model: nn.Module, layers: Sequence[str]) -> Iterator[Captured]:
    """Collect the pooled input of each named layer at every forward pass inside the block.

    After a pass the dictionary holds, for every layer that ran, features of shape ``(B, d)``: the mean over calls if
    it ran several times. Call its ``reads(inputs)`` before each pass.

    Raises:
        ValueError: If a name is not a submodule.
        TypeError: If a layer's input is not a floating-point tensor with one row per example.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> with capture_inputs(model, ["0", "2"]) as captured:
        ...     _ = model(torch.ones(5, 3))
        >>> {name: tuple(features.shape) for name, features in captured.items()}
        {'0': (5, 3), '2': (5, 2)}
    """
    captured = Captured()
    calls: dict[str, int] = {}

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features = pool(module, first_tensor(name, args, kwargs), captured.mask)
        calls[name] = calls.get(name, 0) + 1 if name in captured else 1
        previous = captured.get(name)
        captured[name] = features if previous is None else previous + (features - previous) / calls[name]

    with before_layers(model, layers, hook):
        yield captured


def pool(module: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """One row of at most ``MAX_LAYER_FEATURES`` features per example, from what enters a layer.

    Token axes ``(B, tokens, d)`` are averaged, over the tokens of a mask ``(B, tokens)`` if there is one. Spatial axes,
    of convolutions and wherever there are four axes or more, come last and are pooled to a coarse grid.
    """
    inputs = rows_first(module, inputs.detach())
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    if mask is not None and inputs.ndim == 3 and inputs.shape[:2] == mask.shape:
        counted = mask.bool()[..., None]
        # Padding may hold anything, NaN too: no weight is not enough.
        summed = torch.where(counted, inputs, 0).sum(1)
        return fold(summed / counted.sum(1).clamp(min=1), MAX_LAYER_FEATURES)
    if isinstance(module, _CONVOLUTIONS) or inputs.ndim >= 4:
        spatial = inputs.ndim - 2
        side = max(1, int((MAX_POOLED_FEATURES / inputs.shape[1]) ** (1 / spatial) + 1e-9))
        grid = [min(side, size) for size in inputs.shape[2:]]
        if spatial <= 3 and grid != list(inputs.shape[2:]):
            average_pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[spatial - 1]
            inputs = average_pool(inputs, grid)  # type: ignore[arg-type]
        features = inputs.flatten(1)
    else:
        features = inputs.flatten(1, -2).mean(1) if inputs.ndim > 2 else inputs
    return fold(features, MAX_LAYER_FEATURES)


def fold(features: Tensor, width: int) -> Tensor:
    """Count sketch: each feature is added, with a random sign, to one of ``width`` sums; keeps inner products."""
    if features.shape[1] <= width:
        return features
    generator = torch.Generator().manual_seed(features.shape[1])
    target = torch.randint(width, (features.shape[1],), generator=generator).to(features.device)
    sign = (torch.randint(2, (features.shape[1],), generator=generator) * 2 - 1).to(features)
    return features.new_zeros(len(features), width).index_add_(1, target, features * sign)


def rows_first(module: nn.Module, inputs: Tensor) -> Tensor:
    """Recurrent layers and attention may take (tokens, batch, features)."""
    sequence_first = getattr(module, "batch_first", True) is False and inputs.ndim == 3
    return inputs.transpose(0, 1) if sequence_first else inputs


def first_tensor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor that a layer is called with, which must hold one row of numbers per example."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors or not tensors[0].is_floating_point() or tensors[0].ndim < 2:
        given = f"{tensors[0].dtype} of shape {tuple(tensors[0].shape)}" if tensors else "no tensor"
        raise TypeError(
            f"Layer {name!r} must take a floating-point tensor with one row per example; its first input is {given}. "
            "Name another layer, for instance the one after an embedding."
        )
    return tensors[0]
