"""Examples read one by one, and batches of them: errors name the examples by kind and position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from stride_lightning.data.fingerprints import digest_rows
from stride_lightning.runtime.checks import first_line
from stride_lightning.runtime.randomness import seed_all

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

    def __getitem__(self, position: int) -> Numbered:
        if self.seed_of is not None:
            seed_all(self.seed_of(position))
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
    """The user's collate function for examples with positions."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any], kind: str) -> None:
        self.collate_fn, self.kind = collate_fn, kind

    def __call__(self, numbered: Sequence[Numbered]) -> Any:
        """The batch that the collate function makes of the examples."""
        examples = [example for _, example in numbered]
        try:
            batch = self.collate_fn(examples)
        except Exception as error:
            names = self._names([numbered[row][0] for row in self._failing_rows(examples)])
            raise ValueError(
                f"{names[0].upper()}{names[1:]} cannot be put into a batch: {_name_of(self.collate_fn)} raised "
                f"{_describe_error(error)} {_HOW_TO_COLLATE}"
            ) from error
        if batch is None:
            raise ValueError(
                f"{_name_of(self.collate_fn)} returned None for {self._names([position for position, _ in numbered])}. "
                "Scores name examples by their position, so no example may be dropped. Leave these out: "
                "torch.utils.data.Subset(dataset, positions)."
            )
        return batch

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

    def __init__(self, collate_fn: Callable[[list[Any]], Any], kind: str, *, content: bool) -> None:
        super().__init__(collate_fn, kind)
        self.content = content

    def __call__(self, numbered: Sequence[Numbered]) -> tuple[Any, Tensor]:
        """The batch, and the digest of each example, uint8 of shape ``(B, 33)``."""
        digests = digest_rows([example for _, example in numbered], content=self.content)
        return super().__call__(numbered), digests


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _describe_error(error: Exception) -> str:
    """Class and first line of an error, as a sentence."""
    return f"{type(error).__name__}: {first_line(error).rstrip('.')}."
