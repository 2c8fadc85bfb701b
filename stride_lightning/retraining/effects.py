"""FurtherTraining: the effects of further training without examples, as a stored result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, override

from stride_lightning.results.attribution import Attribution
from stride_lightning.storage.stored import Stored


@dataclass
class FurtherTraining(Stored):
    """Effects of further training without an example on the loss of a query, after several amounts of training.

    Args:
        effects_by_seed: Loss without the example minus loss with it, positive is helpful; shape ``(S, T, m, q)``.
        left_out: Positions of the examples in the training dataset, shape ``(m,)``.
        epochs: Numbers of epochs of further training, ``T`` of them.
        seeds: Seeds of the order of batches, ``S`` of them.
        metadata: Optimizer and settings, weight hash, fingerprints of both data sets, seconds, versions.
    """

    effects_by_seed: Tensor
    left_out: Tensor
    epochs: list[int]
    seeds: list[int]
    metadata: dict[str, Any] = field(default_factory=dict)

    kind = "further-training"
    group = "effects"

    def __post_init__(self) -> None:
        expected = (len(self.seeds), len(self.epochs), len(self.left_out))
        if self.effects_by_seed.ndim != 4 or self.effects_by_seed.shape[:3] != expected:
            raise ValueError(
                f"Effects must have shape {(*expected, 'q')} for these seeds, epochs and examples left out, got "
                f"{tuple(self.effects_by_seed.shape)}."
            )
        bad = (~torch.isfinite(self.effects_by_seed)).nonzero()
        if len(bad):
            seed, epoch, example, query = bad[0].tolist()
            raise ValueError(
                f"Further training without example {int(self.left_out[example])} gave a loss that is not finite for "
                f"query {query}, after {self.epochs[epoch]} epoch(s) with seed {self.seeds[seed]}. Lower the learning "
                "rate, and check the data for NaN."
            )

    def effects(self, epoch: int | None = None) -> Tensor:
        """Mean effect over seeds after one of :attr:`epochs`, by default the last, shape ``(q, m)``."""
        return self._at(epoch).mean(0).T.float()

    def std_error(self, epoch: int | None = None) -> Tensor | None:
        """Standard error of the mean effect over seeds, shape ``(q, m)``; None for a single seed."""
        effects = self._at(epoch)
        return None if len(effects) < 2 else (effects.std(0) / len(effects) ** 0.5).T.float()

    def attribution(self, epoch: int | None = None) -> Attribution:
        """The effects as scores of the examples that were left out, with their standard error."""
        return Attribution(
            self.effects(epoch),
            self.std_error(epoch),
            train_indices=self.left_out,
            metadata={"method": self.kind, **self.metadata},
        )

    @override
    def info(self) -> dict[str, Any]:
        # The keys by which records are looked up are at the top level.
        keys = {name: self.metadata[name] for name in ("weights", "data", "task") if name in self.metadata}
        return {"kind": self.kind, "epochs": self.epochs, "seeds": self.seeds, **keys, "metadata": self.metadata}

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {"effects": self.effects_by_seed, "left_out": self.left_out}

    @classmethod
    @override
    def from_contents(cls, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["effects"], tensors["left_out"], info["epochs"], info["seeds"], info["metadata"])

    def __repr__(self) -> str:
        num_seeds, _, num_examples, num_queries = self.effects_by_seed.shape
        epochs = ", ".join(map(str, self.epochs))
        counts = f"{num_examples} examples left out, {num_queries} queries, {num_seeds} seeds"
        return f"FurtherTraining({counts}, after {epochs} epochs)"

    def _at(self, epoch: int | None) -> Tensor:
        epoch = self.epochs[-1] if epoch is None else epoch
        if epoch not in self.epochs:
            raise ValueError(f"`epoch` must be one of {self.epochs}, after which effects were measured, got {epoch}.")
        return self.effects_by_seed[:, self.epochs.index(epoch)].double()
