"""Examples read one by one, and batches of them: errors name the examples by kind and position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from stride_lightning.data.fingerprints import digest_rows
from stride_lightning.runtime.checks import first_line
from stride_lightning.runtime.operations import Operations
from stride_lightning.runtime.randomness import held_generators, mix, preserved_random_state, reseed, seed_all
from stride_lightning.runtime.row_draws import RowDraws

#: An example with its position in the dataset.
Numbered = tuple[int, Any]

_HOW_TO_COLLATE = (
    "Pass a DataLoader with the collate_fn of training, for the queries too. Where examples differ in size it must pad "
    "them, as transformers.DataCollatorWithPadding does with texts."
)


class MissingExample(ValueError):
    """The dataset holds None in the place of an example."""


class OneByOne(Dataset[Numbered]):
    """Reads examples with their positions, each under the seed of its position if there is one.

    Args:
        dataset: Map-style data set.
        kind: What errors call an example of it.
        seed_of: The seed for a position; None leaves the random generators alone.
    """

    def __init__(self, dataset: Any, kind: str, seed_of: Callable[[int], int] | None = None) -> None:
        self.dataset, self.kind, self.seed_of = dataset, kind, seed_of

    @cached_property
    def _generators(self) -> list[Any]:
        """Random generators that the dataset holds itself."""
        return held_generators(self.dataset)

    def __getitem__(self, position: int) -> Numbered:
        if self.seed_of is not None:
            seed = self.seed_of(position)
            seed_all(seed)
            for generator in self._generators:
                reseed(generator, seed)
        try:
            example = self.dataset[position]
        except Exception as error:
            call = f"{type(self.dataset).__name__}[{position}]"
            raise ValueError(
                f"{self.kind.capitalize()} {position} cannot be read: {call} raised {_describe_error(error)} "
                "Mend the dataset, or leave this one out: torch.utils.data.Subset(dataset, positions)."
            ) from error
        if example is None:
            raise MissingExample(
                f"{self.kind.capitalize()} {position} is None. Scores name examples by their position, so every "
                "position must hold an example. Leave this one out: torch.utils.data.Subset(dataset, positions)."
            )
        return position, example


class Collate:
    """The user's collate function for examples with positions.

    Args:
        collate_fn: The function.
        kind: What errors call an example.
        seed: Seed of what the function draws, beside the positions; None leaves the random generators alone.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any], kind: str, seed: int | None = None) -> None:
        self.collate_fn, self.kind, self.seed = collate_fn, kind, seed

    def __call__(self, numbered: Sequence[Numbered]) -> Any:
        """The batch that the collate function makes of the examples."""
        try:
            with self._seeded(numbered) as examples:
                batch = self.collate_fn(examples)
        except Exception as error:
            rows = self._failing_rows([example for _, example in numbered])
            names = self._names([numbered[row][0] for row in rows])
            raise ValueError(
                f"{names[0].upper()}{names[1:]} cannot be put into a batch: {name_of(self.collate_fn)} raised "
                f"{_describe_error(error)} {_HOW_TO_COLLATE}"
            ) from error
        if batch is None:
            raise ValueError(
                f"{name_of(self.collate_fn)} returned None for {self._names([position for position, _ in numbered])}. "
                "Scores name examples by their position, so no example may be dropped. Leave these out: "
                "torch.utils.data.Subset(dataset, positions)."
            )
        self._check_none_is_dropped(batch, numbered)
        return batch

    def _check_none_is_dropped(self, batch: Any, numbered: Sequence[Numbered]) -> None:
        """Refuse a batch with too few rows if an example cannot be put into a batch alone, as one that is dropped."""
        shapes = [leaf.shape for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
        count = len(numbered)
        if count == 1 or not shapes or any(shape[0] > count or count in shape for shape in shapes):
            return
        if dropped := [position for position, example in numbered if self._fails([example])]:
            raise ValueError(
                f"{name_of(self.collate_fn)} made a batch of {max(shape[0] for shape in shapes)} rows of {count} "
                f"examples, without {self._names(dropped)}. Scores name examples by their position, so a collate_fn "
                "may drop or add none. Leave out those that it drops: torch.utils.data.Subset(dataset, positions)."
            )

    @contextmanager
    def _seeded(self, numbered: Sequence[Numbered]) -> Iterator[list[Any]]:
        """The examples, and inside the block random numbers that belong to them, unless there is no seed."""
        examples = [example for _, example in numbered]
        if self.seed is None:
            yield examples
            return
        keys = torch.tensor([key_of(position) for position, _ in numbered])
        row_draws = RowDraws(keys, self.seed)
        with preserved_random_state(self.collate_fn), Operations(row_draws):
            watched = _Watched(examples, keys, self.seed, row_draws, held_generators(self.collate_fn))
            watched.turn_to(keys)
            yield watched

    def _failing_rows(self, examples: list[Any]) -> Sequence[int]:
        """The first example that cannot be collated alone, else the first pair that cannot be together, else all."""
        alone = [[row] for row in range(len(examples))]
        pairs = [[0, row] for row in range(1, len(examples))]
        return next(
            (rows for rows in (*alone, *pairs) if self._fails([examples[row] for row in rows])), range(len(examples))
        )

    def _fails(self, examples: list[Any]) -> bool:
        try:
            self.collate_fn(examples)
        except Exception:
            return True
        return False

    def _names(self, positions: list[int]) -> str:
        more = f" and {len(positions) - 2} more" if len(positions) > 2 else ""
        return " and ".join(f"{self.kind} {position}" for position in positions[:2]) + more


class CollateWithDigests(Collate):
    """The same, with the digests of the examples beside the batch."""

    def __init__(
        self, collate_fn: Callable[[list[Any]], Any], kind: str, seed: int | None = None, *, content: bool
    ) -> None:
        super().__init__(collate_fn, kind, seed)
        self.content = content

    def __call__(self, numbered: Sequence[Numbered]) -> tuple[Any, Tensor]:
        """The batch, and the digest of each example, uint8 of shape ``(B, 33)``."""
        digests = digest_rows([example for _, example in numbered], content=self.content)
        return super().__call__(numbered), digests


class _Watched(list[Any]):
    """Examples in a list; what a collate function draws after it took one of them belongs to that one.

    Once a loop over all of them has ended, the rows of what torch draws belong to them, and other numbers to the batch.
    """

    def __init__(
        self, examples: list[Any], keys: Tensor, seed: int, row_draws: RowDraws, generators: list[Any]
    ) -> None:
        super().__init__(examples)
        self._keys, self._seed, self._row_draws, self._generators = keys, seed, row_draws, generators

    def __iter__(self) -> Iterator[Any]:
        for row, example in enumerate(super().__iter__()):
            self.turn_to(self._keys[row : row + 1])
            yield example
        self.turn_to(self._keys)

    def turn_to(self, keys: Tensor) -> None:
        """Let what is drawn from now on belong to the examples of these keys."""
        self._row_draws.turn_to(keys)
        seed = mix(self._seed, *keys.tolist())
        seed_all(seed)
        for generator in self._generators:
            reseed(generator, seed)


def key_of(position: int) -> int:
    """Number from which the random draws of an example are seeded.

    A training example beside queries has the position ``-1 - p``, and draws what it draws at ``p``.
    """
    return position if position >= 0 else -1 - position


def name_of(function: Callable[..., Any]) -> str:
    """What messages call a function."""
    return getattr(function, "__name__", type(function).__name__)


def _describe_error(error: Exception) -> str:
    """Class and first line of an error, as a sentence."""
    return f"{type(error).__name__}: {first_line(error).rstrip('.')}."
