"""Random numbers that belong to the examples of a batch, not to the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from stride_lightning.runtime.randomness import mix, seeded


@contextmanager
def row_draws(keys: Tensor | None, draw: int) -> Iterator[None]:
    """Seed random numbers of each row from its key and the number of the draw, inside the block."""
    with seeded(mix(draw)):
        yield
