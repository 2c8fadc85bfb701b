"""The basis of the steering operators: which layers enter it, and one pass that evaluates a data set in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import Reading, Rows, required
from stride_lightning.model.layers import before_layers, layer_names
from stride_lightning.runtime.checks import check_finite
from stride_lightning.steering.activations import Captured, capture_inputs, first_tensor, rows_first
from stride_lightning.tasks.inference import check_outputs
from stride_lightning.tasks.likelihoods import Task

#: Most layers that are chosen when the user names none.
MAX_LAYERS = 8
#: The features of the whole training set take at most this many bytes; beyond, principal components are kept.
MAX_FEATURE_BYTES = 2**31
#: Most features whatever the number of examples: the preconditioner is a matrix of this size, squared.
MAX_FEATURES = 4096
#: Directions with less than this share of the mean energy are taken as not spanned by the training set.
MIN_ENERGY = 1e-6
#: What errors call the values of one example.
_NAMES = {"features": "features", "outputs": "outputs", "encoded": "target", "losses": "loss"}


@dataclass(frozen=True)
class Basis:
    """Features ``phi(x)``: principal components of ``[z_1 / s_1, ..., z_L / s_L, 1]``, inputs ``z_l`` of L layers.

    The components are those of the uncentred second moment over the training set, so features are uncorrelated and
    the curvature that operators share is diagonal. Only directions the training set does not span are dropped, unless
    a layer is too wide to be kept whole.

    Args:
        layers: Names of the layers, in the order they run.
        scales: Root mean square norm of each layer's input, shape ``(L,)``; so every layer has unit energy.
        components: Of each layer whose (uncentred) principal components do not all fit, the leading ones, shape
            ``(d_l, k_l)``; of others None.
        rotation: Joint principal components, shape ``(sum of k_l + 1, r)``.
        energies: Mean square of each feature over the training set, shape ``(r,)``.

    Reference: arXiv:2606.05165 (STRIDE), the basis B of the steering operators; here read off the activations.
    """

    layers: tuple[str, ...]
    scales: Tensor
    components: tuple[Tensor | None, ...]
    rotation: Tensor
    energies: Tensor

    def features(self, captured: Captured) -> Tensor:
        """Features of a batch from its captured layer inputs, shape ``(B, r)``; not rotated by an empty rotation."""
        parts = []
        for name, scale, components in zip(self.layers, self.scales, self.components, strict=True):
            inputs = captured[name] / scale.to(captured[name])
            parts.append(inputs if components is None else inputs @ components.to(inputs))
        stacked = torch.cat([*parts, torch.ones_like(parts[0][:, :1])], 1)
        return stacked @ self.rotation.to(stacked) if len(self.rotation) else stacked

    def tensors(self) -> dict[str, Tensor]:
        """Plain tensors to store."""
        cut = {f"components.{i}": value for i, value in enumerate(self.components) if value is not None}
        return {"scales": self.scales, "rotation": self.rotation, "energies": self.energies, **cut}

    @classmethod
    def from_tensors(cls, layers: list[str], tensors: dict[str, Tensor]) -> Basis:
        """Undo :meth:`tensors`."""
        components = tuple(tensors.get(f"components.{i}") for i in range(len(layers)))
        return cls(tuple(layers), tensors["scales"], components, tensors["rotation"], tensors["energies"])


@dataclass(frozen=True)
class Observation:
    """What one evaluation pass saw: n examples, r features, C outputs."""

    features: Tensor  # (n, r)
    outputs: Tensor  # natural parameters, (n, C)
    encoded: Tensor  # targets, (n, C)
    losses: Tensor  # in nats, (n,)
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
    """The layers whose inputs make the default basis, in the order they run.

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


def fit_basis(
    model: nn.Module, task: Task, examples: Examples, layers: list[str], **how: Any
) -> tuple[Basis, Observation]:
    """Measure the scale of each layer's input over a training set and observe the set in the resulting basis.

    All features are kept while they fit ``MAX_FEATURES`` and ``MAX_FEATURE_BYTES``; otherwise a first pass finds
    the principal components of each layer and a second one observes. Arguments and errors are those of
    :func:`observe`, which also come where a layer does not run or its input does not have one row per example.
    """
    limit = min(MAX_FEATURES, max(64, MAX_FEATURE_BYTES // (4 * max(1, len(examples))))) - 1
    widths = _layer_widths(model, Reading(examples, task, model, share=slice(how["batch_size"]), **how), layers)
    components: list[Tensor | None] = [None] * len(layers)
    scales = torch.ones(len(layers))
    if sum(widths) > limit:
        moments = _second_moments(model, Reading(examples, task, model, description="Covariances", **how), layers)
        scales = torch.stack([_scale(name, moments[name].trace()) for name in layers]).cpu()
        for i, (name, rank) in enumerate(zip(layers, _allot(widths, limit), strict=True)):
            if rank < widths[i]:
                components[i] = torch.linalg.eigh(moments[name].double())[1][:, -rank:].float().cpu()
                widths[i] = rank
    stacked = Basis(tuple(layers), scales, tuple(components), torch.empty(0), torch.empty(0))
    observed = observe(model, task, examples, stacked, **how)
    if all(part is None for part in components):
        # The scales are only known now, at the end of the pass: rescale in place.
        blocks = observed.features[:, :-1].split(widths, dim=1)
        energies = [block.square().sum(1).double().mean() for block in blocks]
        scales = torch.stack([_scale(*of_layer) for of_layer in zip(layers, energies, strict=True)])
        for block, scale in zip(blocks, scales, strict=True):
            block.div_(scale)
    rotation, energies = _principal_components(observed.features)
    basis = Basis(tuple(layers), scales.cpu(), tuple(components), rotation.cpu(), energies.cpu())
    return basis, replace(observed, features=observed.features @ rotation)


def observe(
    model: nn.Module, task: Task, examples: Examples, basis: Basis, *, target: str = "label", **how: Any
) -> Observation:
    """One evaluation pass: features, outputs, encoded targets and losses of every example, in order.

    The model is in eval mode on the device. The target ``"predicted"`` stands for its own most likely ones. Options are
    ``batch_size``, ``device`` (which keeps the results) and ``show_progress``, as in :class:`Reading`.

    Raises:
        ValueError: If outputs, features or losses are not finite, naming the first such example.
    """
    reading = Reading(examples, task, model, description="Evaluating", **how)
    stored: dict[str, Tensor] = {}
    with capture_inputs(model, basis.layers) as captured, torch.no_grad():
        for rows in reading:
            with rows.naming():
                outputs = _run(model, rows, captured)
                targets = task.predict(outputs) if target == "predicted" else required(rows.targets)
                encoded = task.encode(targets, outputs.shape[1]).to(outputs)
                features, losses = basis.features(captured).to(outputs), task.loss(outputs, encoded)
                for name, value in zip(_NAMES, (features, outputs, encoded, losses), strict=True):
                    check_finite(value, _NAMES[name])
                    if name not in stored:
                        stored[name] = value.new_empty(len(examples), *value.shape[1:])
                    stored[name][rows.places] = value
    return Observation(**stored, fingerprint=reading.fingerprint)


def _run(model: nn.Module, rows: Rows, captured: Captured) -> Tensor:
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


def _layer_widths(model: nn.Module, head: Reading, layers: list[str]) -> list[int]:
    """Features of each layer, from a first batch."""
    with capture_inputs(model, layers) as captured, torch.no_grad():
        for rows in head:
            with rows.naming():
                _run(model, rows, captured)
            return [captured[name].shape[1] for name in layers]
    raise ValueError("The training set is empty.")


def _second_moments(model: nn.Module, reading: Reading, layers: list[str]) -> dict[str, Tensor]:
    """Mean outer product of each layer's input, shape ``(d_l, d_l)``."""
    moments: dict[str, Tensor] = {}
    with capture_inputs(model, layers) as captured, torch.no_grad():
        for rows in reading:
            with rows.naming():
                _run(model, rows, captured)
            for name in layers:
                product = captured[name].T @ captured[name] / len(reading.examples)
                moments[name] = moments[name].add_(product) if name in moments else product
    return moments


def _principal_components(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Directions the examples span, strongest first, and the mean square of the examples along each."""
    width = stacked.shape[1]
    # In float64, or rounding would make directions of its own; on the CPU where the device has no float64.
    device = torch.device("cpu") if stacked.device.type == "mps" else stacked.device
    moment = torch.zeros(width, width, dtype=torch.float64, device=device)
    for block in stacked.split(8192):
        exact = block.to(device, torch.float64)
        moment += exact.T @ exact / len(stacked)
    energies, directions = torch.linalg.eigh(moment)
    spanned = (energies > MIN_ENERGY * energies.mean()).nonzero().flatten().flip(0)
    return directions[:, spanned].to(stacked), energies[spanned].to(stacked)


def _scale(name: str, mean_square: Tensor) -> Tensor:
    if not torch.isfinite(mean_square):
        raise ValueError(f"The input of layer {name!r} is not finite on the training set.")
    # A layer that is zero everywhere (all units dead) adds nothing, and must not divide by zero.
    return mean_square.sqrt().float() if mean_square > 0 else torch.ones((), device=mean_square.device)


def _allot(widths: list[int], limit: int) -> list[int]:
    """Features to keep of each layer: narrow layers keep all, the rest share what is left evenly."""
    ranks, left = [0] * len(widths), limit
    for done, i in enumerate(sorted(range(len(widths)), key=widths.__getitem__)):
        ranks[i] = max(1, min(widths[i], left // (len(widths) - done)))
        left -= ranks[i]
    return ranks
