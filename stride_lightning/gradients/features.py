"""Batches on the device, and their gradients of losses, margins and curvature."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from stride_lightning.data.examples import HELD_BYTES, Examples, num_bytes
from stride_lightning.data.reading import Reading
from stride_lightning.gradients.signs import NUM_DIRECTIONS, is_exact, random_signs
from stride_lightning.model.blocks import Gradients
from stride_lightning.model.capture import Backward, Capture
from stride_lightning.runtime.checks import check_finite
from stride_lightning.runtime.hashed_numbers import scrambled
from stride_lightning.runtime.progress import counting
from stride_lightning.tasks.likelihoods import Task

#: Outputs with their graph, shape ``(B, C)``, and a function that multiplies changes of them, ``(q, B, C)``, by the
#: curvature of the losses.
Linearised = tuple[Tensor, Callable[[Tensor], Tensor]]


class Reader:
    """A data set as batches of inputs and encoded targets on a device; it is read once and held if it is small.

    With ``target="predicted"`` the targets are predictions of the model, in eval mode on the device.

    Raises:
        ValueError: If a target is missing, does not fit the task, or is not finite.
    """

    def __init__(
        self,
        examples: Examples,
        model: nn.Module,
        task: Task,
        num_outputs: int,
        *,
        capture: Capture,
        batch_size: int,
        device: torch.device,
        target: str = "label",
        show_progress: bool = True,
    ) -> None:
        self.examples, self._model, self._task, self.capture = examples, model, task, capture
        self.batch_size, self.device, self.show_progress = batch_size, device, show_progress
        encoded, held, size = [], [], 0
        reading = self._reading(description="Reading")
        for rows in reading:
            inputs, targets = rows.encoded(num_outputs, target)
            encoded.append(targets)
            size += num_bytes(inputs, len(rows))
            if size <= HELD_BYTES:
                held.append(inputs)
        self.num_outputs, self._lengths = num_outputs, [part.shape[1] for part in encoded]
        if encoded[0].ndim == 3:  # sequences; the padding has no weight
            longest = max(self._lengths)
            encoded = [F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in encoded]
        self._points: Tensor | None = None
        #: Encoded targets of all examples, shape ``(n, C)``.
        self.encoded = torch.cat(encoded)
        self.fingerprint = reading.fingerprint
        self._held: list[Any] | None = held if size <= HELD_BYTES else None
        #: Largest number of tokens that count in one example's loss; 1 for tasks without tokens.
        self.most_tokens = int(_counted(task, self.encoded).sum(1).max()) if task.has_tokens else 1
        with examples.naming(0):
            check_finite(self.encoded, "target")

    def __len__(self) -> int:
        return len(self.examples)

    def rescale(self) -> Task:
        """Scale the weights of a likelihood to a mean of 1 over these examples; returns the task with that scale."""
        self._task = self._task.scaled_to(self.encoded)
        return self._task

    def linearised_at(self, points: Tensor) -> Reader:
        """The same data, with the loss linearised at these natural parameters, shape ``(n, C)``, not at the outputs."""
        reader = copy.copy(self)
        reader._points = points
        return reader

    def natural_parameters(self, places: slice, outputs: Tensor) -> Tensor:
        """Where the loss of some examples is linearised: at the model's outputs, unless other points were given."""
        return outputs if self._points is None else self._points[places].to(outputs)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the outputs."""
        return self.encoded.dtype

    def shown(self) -> Tensor | None:
        """The targets, to show beside scores."""
        return self._task.shown(self.encoded)

    def run(self, share: slice | None = None, description: str = "") -> Iterator[Batch]:
        """Run the model forward over some examples. An output or loss that is not finite raises, naming its example."""
        task = self._task
        with self.capture.watch() as backward:
            for places, inputs, encoded in self.batches(share, description):
                with self.examples.naming(places.start):
                    outputs = backward.run(inputs, places.stop - places.start)
                    check_finite(outputs, "outputs")
                    check_finite(task.loss(outputs, encoded), "loss")
                points, positions = self.natural_parameters(places, outputs), self.examples.positions[places]
                yield Batch(places, positions, points, encoded, self.most_tokens, task, backward)

    def linearised(self, share: slice | None = None) -> Iterator[Linearised]:
        """The outputs of some examples with their graph, and the curvature of their losses there."""
        for places, inputs, encoded in self.batches(share):
            outputs = self.capture.outputs(inputs)
            points = self.natural_parameters(places, outputs.detach())
            mean, weights = self._task.mean(points), self._task.output_weights(encoded)
            yield outputs, lambda moved, mean=mean, weights=weights: weights * self._task.curvature(mean, moved)

    def batches(self, share: slice | None = None, description: str = "") -> Iterator[tuple[slice, Any, Tensor]]:
        """Places, inputs and encoded targets of a share of the examples, in order; a description shows progress."""
        start, stop, _ = (share or slice(None)).indices(len(self))
        with counting(stop - start, description, show=self.show_progress and bool(description)) as bar:
            for places, inputs, encoded in self._held_batches(start, stop) if self._held else self._read(start, stop):
                yield places, inputs, encoded
                bar.update(places.stop - places.start)

    def _held_batches(self, start: int, stop: int) -> Iterator[tuple[slice, Any, Tensor]]:
        assert self._held is not None
        for first in range(start - start % self.batch_size, stop, self.batch_size):
            number, last = first // self.batch_size, min(first + self.batch_size, len(self))
            low, high = max(first, start), min(last, stop)
            if low >= high:
                continue
            part = slice(low - first, high - first)
            inputs = pytree.tree_map(lambda leaf, part=part: leaf[part].clone(), self._held[number])
            yield slice(low, high), inputs, self.encoded[low:high, : self._lengths[number]]

    def _read(self, start: int, stop: int) -> Iterator[tuple[slice, Any, Tensor]]:
        for rows in self._reading(share=slice(start, stop)):
            if self._task.has_tokens:  # in another batch the padding may differ from that of the first reading
                yield rows.places, *rows.encoded(self.num_outputs)
            else:
                yield rows.places, rows.inputs, self.encoded[rows.places]

    def _reading(self, **options: Any) -> Reading:
        options |= {"batch_size": self.batch_size, "device": self.device, "show_progress": self.show_progress}
        return Reading(self.examples, self._task, self._model, **options)


@dataclass
class Batch:
    """Examples after their forward pass, and gradients of functions of their outputs.

    The functions are linearised at ``outputs``, which the reader may have been given; the Jacobian is the model's.
    """

    places: slice
    positions: Tensor
    outputs: Tensor  # (B, C)
    encoded: Tensor  # targets, (B, C)
    most_tokens: int  # largest number of tokens that count in one example's loss, over the whole data set
    _task: Task
    _backward: Backward

    def __len__(self) -> int:
        return len(self.outputs)

    def loss(self) -> Gradients:
        """Gradients of each example's loss."""
        return self._backward.gradients(self._derivative(self._task.loss))

    def margin(self, *, last: bool = True) -> Gradients:
        """Gradients of each example's margin, or for a task without one, of its outputs towards the target.

        The ``last`` gradients of a batch free its graph.
        """
        return self._backward.gradients(self._margin[0], last=last)

    @property
    def shares_inputs(self) -> bool:
        """Whether all gradients of :meth:`curvature` are of one run, with the same inputs of layers."""
        return True

    @property
    def is_exact(self) -> bool:
        """Whether :meth:`curvature` gives a gradient for each output."""
        return is_exact(self.outputs.shape[-1] * self.most_tokens)

    @property
    def losses(self) -> Tensor:
        """The loss of each example, shape ``(B,)``."""
        return self._task.loss(self.outputs, self.encoded)

    def check_margin(self) -> None:
        """Refuse, by a ValueError, a task without log-odds."""
        self._task.margin(self.outputs, self.encoded)

    @property
    def margin_weights(self) -> Tensor:
        """Factors that turn :meth:`margin` into gradients of minus the loss, ``1 - p`` for a margin; shape ``(B,)``."""
        return self._margin[1]

    @property
    def margin_curvature(self) -> Tensor:
        """Second derivative of each example's loss with respect to its margin, ``p (1 - p)``; shape ``(B,)``."""
        return self._margin[2]

    @cached_property
    def _margin(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(dm/do, -dl/dm, d2l/dm2)`` for margin m, outputs o and loss l; shapes ``(B, C)``, ``(B,)``, ``(B,)``."""
        task = self._task
        try:
            margin = task.margin(self.outputs, self.encoded)
        except ValueError:
            downhill = -self._derivative(task.loss)
            size = downhill.flatten(1).norm(dim=1)
            unit = downhill / size.clamp(min=torch.finfo(size.dtype).tiny).reshape(-1, *[1] * (downhill.ndim - 1))
            curved = task.curvature(task.mean(self.outputs), unit) * task.output_weights(self.encoded)
            return unit, size, (unit * curved).flatten(1).sum(1)
        weights = torch.as_tensor(task.output_weights(self.encoded)).to(margin).flatten() / task.dispersion
        rest = torch.sigmoid(-margin) * weights
        return self._derivative(task.margin), rest, rest * torch.sigmoid(margin)

    def curvature(self, seed: int, *, last: bool = True) -> Iterator[Gradients]:
        """Gradients whose outer products sum to the Gauss-Newton matrix of each example's loss.

        Up to ``MAX_EXACT_OUTPUTS`` there is one for each output. Beyond, there are ``NUM_DIRECTIONS`` along random
        signs, with that matrix as their mean; the seed and an example's position determine the signs. Tokens are
        numbered among the tokens of their example that count, so padding and the rest of a batch change nothing.
        """
        mean, width = self._task.mean(self.outputs), self.outputs.shape[-1]
        weights = torch.as_tensor(self._task.output_weights(self.encoded))
        exact = self.is_exact
        number = self._token_numbers()
        # The signs are functions of these keys; every token has another key.
        keys = self.positions if number is None else scrambled(self.positions)[:, None] + number
        count = NUM_DIRECTIONS if not exact else width if number is None else width * (int(number.max()) + 1)
        for column in range(count):
            if exact:
                direction = torch.zeros_like(mean)
                direction[..., column % width] = 1 if number is None else (number == column // width).to(mean)
            else:
                direction = random_signs(keys, column, width, seed, mean) / NUM_DIRECTIONS**0.5
            root = self._task.curvature_root(mean, direction) * weights.sqrt()
            yield self._backward.gradients(root, last=last and column == count - 1)

    def _token_numbers(self) -> Tensor | None:
        """Number of each token among those that count, -1 for others, shape ``(B, T)``; None without tokens."""
        if not self._task.has_tokens:
            return None
        counted = _counted(self._task, self.encoded)
        return (counted.cumsum(1) - 1).masked_fill(~counted, -1).cpu()

    def _derivative(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            outputs = self.outputs.detach().requires_grad_()
            (direction,) = torch.autograd.grad(function(outputs, self.encoded).sum(), outputs)
        return direction


def _counted(task: Task, encoded: Tensor) -> Tensor:
    """Whether each token counts in its example's loss, bool of shape ``(B, T)``."""
    return torch.as_tensor(task.output_weights(encoded))[..., 0] > 0
