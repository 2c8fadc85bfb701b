"""The best and the worst of many scores, from a whole tensor or from one tile after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stride_lightning.results.agreement import EXPLANATION, MARK
from stride_lightning.results.deferred import Deferred, DeferredField
from stride_lightning.runtime.checks import check_count
from stride_lightning.runtime.distributed import gather_objects, world_size
from stride_lightning.tasks.measures import in_words


@dataclass(frozen=True, eq=False)
class TopExamples:
    """The most helpful and the most harmful training examples of each query.

    Args:
        proponents: Positions in the training dataset, most helpful first, shape ``(q, k)``.
        proponent_scores: Their scores, same shape.
        opponents: Positions in the training dataset, most harmful first, shape ``(q, k)``.
        opponent_scores: Their scores, same shape.
        proponent_stds: Uncalibrated standard deviations of the scores, or None; likewise ``opponent_stds``. They are
            computed when they are first read, if nobody read those of the scores before.
        is_signed: Whether the sign of a score tells who helps and who harms; if not, its size tells how much.
        disagreeing: Rows of the queries on which the readout disagrees with the model.
        measure: What is explained of the queries, its name and direction; None is their loss.
    """

    proponents: Tensor
    proponent_scores: Tensor
    opponents: Tensor
    opponent_scores: Tensor
    proponent_stds: DeferredField = DeferredField(like="proponent_scores")  # noqa: RUF009 (a descriptor)
    opponent_stds: DeferredField = DeferredField(like="opponent_scores")  # noqa: RUF009 (a descriptor)
    is_signed: bool = True
    disagreeing: tuple[int, ...] = ()
    measure: dict[str, str] | None = None

    def tensors(self) -> dict[str, Tensor | Deferred]:
        """The fields that are tensors, by name; it computes none of them."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor | Deferred)}

    def with_fields(self, **changes: Any) -> TopExamples:
        """The same with other values in some fields; unlike ``dataclasses.replace`` it computes nothing."""
        return TopExamples(**(vars(self) | changes))

    def first(self, k: int) -> TopExamples:
        """The first ``k`` of each kind."""
        return self.with_fields(**{name: tensor[:, :k] for name, tensor in self.tensors().items()})

    def renamed(self, names: Tensor) -> TopExamples:
        """The same with ``names[column]`` in place of each column; ``names`` has shape ``(num_train,)``."""
        return self.with_fields(proponents=names[self.proponents], opponents=names[self.opponents])

    def __repr__(self) -> str:
        lines = []
        for query in range(min(len(self.proponents), 10)):
            name = f"query {query}{f' {MARK}' if query in self.disagreeing else ''}:"
            helpful = _listed(self.proponents[query], self.proponent_scores[query], sign=1)
            if not self.is_signed:
                lines.append(f"{name} most told by {helpful}")
                continue
            harmful = _listed(self.opponents[query], self.opponent_scores[query], sign=-1)
            lines.append(f"{name} helped by {helpful}\n{' ' * len(name)} harmed by {harmful}")
        more = len(self.proponents) - 10
        lines += [f"... and {more} more queries"] if more > 0 else []
        if self.measure is not None and self.is_signed:
            lines.append(f"positive: {in_words(self.measure)}")
        return "\n".join([*lines, EXPLANATION] if any(query < 10 for query in self.disagreeing) else lines)


def rank_columns(scores: Tensor, k: int, std: Tensor | Deferred | None = None) -> TopExamples:
    """The ``k <= n`` best and worst columns of each row of scores, ``(q, n)``; ties come in order of columns.

    Example:
        >>> rank_columns(torch.tensor([[0.5, -0.25, 0.5, 1.0]]), k=2)
        query 0: helped by 3 (+1), 0 (+0.5)
                 harmed by 1 (-0.25)
    """
    # Stable sorts, so that ties (the zeros of a lasso) come in order of position.
    helpful, harmful = (scores.sort(dim=1, descending=down, stable=True) for down in (True, False))
    best, worst = helpful.indices[:, :k], harmful.indices[:, :k]
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    stds = (None, None) if std is None else (std[rows, best], std[rows, worst])
    return TopExamples(best, helpful.values[:, :k], worst, harmful.values[:, :k], *stds)


def joined(parts: Sequence[TopExamples]) -> TopExamples:
    """The top of some queries, then that of more; the same ``k`` in all parts, standard deviations in all or none.

    Example:
        >>> scores = torch.tensor([[0.5, -0.25], [0.0, 1.0]])
        >>> joined([rank_columns(row[None], k=1) for row in scores])
        query 0: helped by 0 (+0.5)
                 harmed by 1 (-0.25)
        query 1: helped by 1 (+1)
                 harmed by nothing
    """
    together = {name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].tensors()}
    starts = itertools.accumulate((len(part.proponents) for part in parts), initial=0)
    rows = tuple(start + row for start, part in zip(starts, parts, strict=False) for row in part.disagreeing)
    return parts[0].with_fields(**together, disagreeing=rows)


class TopCollector:
    """Collects the best and the worst of scores that are computed tile by tile and never lie in memory together.

    Ties go to the lower column, whatever the tiles and their order, as in :meth:`Attribution.top`. Beyond the tile
    it takes ``24 q k`` bytes, and during an update about four times the tile's memory.

    Args:
        num_queries: Rows of every tile, q.
        k: Number of proponents, and of opponents, of each query.

    Example:
        >>> collector = TopCollector(num_queries=1, k=2)
        >>> collector.update(torch.tensor([[1.0, -2.0]]), columns=torch.tensor([2, 3]))
        >>> collector.update(torch.tensor([[1.0, 0.5]]), columns=torch.tensor([0, 1]))
        >>> collector.compute()
        query 0: helped by 0 (+1), 2 (+1)
                 harmed by 3 (-2)
    """

    def __init__(self, num_queries: int, k: int) -> None:
        self.num_queries, self.k = check_count("num_queries", num_queries, 0), check_count("k", k)
        self.num_columns = 0
        # The largest values of each row and their columns: of proponents, and of opponents with negated scores.
        nothing = torch.empty(num_queries, 0), torch.empty(num_queries, 0, dtype=torch.int64)
        self._sides = [nothing, nothing]

    def update(self, scores: Tensor, columns: Tensor) -> None:
        """Add the scores of some training examples for all queries.

        Args:
            scores: Shape ``(num_queries, tile)``, on any device; compared as float32.
            columns: Places of the examples in the reading order, integers of shape ``(tile,)``, in any order. Give
                each once over all updates and processes.

        Raises:
            ValueError: If shapes do not fit, or a score is NaN.
        """
        if scores.shape != (self.num_queries, *columns.shape) or columns.ndim != 1:
            raise ValueError(
                f"Expected `scores` of shape ({self.num_queries}, tile) and `columns` of shape (tile,), got "
                f"{tuple(scores.shape)} and {tuple(columns.shape)}."
            )
        columns, order = columns.to(scores.device, torch.int64).sort()
        scores = scores.detach()[:, order].float()
        if bool(scores.isnan().any()):
            query, place = scores.isnan().nonzero()[0].tolist()
            raise ValueError(
                f"The score of query {query} for training example {int(columns[place])} (in reading order) is NaN, "
                "so it has no rank. Look for the cause in the model and its loss (did training diverge?)."
            )
        self.num_columns += len(columns)
        for side, signed in enumerate((scores, -scores)):
            new = _largest(signed, columns, self.k)
            values, places = (
                torch.cat([old.to(scores.device), part], 1) for old, part in zip(self._sides[side], new, strict=True)
            )
            self._sides[side] = _first(values, places, self.k)

    def gather(self) -> None:
        """Merge the collectors of all processes; a collective call, after which all hold the same."""
        if world_size() == 1:
            return
        mine = self.num_columns, [(values.cpu(), columns.cpu()) for values, columns in self._sides]
        counts, sides = zip(*gather_objects(mine), strict=True)
        self.num_columns = sum(counts)
        for side, parts in enumerate(zip(*sides, strict=True)):
            values, columns = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
            self._sides[side] = _first(values, columns, self.k)

    def compute(self) -> TopExamples:
        """The ``k`` best and worst so far, at most, on the CPU; columns in place of positions.

        Raises:
            ValueError: If nothing was added, or a column was added twice.
        """
        if self.num_columns == 0:
            raise ValueError("The collector has seen no scores: call `update` first.")
        (best, proponents), (worst, opponents) = ((values.cpu(), columns.cpu()) for values, columns in self._sides)
        by_column = proponents.sort(1).values
        if bool((twice := by_column[:, 1:] == by_column[:, :-1]).any()):
            raise ValueError(
                f"Training example {int(by_column[:, 1:][twice][0])} (in reading order) was added twice: give each "
                "column once over all updates and processes."
            )
        return TopExamples(proponents, best, opponents, 0 - worst)  # minus zero would be -0.0


def _largest(values: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values of each row, in no order, and their columns; ties go to the first. ``(q, t) -> (q, k)``.

    ``topk`` breaks ties at will, and a stable sort of everything takes four times as long.
    """
    k = min(k, len(columns))
    if k == 0 or len(values) == 0:
        return values[:, :k], columns[:k].expand(len(values), -1)
    least = values.topk(k, dim=1).values[:, -1:]
    above, level = values > least, values == least
    room = k - above.sum(1, keepdim=True, dtype=torch.int32)
    chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= room))
    places = chosen.nonzero()[:, 1].view(-1, k)
    return values.gather(1, places), columns[places]


def _first(values: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values of each row and their columns, in order; ties in order of columns."""
    by_column = columns.argsort(1)
    values, columns = values.gather(1, by_column), columns.gather(1, by_column)
    ranked = values.sort(dim=1, descending=True, stable=True)
    return ranked.values[:, :k], columns.gather(1, ranked.indices[:, :k])


def _listed(indices: Tensor, scores: Tensor, sign: int) -> str:
    shown = [f"{i} ({s:+.2g})" for i, s in zip(indices.tolist(), scores.tolist(), strict=True) if s * sign > 0]
    return ", ".join(shown) or "nothing"
