"""From an information attributor to an index of its training examples, and back to nats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from stride_lightning.information.attributor import InformationAttributor
from stride_lightning.information.forms import Form, nats
from stride_lightning.information.index.base import VectorIndex, Where
from stride_lightning.information.index.checks import as_list, type_of
from stride_lightning.information.index.in_memory import MemoryIndex
from stride_lightning.information.index.lance import is_index
from stride_lightning.information.index.on_disk import InformationIndex


@dataclass(frozen=True, eq=False)
class Retrieved:
    """The training examples that tell most about each query, best first.

    Args:
        positions: Positions in the training dataset, shape ``(q, k)``.
        nats: Information lost or gained, same shape.
        columns: Metadata by column: ``k`` values for each query.
    """

    positions: Tensor
    nats: Tensor
    columns: dict[str, list[list[Any]]] = field(default_factory=dict)


def build_index(
    attributor: InformationAttributor,
    path: str | Path | None = None,
    *,
    form: Form | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> InformationIndex | MemoryIndex:
    """One vector for each training example, the variance correction folded in, made batch by batch.

    Call it again to continue a build on disk that was killed, or to add examples: vectors in the index are not computed
    again. The index must be of the same weights, features and prior, and for a loss of the same data.

    Memory beyond the attributor and its batch of b gradients: on disk at most ``4 k (2 g + 3 b)`` bytes for vectors of
    length k, where a group of g vectors takes 64 MiB, so about 128 MiB; in memory ``4 n k`` bytes for the n vectors
    besides. Metadata and two bytes per example are added to either.

    Args:
        attributor: Fitted, with one output per example: ``likelihood="margin"``, or a model with a single output.
        path: Folder of the index, which needs ``stride-lightning[index]``; None for one in memory.
        form: Which information its vectors give; by default that of the attributor. ``"copy"`` is the
            information of one more copy of an example, given all data.
        columns: Your own columns, one value per training example in reading order: str, int, float or bool.

    Raises:
        TypeError: If the first argument is not an information attributor, or columns are not a mapping.
        ValueError: If examples have several outputs, or columns are of another length.
        VectorIndexError: If the path holds an index of other weights, features, prior or data.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from stride_lightning.information.attributor import InformationGainAttributor
        >>> x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
        >>> data = TensorDataset(x, x.sum(1))
        >>> attributor = InformationGainAttributor(ridge=1.0, show_progress=False).fit(torch.nn.Linear(3, 1), data)
        >>> index = build_index(attributor, columns={"odd": [i % 2 == 1 for i in range(30)]})
        >>> search_index(attributor, index, TensorDataset(x[:2], x[:2].sum(1)), k=3).positions.shape
        torch.Size([2, 3])

    Reference: arXiv:2604.03858.
    """
    _check_attributor(attributor, "build_index")
    if columns is not None and not hasattr(columns, "items"):
        raise TypeError(
            "`columns` must be a dict from names to one value per training example, got "
            f'{type(columns).__name__}. Pass for example columns={{"source": sources}}.'
        )
    values = {name: as_list(column) for name, column in (columns or {}).items()}
    num_outputs, dim = attributor.vector_shape
    if num_outputs != 1:
        outputs = f"these have {num_outputs} outputs"
        raise ValueError(f"An index holds one vector per example, and {outputs}. Fit with likelihood='margin'.")
    positions = attributor.train_data.positions
    wrong = {name: len(column) for name, column in values.items() if len(column) != len(positions)}
    if wrong:
        raise ValueError(f"Expected {len(positions)} values per column, one per training example; got {wrong}.")
    types = {name: type_of(name, column) for name, column in values.items()}
    form = attributor.form if form is None else form
    index: InformationIndex | MemoryIndex
    if path is None:
        index = MemoryIndex(dim, attributor.identity(form), types)
    else:
        made_with = InformationIndex.open(path).identity if is_index(path) else {}
        identity = _expected_identity(attributor, form, made_with)
        index = InformationIndex.create(path, dim, identity=identity, columns=types, exist_ok=True)
    missing = (~index.holds(positions)).nonzero()[:, 0]

    def batches() -> Iterator[tuple[Tensor, Tensor, dict[str, list[Any]]]]:
        for places, vectors in attributor.vectors(missing, form):
            metadata = {name: [column[place] for place in places.tolist()] for name, column in values.items()}
            yield positions[places], vectors[:, 0], metadata

    index.build(batches(), show_progress=attributor.show_progress)
    return index


def search_index(
    attributor: InformationAttributor,
    index: InformationIndex | MemoryIndex,
    queries: Any,
    k: int = 10,
    *,
    target: str = "label",
    where: Where | None = None,
) -> Retrieved:
    """The training examples of an index that tell most about queries.

    Args:
        attributor: Fitted to the model and data that the index is of.
        index: The result of :func:`build_index`, or an opened :class:`InformationIndex`.
        queries: A Dataset, DataLoader or LightningDataModule.
        k: How many for each.
        target: ``"label"`` or ``"predicted"``.
        where: Which training examples to look at: a function of the columns and ``"position"``, a dict of arrays, that
            returns a boolean for each row: ``lambda columns: columns["source"] == "web"``.

    Raises:
        TypeError: If the first arguments are not an information attributor and an index, or `where` is no function.
        VectorIndexError: If the index is of another model, projection or prior.
    """
    _check_attributor(attributor, "search_index")
    if not isinstance(index, VectorIndex):
        raise TypeError(
            f"search_index() expects an index as its second argument, got {_kind(index)}. Make one with "
            "build_index(attributor), or open one with InformationIndex.open(path)."
        )
    form = index.identity.get("form", attributor.form)
    index.check_identity(_expected_identity(attributor, form, index.identity))
    hits = index.search(attributor.query_vectors(queries, target, form)[:, 0], k, where)
    return Retrieved(hits.positions, nats(hits.dots[..., None, None], form), hits.columns)


def _check_attributor(attributor: Any, call: str) -> None:
    """Refuse anything but a fitted information attributor."""
    if not isinstance(attributor, InformationAttributor):
        raise TypeError(
            f"{call}() expects a fitted information attributor as its first argument, got {_kind(attributor)}. Make "
            'one with InformationGainAttributor(likelihood="margin").fit(model, train_data).'
        )
    attributor.check_fitted(f"{call}()")


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def _expected_identity(attributor: InformationAttributor, form: Form, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that an index should have. An index of gains may grow, so only its first data must agree."""
    data = made_with.get("data")
    return attributor.identity(form, data.get("num_examples") if form == "gain" and isinstance(data, dict) else None)
