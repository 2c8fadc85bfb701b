"""Sequences read token by token: inputs of layers, and the gradient of every token's loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import Reading, Rows, required
from stride_lightning.model.layers import before_layers
from stride_lightning.readout.activations import first_tensor, fold
from stride_lightning.runtime.checks import check_finite
from stride_lightning.steering.language.output_space import OutputSpace
from stride_lightning.tasks.inference import check_outputs
from stride_lightning.tasks.language import CausalLanguageModeling

#: Logits and features of one batch take at most about this many bytes; batches are made smaller for it.
BATCH_BYTES = 2**28
#: Wider layer inputs are folded to this many features by a seeded count sketch.
MAX_TOKEN_FEATURES = 768


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of B sequences, padded to T.

    Args:
        places: Places of the sequences in the reading order.
        features: Basis features ``phi``, shape ``(B, T, r)``.
        downhill: Gradient of each token's loss in the steered space, shape ``(B, T, c)``; 0 for padding.
        weights: Weight of each token's loss in that of its sequence, shape ``(B, T)``; 0 for padding.
        losses: Shape ``(B,)``.
        logits: Of the frozen model, shape ``(B, T, V)``, where asked for.
        labels: Int64 of shape ``(B, T)``.
        hidden: Inputs of the head, shape ``(B, T, d)``, where logits are made of them again.
    """

    places: slice
    features: Tensor
    downhill: Tensor
    weights: Tensor
    losses: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(eq=False)
class TokenReader:
    """Runs a frozen language model, in eval mode on ``device``, over sequences.

    The inputs of ``layers``, with a constant 1 beside them, are the features. A forward pass takes ``batch_size``
    sequences at most, fewer where logits would take more than ``BATCH_BYTES``.
    """

    model: nn.Module
    task: CausalLanguageModeling
    layers: Sequence[str]
    space: OutputSpace
    _: KW_ONLY
    batch_size: int
    device: torch.device
    show_progress: bool = True
    #: Features of each layer, then 1 for the constant; known, like ``dtype``, once a batch was read.
    widths: tuple[int, ...] = field(default=(), init=False)
    dtype: torch.dtype = field(default=torch.float32, init=False)
    #: Numbers in the gradient of a sequence in one operator, for the size of batches.
    num_values: int = field(default=0, init=False)

    @property
    def rows_per_batch(self) -> int:
        """Sequences in one forward pass."""
        return min(self.batch_size, self.space.sequences_per_batch(BATCH_BYTES, self.num_values))

    def batches(
        self, examples: Examples, description: str, *, share: slice | None = None, with_logits: bool = False
    ) -> Iterator[TokenBatch]:
        """Run over all sequences, or those at the places of ``share``, in order; batches have logits if asked.

        Raises:
            ValueError: If a sequence cannot be read or its loss is not finite, naming it.
        """
        reading = Reading(
            examples,
            self.task,
            self.model,
            batch_size=self.rows_per_batch,
            device=self.device,
            share=share,
            description=description,
            show_progress=self.show_progress,
        )
        captured: dict[str, Tensor] = {}

        def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured[name] = first_tensor(name, args, kwargs).detach()

        head = [] if self._head is None else [self._head]
        with before_layers(self.model, {*self.layers, *head}, hook), torch.no_grad():
            for rows in reading:
                captured.clear()
                with rows.naming():
                    batch = self._run(rows, captured, with_logits=with_logits)
                    check_finite(batch.losses, "loss")
                yield batch

    def _run(self, rows: Rows, captured: dict[str, Tensor], *, with_logits: bool) -> TokenBatch:
        logits = self.task.outputs(self.model, rows.inputs)
        check_outputs(logits, len(rows), self.task)
        with exact(logits.device):
            logits = at_least_single(logits)
            encoded = self.task.encode(required(rows.targets), logits.shape[-1]).to(logits)
            labels, weights = encoded[..., 0].long(), self.task.output_weights(encoded)[..., 0] / self.task.dispersion
            losses = (self.task.token_losses(logits, encoded) * weights).sum(1)
            # Padding may hold anything, NaN too: no weight is not enough.
            counted = (weights > 0)[..., None]
            downhill = torch.where(counted, self.space.gradient(logits, labels), 0)
            features = torch.where(counted, self._features(captured, logits), 0)
            hidden = None if self._head is None else torch.where(counted, at_least_single(captured[self._head]), 0)
        given = logits if with_logits else None
        return TokenBatch(rows.places, features, downhill, weights, losses, given, labels, hidden)

    def to_store(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Values of a batch to store, shape ``(B, T, ...)``: inputs of a large head rather than its outputs."""
        assert batch.labels is not None
        values = {"features": batch.features, "weights": batch.weights[..., None]}
        if batch.hidden is None:
            return values | {"downhill": batch.downhill}
        labels = batch.labels[..., None].to(batch.features)  # exact for 2^24 tokens
        return values | {"hidden": batch.hidden, "labels": labels}

    @torch.no_grad()
    def restored(self, places: slice, stored: dict[str, Tensor], losses: Tensor) -> TokenBatch:
        """The batch again, from its stored values."""
        stored = {name: values.to(self.device, self.dtype) for name, values in stored.items()}
        weights, downhill = stored["weights"], stored.get("downhill")
        if downhill is None:
            assert self.space.head is not None
            head, labels = self.space.head[1], stored["labels"][..., 0].long()
            logits = at_least_single(head(stored["hidden"].to(head.weight.dtype)))
            downhill = torch.where(weights > 0, self.space.gradient(logits, labels), 0)
        return TokenBatch(places, stored["features"], downhill, weights[..., 0], losses.to(self.device, self.dtype))

    @property
    def _head(self) -> str | None:
        """Name of the head, where its logits are too many to keep."""
        return self.space.head[0] if self.space.is_diagonal and self.space.head is not None else None

    def _features(self, captured: dict[str, Tensor], logits: Tensor) -> Tensor:
        parts = []
        for name in self.layers:
            if name not in captured:
                raise ValueError(f"Layer {name!r} did not run in the model's forward pass. Name others with `layers=`.")
            inputs = captured[name]
            if inputs.shape[:2] != logits.shape[:2]:
                raise ValueError(
                    f"The input of layer {name!r} has shape {tuple(inputs.shape)}, not one row for each of the "
                    f"{tuple(logits.shape[:2])} tokens. Name other layers with `layers=`."
                )
            parts.append(fold(at_least_single(inputs).to(logits).flatten(0, 1), MAX_TOKEN_FEATURES))
        parts.append(torch.ones_like(parts[0][:, :1]))
        self.dtype, self.widths = logits.dtype, tuple(part.shape[1] for part in parts)
        return torch.cat(parts, 1).unflatten(0, tuple(logits.shape[:2]))


def exact(device: torch.device) -> torch.autocast:
    """A context without autocast: the model may run in bf16, sums over tokens may not."""
    return torch.autocast(device.type, enabled=False)


def at_least_single(values: Tensor) -> Tensor:
    """Values of a model in half precision as float32."""
    return values if values.dtype == torch.float64 else values.float()
