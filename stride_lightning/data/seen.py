"""Training examples that a fit never saw, as far as its progress and the order of its loader tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from stride_lightning.data.examples import Examples
from stride_lightning.data.loading import loading_of
from stride_lightning.model.weights import attached_trainer


@dataclass(frozen=True)
class _Progress:
    """How much a fit has read."""

    epochs: int
    batches: int  # of an epoch
    num_processes: int | None  # None where nothing says it
    is_limited: bool = False  # whether the loader has more batches


def marked_seen(examples: Examples, model: nn.Module, checkpoint: Mapping[str, Any] | None) -> Examples:
    """The examples with a column ``seen``, where the fit of the model left some out and the order tells which.

    Where it does not tell, a note says that some may not have been seen.

    Args:
        examples: The training examples.
        model: The model, which may be attached to its Trainer.
        checkpoint: What a Trainer saved; None for the weights that the model has.
    """
    progress, loading = _progress(model, checkpoint, len(examples.dataset)), examples.loading
    trainer = attached_trainer(model) if checkpoint is None else None
    if trainer is not None and isinstance(trainer.train_dataloader, DataLoader):  # the data may come in another loader
        loading = loading_of(trainer.train_dataloader)
    if progress is None or "seen" in examples.columns:
        return examples
    if loading is None or not loading.is_whole:
        if not progress.is_limited:
            return examples
        note = (
            f"The last fit read only {progress.batches} batches in an epoch, fewer than its loader has: some examples "
            "may never have been seen. Their scores are still what training on them would do."
        )
        return replace(examples, notes=(*examples.notes, note))
    read = progress.batches * loading.batch_size * (progress.num_processes or 1)  # in an epoch
    size = len(examples)
    # Of shuffled data, each example is missed by an epoch with the same probability.
    missed = size * (1 - min(1.0, read / size)) ** (progress.epochs if loading.shuffle else 1)
    if missed < 0.5:
        return examples
    if loading.shuffle or progress.num_processes is None:
        note = (
            f"The last fit read {read} of {size} training examples in an epoch: some may never have been seen. Their "
            "scores are still what training on them would do."
        )
        return replace(examples, notes=(*examples.notes, note))
    seen = torch.zeros(len(examples.dataset), dtype=torch.bool)
    seen[examples.positions[:read]] = True
    note = (
        f"{size - read} of {size} training examples were never seen in the last fit, as train_info['seen'] says. Their "
        "scores are still what training on them would do."
    )
    return replace(examples, columns={**examples.columns, "seen": seen.tolist()}, notes=(*examples.notes, note))


def _progress(model: nn.Module, checkpoint: Mapping[str, Any] | None, size: int) -> _Progress | None:
    if checkpoint is not None:
        loop = (checkpoint.get("loops") or {}).get("fit_loop", {})
        if "epoch_progress" not in loop or "epoch_loop.batch_progress" not in loop:
            return None
        epochs, batches = loop["epoch_progress"]["total"]["ready"], loop["epoch_loop.batch_progress"]
        return _of_counts(epochs, batches["total"]["ready"], batches["current"]["ready"], None)
    trainer = attached_trainer(model)
    dataset = getattr(getattr(trainer, "train_dataloader", None), "dataset", None)
    if trainer is None or not hasattr(dataset, "__len__") or len(dataset) != size:  # pyright: ignore[reportArgumentType]
        return None
    loop = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    counts = loop.epoch_progress.total.ready, batches.total.ready, batches.current.ready
    progress, loader = _of_counts(*counts, trainer.world_size), trainer.train_dataloader
    is_limited = progress is not None and progress.batches < _length(loader)
    return None if progress is None else replace(progress, is_limited=is_limited)


def _of_counts(epochs: int, total: int, current: int, num_processes: int | None) -> _Progress | None:
    """Progress, where the last epoch may have been cut short."""
    if not epochs or not total:
        return None
    before = -(-(total - current) // max(1, epochs - 1))
    return _Progress(epochs, max(current, before), num_processes)


def _length(loader: Any) -> int:
    """Batches of a loader; 0 where it does not know them."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return 0
