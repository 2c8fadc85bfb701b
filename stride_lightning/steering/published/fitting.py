"""What learned operators share: a quiet Trainer, and the part of their effects that no scores explain."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch.utils.data import DataLoader

from stride_lightning.steering.subsets import Design


def fit_by_trainer(
    module: L.LightningModule,
    loader: DataLoader[Any],
    device: torch.device,
    max_steps: int,
    *,
    show_progress: bool,
) -> None:
    """Fit a module for some steps on one device, in every process alike; it stays on the device."""
    with torch.enable_grad(), _quietly():
        trainer = L.Trainer(
            max_epochs=-1,
            max_steps=max_steps,
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            # In a distributed run every process fits alike; this trainer must not take part in it.
            plugins=[LightningEnvironment()],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=show_progress,
        )
        trainer.fit(module, loader)
    module.to(device)


def unexplained(design: Design, generator: torch.Generator, subsets: Tensor | None = None) -> Tensor:
    """``I - S (S'S + gamma I)^-1 S'`` for a sketch ``S = M R`` with a quarter as many columns as subsets.

    Args:
        design: The memberships ``M``.
        generator: Draws ``R``.
        subsets: Some of the subsets; all when None.
    """
    count = design.num_subsets if subsets is None else len(subsets)
    columns = max(1, count // 4)
    sketched = design.responses(torch.randn(columns, design.num_train, generator=generator)).T.double()  # (K, columns)
    sketched = sketched if subsets is None else sketched[subsets]
    sketched -= sketched.mean(0)
    gram = sketched.T @ sketched
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    return torch.eye(count, dtype=torch.float64) - sketched @ torch.linalg.solve(gram + ridge, sketched.T)


@contextmanager
def _quietly() -> Iterator[None]:
    """A Trainer inside a library need not introduce itself, nor advise on workers for data that is in memory."""
    # Both trees: where both are imported they share one way of logging, and the later one names it.
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(max(log.level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
