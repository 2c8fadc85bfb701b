"""Reading data in order: the one loop of all methods, which names examples that cannot be read or are not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.data.fingerprints import Fingerprint
from stride_lightning.model.layers import in_precision_of
from stride_lightning.model.weights import borrowed
from stride_lightning.runtime.progress import counting
from stride_lightning.tasks.inference import check_outputs
from stride_lightning.tasks.likelihoods import Task, columns


@dataclass(eq=False)
class Reading:
    """One pass over examples in order, batch by batch, which ends with their fingerprint.

    The model refuses batches that it cannot take, and decides the precision of inputs. With a ``share``, only its
    places are read. Without a description there is no progress bar.

    Raises:
        ValueError: Naming the first example that cannot be read.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from stride_lightning import Classification
        >>> data = Examples(TensorDataset(torch.zeros(3, 2), torch.tensor([0, 1, 1])))
        >>> reading = Reading(data, Classification(), batch_size=2, device=torch.device("cpu"))
        >>> [rows.targets.tolist() for rows in reading]
        [[0, 1], [1]]
        >>> reading.fingerprint["num_examples"]
        3
    """

    examples: Examples
    task: Task
    model: nn.Module | None = None
    _: KW_ONLY
    batch_size: int
    device: torch.device
    share: slice | None = None
    description: str = ""
    show_progress: bool = True
    #: Fingerprint of the examples, once they have been read.
    fingerprint: dict[str, Any] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[Rows]:
        fingerprint = Fingerprint(content=not self.examples.is_random)
        start, stop, _ = (self.share or slice(None)).indices(len(self.examples))
        part = self.examples if self.share is None else self.examples.subset(range(start, stop))
        with counting(stop - start, self.description, show=self.show_progress and bool(self.description)) as bar:
            for batch, digests in part.batches(self.batch_size, self.device):
                places = slice(start, start + len(digests))
                with self.examples.naming(start):
                    if self.model is not None:
                        self.task.check_batch(self.model, batch)
                    targets = self.task.targets(batch)
                self._check_size(targets, places)
                fingerprint.update(digests)
                yield Rows(places, batch, targets, self)
                start = places.stop
                bar.update(len(digests))
        self.fingerprint = fingerprint.summary()

    def _check_size(self, targets: Tensor | None, places: slice) -> None:
        """Refuse a batch in which a collate function has dropped or added examples."""
        if targets is None or targets.ndim == 0 or len(targets) == places.stop - places.start:
            return
        first, last = self.examples.name(places.start), self.examples.name(places.stop - 1)
        raise ValueError(
            f"The batch from {self.examples.kind} {first} to {last} holds {len(targets)} targets for "
            f"{places.stop - places.start} examples. Scores name examples by their position, so a collate_fn may drop "
            "or add none. Leave out those that it drops: torch.utils.data.Subset(dataset, positions)."
        )

    def encoded(self, num_outputs: int, target: str = "label") -> list[tuple[Any, Tensor]]:
        """All batches, as :meth:`Rows.encoded` gives them."""
        return [rows.encoded(num_outputs, target) for rows in self]


@dataclass(frozen=True)
class Rows:
    """Examples that were read together."""

    places: slice
    batch: Any  # on the device
    targets: Tensor | None  # as the task reads them
    reading: Reading  # the pass that read them

    def __len__(self) -> int:
        return self.places.stop - self.places.start

    @cached_property
    def inputs(self) -> Any:
        """The inputs of the model, in its precision."""
        assert self.reading.model is not None
        return in_precision_of(self.reading.model, self.reading.task.inputs(self.batch))

    def encoded(self, num_outputs: int, target: str = "label") -> tuple[Any, Tensor]:
        """Inputs and encoded targets in the model's precision; ``"predicted"`` stands for its most likely targets."""
        model, task, targets = self.reading.model, self.reading.task, self.targets
        assert model is not None
        with self.naming():
            if target == "predicted":
                with torch.no_grad():
                    targets = task.predict(columns(task.outputs(model, self.inputs)))
            return self.inputs, _encoded(model, task, targets, num_outputs)

    def naming(self) -> AbstractContextManager[None]:
        """Turn errors about a row into errors that name its example."""
        return self.reading.examples.naming(self.places.start)


def required(targets: Tensor | None) -> Tensor:
    """The targets of a batch; a batch without any is refused."""
    if targets is None:
        raise ValueError(
            "The batch has no targets, so losses cannot be measured. Give every example a target; for queries without, "
            "pass target='predicted' to attribute()."
        )
    return targets


def encoded_batch(model: nn.Module, task: Task, batch: Any, num_outputs: int) -> tuple[Any, Tensor]:
    """Inputs and encoded targets of any batch, as :meth:`Rows.encoded` gives them.

    Encoding checks the targets. Checks look at values, which no vectorised pass can, so they come first.
    """
    task.check_batch(model, batch)
    inputs = in_precision_of(model, task.inputs(batch))
    return inputs, _encoded(model, task, task.targets(batch), num_outputs)


def _encoded(model: nn.Module, task: Task, targets: Tensor | None, num_outputs: int) -> Tensor:
    encoded = task.encode(required(targets), num_outputs)
    precise = in_precision_of(model, encoded)
    # Labels of tokens are numbers that half precision would round.
    return encoded if task.has_tokens and precise.dtype != torch.float64 else precise


def count_outputs(model: nn.Module, task: Task, batch: Any) -> int:
    """Number of outputs for one example; refuses batches that the model cannot take and outputs of a wrong form."""
    task.check_batch(model, batch)
    with borrowed(model, None, None), torch.no_grad():
        outputs = task.outputs(model, in_precision_of(model, task.inputs(batch)))
    check_outputs(outputs, len(outputs), task)
    return columns(outputs).shape[-1]


@dataclass
class Survey:
    """Facts about a data set, from one pass over it."""

    fingerprint: dict[str, Any]
    targets: Tensor | None  # if every example has one number
    kinds: Tensor | None  # a number for the kind of each example: its target, or how much its tokens count
    num_tokens: Tensor | None = None  # that are predicted of each text, int64 of shape (n,)
    longest: int = 1  # tokens of the longest batch of texts, with its padding


def survey(
    examples: Examples, task: Task, model: nn.Module | None = None, num_outputs: int = 0, *, description: str = ""
) -> Survey:
    """Read a data set once, without running a model.

    An example that a model with so many outputs cannot take is refused before hours have gone into those before it.
    """
    reading = Reading(examples, task, model, batch_size=1024, device=torch.device("cpu"), description=description)
    kinds: list[Tensor | None] = []
    num_tokens, longest = [], 1
    for rows in reading:
        kind = rows.targets
        if model is not None and kind is not None:
            with rows.naming():
                task.encode(kind, num_outputs)
        if task.has_tokens and kind is not None:
            weights = kind[..., 1]
            num_tokens.append((weights > 0).sum(1))
            longest = max(longest, weights.shape[1])
            kind = weights.sum(1)
        kinds.append(kind)
    numbers = [kind.flatten() for kind in kinds if kind is not None and kind.numel() == len(kind)]
    joined = torch.cat(numbers) if len(numbers) == len(kinds) else None
    targets = None if task.has_tokens else joined
    return Survey(reading.fingerprint, targets, joined, torch.cat(num_tokens) if num_tokens else None, longest)


def fingerprint_of(examples: Examples) -> dict[str, Any]:
    """The fingerprint of a data set."""
    fingerprint = Fingerprint(content=not examples.is_random)
    for _, digests in examples.batches(1024, torch.device("cpu")):
        fingerprint.update(digests)
    return fingerprint.summary()
