"""What STRIDE needs of a fit, for rows of numbers (``dense``) and for texts (``language``) alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.readout.spread import Spread
from stride_lightning.steering.subsets import Design
from stride_lightning.storage.records import Record
from stride_lightning.tasks.own_loss import RowFunction

BasisName = Literal["statistics", "learned"]
ScoresName = Literal["prior", "lasso", "ridge", "closed-form"]

#: Bytes of a group of tensors beyond which a record leaves it out, where a fit can compute it again.
MOST_RECORDED = 2**24


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of :class:`~stride_lightning.StrideAttributor`."""

    layers: list[str] | None = None
    basis: BasisName = "statistics"
    rank: int | None = None
    #: Name of the recovery that will follow; none without queries.
    recovery: str = ""
    seed: int = 0
    batch_size: int = 256
    show_progress: bool = True
    cache_dir: str | Path | None = None
    #: What is explained of each query; None for its loss.
    measure: RowFunction | None = None
    #: Hash of the model's weights, which a cache must be of.
    weights: str = ""

    @property
    def known_rank(self) -> int:
        """The rank of a learned basis."""
        return self.rank or 16


@dataclass(frozen=True)
class Answers:
    """What a fit says about q queries."""

    #: Of the frozen model, shape ``(q,)``.
    losses: Tensor
    #: Effects of the operators, shape ``(q, K)``; empty without operators.
    measurements: Tensor
    #: What identifies the queries.
    fingerprint: dict[str, Any]
    #: Their targets, where each is a number.
    targets: Tensor | None = None
    #: Queries that the priors are of, where every rank has a share of them; all when None.
    share: slice | None = None
    #: First-order influence of the training examples, shape ``(q, n)``, where the recovery starts from it.
    prior: Tensor | None = None
    #: Columns of ``query_info``, of all queries.
    opinions: dict[str, list[Any]] = field(default_factory=dict)
    #: Computes the standard deviation of the prior, of all queries.
    spread: Spread | None = None


@dataclass(frozen=True)
class FitRecord:
    """What a callback stores of a fit: groups of tensors by name, and plain values."""

    tensors: dict[str, dict[str, Tensor]]
    info: dict[str, Any] = field(default_factory=dict)

    def of_moderate_size(self) -> tuple[FitRecord, dict[str, int]]:
        """The record without its largest groups, and their bytes; operators stay, since they were wished for."""
        sizes = {group: sum(map(_num_bytes, tensors.values())) for group, tensors in self.tensors.items()}
        large = {group: size for group, size in sizes.items() if size > MOST_RECORDED and group != "operators"}
        tensors = {group: named for group, named in self.tensors.items() if group not in large}
        return FitRecord(tensors, self.info), large


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Fit(Protocol):
    """STRIDE of one kind of data: call :meth:`prepare`, then :meth:`fit`, then any of the others."""

    #: Modules whose inputs make the basis.
    layers: list[str]
    #: Options that only this kind of fit has, as they were chosen.
    options: dict[str, Any]
    #: What was found out and what it cost; plain values.
    metadata: dict[str, Any]
    #: What identifies the training data.
    fingerprint: dict[str, Any]
    #: Targets of the training examples, where each is a number.
    train_targets: Tensor | None
    #: Of the training examples under the frozen model, on the CPU, shape ``(n,)``.
    losses: Tensor

    def choose_layers(self, model: nn.Module, inputs: Any, size: int) -> list[str]:
        """The default layers of a model, from a forward pass of ``size`` examples."""
        ...

    def prepare(self, model: nn.Module, train: Examples, device: torch.device, record: Record | None = None) -> None:
        """Read the training data, in the basis of a record if there is one; the model is in eval mode on ``device``."""

    def expect(self, design: Design | None, num_queries: int) -> None:
        """Tell the call in progress what :meth:`fit` and :meth:`ask` will take."""

    def fit(self, design: Design | None, record: Record | None = None) -> None:
        """Fit the operators of a design, if any, or take from the record what it knows."""

    def ask(self, queries: Examples, target: str = "label") -> Answers:
        """Run over the queries and measure what the operators do to them; ranks share the work."""
        ...

    def effects(self, queries: Examples, target: str, weights: Tensor) -> Tensor:
        """Rise of each query's loss with weights ``(n, G)`` of the training examples, shape ``(q, G)``."""
        ...

    def self_influence(self) -> Tensor | None:
        """Effect of every training example on its own loss, shape ``(n,)``; None where scores of queries give it."""
        ...

    def record(self) -> FitRecord:
        """What another fit to the same weights and data may start from."""
        ...
