"""Where steering operators of a language model act: on logits, or on the last hidden state in front of the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from stride_lightning.model.layers import plain_name, uncompiled

#: Vocabularies up to this size are steered directly, every token by itself; beyond, the last hidden state is.
MAX_DIRECT = 2**16
#: Up to this size the second moment of the steered space is kept whole; beyond, for logits, its diagonal.
MAX_DENSE = 1024
#: Numbers per token of a sketch, where the model's head is not found.
SKETCH_SIZE = 1024


@dataclass(frozen=True)
class OutputSpace:
    """A linear map from the steered space to logits.

    Steering by ``v`` moves the logits by ``S v``. ``S`` is the identity up to ``MAX_DIRECT`` tokens. Beyond, it is the
    head's weight where the last layer is linear, which steers the last hidden state exactly; else a seeded sign sketch,
    whose inner products are those of logits on average.

    Args:
        kind: ``"logits"``, ``"hidden"`` or ``"sketch"``.
        vocabulary: Number V of logits.
        longest: Tokens of the longest sequence seen.
        matrix: ``S`` of shape ``(V, c)``; None for the identity.
        head: The linear layer that gives the logits, and its name, where there is one.
    """

    kind: str
    vocabulary: int
    longest: int
    matrix: Tensor | None
    head: tuple[str, nn.Linear] | None = None

    @property
    def is_diagonal(self) -> bool:
        """Whether only the diagonal of the steered space's second moment is kept."""
        return self.kind == "logits" and self.vocabulary > MAX_DENSE

    @property
    def width(self) -> int:
        """Dimension c of the steered space."""
        return self.vocabulary if self.matrix is None else self.matrix.shape[1]

    def gradient(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Gradient ``S' (p - y)`` of every token's loss, from logits ``(..., V)``; shape ``(..., c)``."""
        errors = logits.softmax(-1)
        errors.scatter_add_(-1, labels[..., None], -torch.ones_like(errors[..., :1]))
        return errors if self.matrix is None else errors @ self.matrix.to(errors)

    def push(self, steering: Tensor) -> Tensor:
        """``S`` times steering vectors."""
        return steering if self.matrix is None else steering @ self.matrix.to(steering).T

    def sequences_per_batch(self, num_bytes: int, num_values: int) -> int:
        """Sequences whose logits, errors and gradients of ``num_values`` numbers fit; at least one."""
        return max(1, num_bytes // (16 * self.longest * self.vocabulary + 8 * num_values))


def choose_output_space(model: nn.Module, outputs: Callable[[], Tensor]) -> OutputSpace:
    """Find out where to steer a model in eval mode, whose logits ``(B, T, V)`` of a batch ``outputs`` gives."""
    last: list[tuple[str, nn.Linear, Tensor]] = []

    def hook(name: str, module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        last[:] = [(name, module, output.detach())]

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(partial(hook, name)) for name, module in linear]
    try:
        with uncompiled(), torch.no_grad():
            logits = outputs()
    finally:
        for handle in handles:
            handle.remove()
    longest, vocabulary = logits.shape[1], logits.shape[-1]
    head = None
    # A layer is the head if its outputs are the logits themselves: nothing caps or scales them afterwards.
    if last and last[0][2].shape == logits.shape and torch.equal(last[0][2], logits):
        head = plain_name(last[0][0]), last[0][1]
    if vocabulary <= MAX_DIRECT:
        return OutputSpace("logits", vocabulary, longest, None, head)
    if head is not None:
        return OutputSpace("hidden", vocabulary, longest, head[1].weight.detach(), head)
    generator = torch.Generator().manual_seed(vocabulary)
    signs = torch.randint(2, (vocabulary, SKETCH_SIZE), generator=generator) * 2 - 1
    return OutputSpace("sketch", vocabulary, longest, (signs / SKETCH_SIZE**0.5).to(logits.device))
