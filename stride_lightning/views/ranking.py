"""The rows that every view shows: the ranked training examples of one query, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from stride_lightning.results.attribution import Attribution


@dataclass(frozen=True)
class RankedExample:
    """One proponent or opponent.

    Args:
        column: Its column of the scores.
        position: Its position in the training dataset.
        score: Its score.
        std: Posterior standard deviation of the score, if there is one.
        target: Its target as text, if it has one.
        info: Its values of the columns of ``train_info``, as text.
    """

    column: int
    position: int
    score: float
    std: float | None
    target: str | None
    info: tuple[str, ...]


def rank_examples(attribution: Attribution, query: int, k: int) -> tuple[list[RankedExample], list[RankedExample]]:
    """Proponents and opponents of one query, strongest first.

    Examples that score exactly zero, or have the other sign, are neither.

    Args:
        attribution: The scores.
        query: Row of the scores.
        k: At most how many of each; fewer where the attribution holds fewer.

    Returns:
        Proponents and opponents, at most ``k`` of each.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> proponents, opponents = rank_examples(Attribution(torch.tensor([[0.0, -0.25, 0.5]])), query=0, k=2)
        >>> [example.position for example in proponents], [example.position for example in opponents]
        ([2], [1])
    """
    one = attribution[query]
    top = one.top_columns(min(k, one.num_ranked))

    def examples(columns: Tensor, scores: Tensor, stds: Tensor | None, sign: int) -> list[RankedExample]:
        return [
            RankedExample(
                column,
                int(one.train_indices[column]),
                score,
                None if stds is None else stds[0, rank].item(),
                target_text(one.train_targets, column),
                tuple(str(values[column]) for values in one.train_info.values()),
            )
            for rank, (column, score) in enumerate(zip(columns[0].tolist(), scores[0].tolist(), strict=True))
            if score * sign > 0
        ]

    proponents = examples(top.proponents, top.proponent_scores, top.proponent_stds, 1)
    return proponents, examples(top.opponents, top.opponent_scores, top.opponent_stds, -1)


def query_facts(attribution: Attribution, query: int) -> dict[str, str]:
    """What is known of a query beside its scores: its target, then the columns of ``query_info``, as text.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> attribution = Attribution(torch.ones(1, 2), query_targets=torch.tensor([7]), query_info={"id": ["a"]})
        >>> query_facts(attribution, 0)
        {'target': '7', 'id': 'a'}
    """
    target = target_text(attribution.query_targets, query)
    facts = {} if target is None else {"target": target}
    return facts | {name: str(values[query]) for name, values in attribution.query_info.items()}


def target_text(targets: Tensor | None, index: int) -> str | None:
    """One target as text; the first three numbers of a vector.

    Example:
        >>> import torch
        >>> target_text(torch.tensor([3, 4]), 1), target_text(torch.tensor([[0.25, 1.0]]), 0)
        ('4', '(0.25, 1)')
    """
    if targets is None:
        return None
    values: list[Any] = targets[index].flatten()[:4].tolist()
    texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    return texts[0] if targets[index].numel() == 1 else f"({', '.join(texts[:3] + ['...'] * (len(texts) > 3))})"


def score_text(score: float) -> str:
    """A score with its sign and at least two significant digits, without an exponent where it reads well.

    Example:
        >>> score_text(0.0123), score_text(-0.5), score_text(12.34), score_text(4.2e-7)
        ('+0.012', '-0.50', '+12', '+4.2e-07')
    """
    return f"{score:+.{_decimals(score)}f}" if _is_plain(score) else f"{score:+.1e}"


def interval_text(score: float, std: float | None) -> str:
    """A score and, where there is one, its standard deviation.

    Example:
        >>> interval_text(0.0123, 0.00456), interval_text(0.0123, None)
        ('+0.012 ± 0.0046', '+0.012')
    """
    if std is None:
        return score_text(score)
    return f"{score_text(score)} ± {score_text(std).removeprefix('+')}"


def shortened(text: str, length: int) -> str:
    """Text on one line, cut with an ellipsis after ``length`` characters.

    Example:
        >>> shortened("one line, and more", 12)
        'one line, a…'
    """
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _is_plain(score: float) -> bool:
    return score == 0 or 1e-3 <= abs(score) < 1e5


def _decimals(score: float) -> int:
    return 2 if score == 0 else max(0, 1 - math.floor(math.log10(abs(score))))
