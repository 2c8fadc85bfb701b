"""Where steering operators of a language model act: on logits, or on the last hidden state in front of the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stride_lightning.steering.activations import uncompiled

#: Vocabularies up to this size are steered directly; beyond, the last hidden state is.
MAX_DIRECT = 1024
#: Numbers per token of a sketch, where the model's head is not found.
SKETCH_SIZE = 1024


@dataclass(frozen=True)
class OutputSpace:
    """A linear map from the steered space to logits.

    Steering by ``v`` moves the logits by ``S v``. ``S`` is the identity for small vocabularies; the head's weight where
    the last layer is linear, so that what is steered is the last hidden state, exactly; else a seeded sign sketch,
    whose inner products are those of logits on average.

    Args:
        kind: ``"logits"``, ``"hidden"`` or ``"sketch"``.
        vocabulary: Number V of logits.
        longest: Tokens of the longest sequence seen.
        matrix: ``S`` of shape ``(V, c)``; None for the identity.
    """

    kind: str
    vocabulary: int
    longest: int
    matrix: Tensor | None

    @property
    def width(self) -> int:
        """Dimension c of the steered space."""
        return self.vocabulary if self.matrix is None else self.matrix.shape[1]

    def gradient(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Gradient ``S' (p - y)`` of every token's loss, from ``(B, T, V)`` logits; shape ``(B, T, c)``."""
        errors = logits.softmax(-1)
        errors.scatter_add_(-1, labels[..., None], -torch.ones_like(errors[..., :1]))
        return self.pull(errors)

    def pull(self, errors: Tensor) -> Tensor:
        """``S'`` times gradients in the logits."""
        return errors if self.matrix is None else errors @ self.matrix.to(errors)

    def push(self, steering: Tensor) -> Tensor:
        """``S`` times steering vectors."""
        return steering if self.matrix is None else steering @ self.matrix.to(steering).T

    def sequences_per_batch(self, num_bytes: int) -> int:
        """Sequences whose logits and errors fit; at least one."""
        return max(1, num_bytes // (16 * self.longest * self.vocabulary))


def choose_output_space(model: nn.Module, outputs: Callable[[], Tensor]) -> OutputSpace:
    """Find out where to steer a model.

    Args:
        model: In eval mode.
        outputs: Runs it on a batch; gives logits of shape ``(B, T, V)``.
    """
    last: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        last[:] = [(module.weight.detach(), output.detach())]  # type: ignore[list-item]

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(hook) for module in linear]
    try:
        with uncompiled(), torch.no_grad():
            logits = outputs()
    finally:
        for handle in handles:
            handle.remove()
    longest, vocabulary = logits.shape[1], logits.shape[-1]
    if vocabulary <= MAX_DIRECT:
        return OutputSpace("logits", vocabulary, longest, None)
    weight, output = last[0] if last else (torch.empty(0), torch.empty(0))
    # The head is found where what it gives are the logits themselves: nothing caps or scales them afterwards.
    if len(weight) == vocabulary and output.shape == logits.shape and torch.equal(output, logits):
        return OutputSpace("hidden", vocabulary, longest, weight)
    generator = torch.Generator().manual_seed(vocabulary)
    signs = torch.randint(2, (vocabulary, SKETCH_SIZE), generator=generator) * 2 - 1
    return OutputSpace("sketch", vocabulary, longest, (signs / SKETCH_SIZE**0.5).to(logits.device))
