"""What learned operators share: a quiet Trainer, and the part of their effects that no scores explain."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning.steering.subsets import Design


class PublishedOperators(L.LightningModule):
    """Operators ``a_k`` of a design in a basis of low rank, both learned by Adam on one device.

    ``rank`` is that of the basis, ``stability`` the weight of the stability term, ``batch_size`` the examples per step,
    and the seed that of everything drawn.
    """

    def __init__(
        self,
        design: Design,
        *,
        rank: int = 16,
        stability: float = 1.0,
        learning_rate: float = 3e-2,
        max_steps: int = 600,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.design, self.rank, self.stability, self.learning_rate = design, rank, stability, learning_rate
        self.max_steps, self.batch_size, self.seed = max_steps, batch_size, seed
        self.basis = nn.Parameter(torch.empty(0))
        self.operators = nn.Parameter(torch.empty(0))

    def start(self, width: int, shape: tuple[int, ...], generator: torch.Generator, like: Tensor, size: int) -> None:
        """A random basis of ``width`` numbers, scaled by the root of ``size``, and operators of a shape that are zero.

        So the steered model is the frozen one at first, and the basis learns once the operators move.
        """
        basis = torch.randn(width, self.rank, generator=generator) / size**0.5
        self.basis, self.operators = nn.Parameter(basis.to(like)), nn.Parameter(like.new_zeros(shape))

    def train_dataloader(self) -> DataLoader[Any]:
        """Places of training examples, shuffled by the seed."""
        places = TensorDataset(torch.arange(self.design.num_train))
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(places, min(self.batch_size, len(places)), shuffle=True, generator=generator)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the basis and the operators."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def run_trainer(self, device: torch.device, *, show_progress: bool) -> None:
        """Take all steps, in every process of a distributed run alike; the module stays on the device."""
        with torch.enable_grad(), _quietly():
            trainer = L.Trainer(
                max_epochs=-1,
                max_steps=self.max_steps,
                accelerator="gpu" if device.type == "cuda" else device.type,
                devices=[device.index or 0] if device.type == "cuda" else 1,
                # In a distributed run every process fits alike; this trainer must not take part in it.
                plugins=[LightningEnvironment()],
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=show_progress,
            )
            trainer.fit(self, self.train_dataloader())
        self.to(device)


def unexplained(design: Design, generator: torch.Generator, subsets: Tensor | None = None) -> Tensor:
    """``I - S (S'S + gamma I)^-1 S'`` of all or some subsets, ``S = M R`` a sketch with a quarter as many columns."""
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
    with ExitStack() as stack, warnings.catch_warnings():
        # Both trees: where both are imported they share one way of logging, and the later one names it.
        for log in map(logging.getLogger, ("lightning.pytorch", "pytorch_lightning")):
            stack.callback(log.setLevel, log.level)
            log.setLevel(max(log.level, logging.WARNING))
        warnings.filterwarnings("ignore", ".*does not have many workers")
        yield
