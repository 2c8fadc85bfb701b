"""Features of a network: what enters its layers, each at its scale, evaluated in one pass over a data set."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import Reading, Rows, required
from stride_lightning.model.layers import before_layers, layer_names, plain_name
from stride_lightning.readout.activations import Captured, capture_inputs, first_tensor, fold, rows_first
from stride_lightning.runtime.checks import check_finite
from stride_lightning.runtime.progress import announce
from stride_lightning.tasks.inference import check_outputs
from stride_lightning.tasks.likelihoods import Task

#: Most layers that are chosen when the user names none.
MAX_LAYERS = 8
#: Features of more examples than these are folded to so many: coordinates need a square matrix of either size.
MAX_FEATURES = 4096
#: Examples of a forward pass that finds out about a network.
FIRST_EXAMPLES = 8
#: Bytes of the activations of a forward pass; on a GPU, a quarter of what is free.
FORWARD_BYTES = 2**28
#: Bytes of the training set's features in memory; on a GPU, half of what is free.
MAX_BYTES = 2**30


@dataclass(frozen=True)
class FeatureMap:
    r"""Features ``phi(x) = [sqrt(b_1) z_1 / s_1, ..., sqrt(b_L) z_L / s_L, 1]`` of the inputs ``z_l`` of L layers.

    The scale ``s_l^2`` is the mean of ``||z_l||^2`` over the training set and ``b_l = 2 (L - l + 1) / (L (L + 1))``:
    the first layer counts most, and ``||phi||^2`` is about 2 whatever the network is.

    Args:
        layers: Names of the layers, in the order they run.
        widths: Features of each layer; wider inputs are folded to them by a seeded count sketch.
        scales: ``s_l``, float64 of shape ``(L,)``.
        most_rows: Most examples of a forward pass, so that activations fit ``FORWARD_BYTES``.

    Reference: arXiv:2606.05165 (STRIDE), the basis B of the steering operators; here it is read off the activations.
    """

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    scales: Tensor
    most_rows: int

    def __call__(self, captured: Captured) -> Tensor:
        """Features of a batch from its layers' inputs, shape ``(B, r)``."""
        parts = [
            fold(captured[name], width) * factor
            for name, width, factor in zip(self.layers, self.widths, self.factors.tolist(), strict=True)
        ]
        return torch.cat([*parts, torch.ones_like(parts[0][:, :1])], 1)

    @property
    def factors(self) -> Tensor:
        """``sqrt(b_l) / s_l``, shape ``(L,)``."""
        count = len(self.layers)
        weights = 2 * torch.arange(count, 0, -1, dtype=torch.float64) / (count * (count + 1))
        return weights.sqrt() / self.scales


@dataclass(frozen=True)
class Observation:
    """Results of one evaluation pass over n examples: r features, C outputs."""

    features: Tensor  # (n, r); those of training examples become coordinates
    outputs: Tensor  # natural parameters of the network, (n, C)
    encoded: Tensor  # targets, (n, C)
    losses: Tensor  # under the network, in nats, (n,)
    fingerprint: dict[str, Any]  # identity of the data set

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.features)

    def select(self, rows: slice) -> Observation:
        """The same pass, of some of its examples."""
        parts = (self.features[rows], self.outputs[rows], self.encoded[rows], self.losses[rows])
        return Observation(*parts, fingerprint=self.fingerprint)


def choose_layers(
    model: nn.Module, forward: Callable[[], object], batch_size: int, limit: int = MAX_LAYERS, num_tokens: int = 0
) -> list[str]:
    """The layers whose inputs make the features by default, in the order they run.

    Every layer with a weight matrix counts whose input has one row of numbers per example (or, of texts of
    ``num_tokens`` tokens, one per token: ``(B, T, d)``); the first is then the raw features. Beyond ``limit``, layers
    evenly spaced from first to last are taken.

    Raises:
        ValueError: If no layer qualifies.
    """
    order: list[str] = []

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            inputs = first_tensor(name, args, kwargs)
        except TypeError:  # no rows of numbers
            return
        shape = inputs.shape if num_tokens else rows_first(module, inputs).shape
        usable = shape[:-1] == (batch_size, num_tokens) if num_tokens else shape[0] == batch_size
        if usable and name not in order:
            order.append(name)

    with before_layers(model, layer_names(model), hook), torch.no_grad():
        forward()
    if not order:
        raise ValueError(
            f"Found no layer of {type(model).__name__} with a weight matrix and an input of shape (batch, ...). Name "
            "modules whose inputs describe an example with `layers=[...]`."
        )
    if len(order) <= limit:
        return order
    return [order[round(i * (len(order) - 1) / max(1, limit - 1))] for i in range(limit)]


def fit_features(
    model: nn.Module,
    task: Task,
    examples: Examples,
    layers: Sequence[str],
    *,
    scales: Tensor | None = None,
    cache_dir: str | Path | None = None,
    **how: Any,
) -> tuple[FeatureMap, Observation]:
    """Observe a training set in features of some layers, at the given scales or at those of the set.

    Features that are too many for memory go to a file in ``cache_dir`` that vanishes with them, or are folded to fewer.
    Other arguments and errors are those of :func:`observe`.
    """
    count, device = len(examples), how["device"]
    head = Reading(examples, task, model, share=slice(min(how["batch_size"], FIRST_EXAMPLES)), **how)
    widths, item_size, most_rows = _first_look(model, head, layers)
    budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else MAX_BYTES
    fitting = max(64, budget // (item_size * count)) - 1
    limit = sum(widths) if count <= MAX_FEATURES else MAX_FEATURES - 1
    on_disk = cache_dir is not None and fitting < min(limit, sum(widths))
    folded = _allot(widths, limit if on_disk else min(limit, fitting))
    if folded != widths:
        announce(f"STRIDE folds {sum(widths):,} features of an example to {sum(folded):,}.", show=how["show_progress"])
    unscaled = torch.ones(len(layers)) if scales is None else scales
    features = FeatureMap(tuple(layers), tuple(folded), unscaled, most_rows)
    folder = cache_dir if on_disk else None
    observed = observe(model, task, examples, features, folder=folder, **how)
    return features if scales is not None else _rescale(features, observed.features), observed


def _first_look(model: nn.Module, head: Reading, layers: Sequence[str]) -> tuple[list[int], int, int]:
    """From a first batch: features of each layer, bytes of one, and the most examples of a forward pass."""
    largest = 0

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal largest
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        largest = max(largest, sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    every = [plain_name(name) for name, _ in model.named_modules()]
    with capture_inputs(model, layers) as captured, before_layers(model, every, hook), torch.no_grad():
        for rows in head:
            with rows.naming():
                outputs = run(model, rows, captured)
            device = outputs.device
            budget = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else FORWARD_BYTES
            # A module's input, its output, what it needs itself, and a branch beside it.
            most_rows = max(1, budget * len(rows) // (4 * max(1, largest)))
            return [captured[name].shape[1] for name in layers], outputs.element_size(), most_rows
    raise ValueError("The training set is empty: give at least one example.")


def _allot(widths: list[int], limit: int) -> list[int]:
    """Features of each layer: narrow layers keep all, the rest share what is left evenly."""
    shares, left = [0] * len(widths), limit
    for done, i in enumerate(sorted(range(len(widths)), key=widths.__getitem__)):
        shares[i] = max(1, min(widths[i], left // (len(widths) - done)))
        left -= shares[i]
    return shares


def _rescale(features: FeatureMap, values: Tensor) -> FeatureMap:
    """The map at the scales of a training set, whose features at other scales are rescaled in place."""
    blocks = values[:, :-1].split(features.widths, dim=1)
    # In parts, so that no copy in float64 is as large as the features.
    means = [sum(float(part.double().square().sum()) for part in block.split(4096)) / len(values) for block in blocks]
    factors = features.factors
    squares = torch.tensor(means, dtype=torch.float64) / factors.square()
    for name, square in zip(features.layers, squares, strict=True):
        if not torch.isfinite(square):
            raise ValueError(
                f"The input of layer {name!r} is not finite on the training set. Check the inputs, and the model's "
                "weights (did training diverge?)."
            )
    # A layer that is zero everywhere (all units dead) adds nothing, and must not divide by zero.
    rescaled = replace(features, scales=torch.where(squares > 0, squares.sqrt(), 1.0))
    for block, factor in zip(blocks, (rescaled.factors / factors).tolist(), strict=True):
        block *= factor
    return rescaled


def observe(
    model: nn.Module,
    task: Task,
    examples: Examples,
    features: FeatureMap,
    *,
    target: str = "label",
    folder: str | Path | None = None,
    **how: Any,
) -> Observation:
    """One evaluation pass: features, outputs, encoded targets and losses of every example, in order.

    The model is in eval mode on the device. The target ``"predicted"`` stands for its own most likely ones. Options are
    ``batch_size``, ``device`` (which holds the results) and ``show_progress``, as in :class:`Reading`.
    Features are in memory, or in a file in a ``folder``.

    Raises:
        ValueError: If outputs, features or losses are not finite, naming the first such example.
    """
    how = {**how, "batch_size": min(how["batch_size"], features.most_rows)}
    reading = Reading(examples, task, model, description="Evaluating", **how)
    stored: dict[str, Tensor] = {}
    with capture_inputs(model, features.layers) as captured, torch.no_grad():
        for rows in reading:
            with rows.naming():
                outputs = run(model, rows, captured)
                targets = task.predict(outputs) if target == "predicted" else required(rows.targets)
                encoded = task.encode(targets, outputs.shape[1]).to(rows.reading.device)
                encoded = encoded.to(torch.promote_types(encoded.dtype, outputs.dtype))
                values = {"features": features(captured).to(outputs), "outputs": outputs, "target": encoded}
                values["loss"] = task.loss(outputs, encoded.to(outputs))
                for name, value in values.items():
                    check_finite(value, name)
                    if name not in stored:
                        place = folder if name == "features" else None
                        stored[name] = _room(value, len(examples), place)
                    stored[name][rows.places] = value
    parts = (stored["features"], stored["outputs"], stored["target"], stored["loss"])
    return Observation(*parts, fingerprint=reading.fingerprint)


def _room(like: Tensor, count: int, folder: str | Path | None) -> Tensor:
    """Room for values of so many examples, in memory or in a file that vanishes with them."""
    if folder is None:
        return like.new_empty(count, *like.shape[1:])
    Path(folder).expanduser().mkdir(parents=True, exist_ok=True)
    values = like.new_empty(0).cpu().numpy()
    with tempfile.TemporaryFile(dir=Path(folder).expanduser()) as file:
        return torch.from_numpy(np.memmap(file, values.dtype, "w+", shape=(count, *like.shape[1:])))


def run(model: nn.Module, rows: Rows, captured: Captured) -> Tensor:
    """Outputs of a batch, in single precision at least and of shape ``(B, C)``; captures what enters the layers."""
    size = len(rows)
    captured.reads(rows.inputs)
    outputs = rows.reading.task.outputs(model, rows.inputs)
    check_outputs(outputs, size)
    for name, inputs in captured.items():
        if len(inputs) != size:
            raise TypeError(
                f"Layer {name!r} must take a tensor with one row per example; its input has {len(inputs)} rows for a "
                f"batch of {size}. Name another layer with `layers=[...]`."
            )
    outputs = outputs.detach().reshape(size, -1)
    return outputs if outputs.dtype == torch.float64 else outputs.float()
