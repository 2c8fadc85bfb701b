"""The result of evaluate(): rows of plain values, printed as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stride_lightning.results.texts import score_text, shortened
from stride_lightning.runtime.distributed import rank
from stride_lightning.tasks.measures import OF_LOSS, harm_of, in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

#: Characters of a name, in tables and figures.
NAME_LENGTH = 40


@dataclass(frozen=True)
class EvaluationRow:
    """How well one attribution did.

    Args:
        name: Name of the attribution.
        lds: Linear datamodeling score, mean over queries; its interval goes from ``lds_lower`` to ``lds_upper``.
        num_constant: Queries whose predicted or measured losses are all equal; they count 0 in ``lds``.
        counterfactual: Mean rise of a query's loss by number of examples removed; None if nobody measured it.
        seconds: Time of the attribution; None if its metadata do not hold it.
        memory_bytes: Its peak memory; None if its metadata do not hold it.
    """

    name: str
    lds: float
    lds_lower: float
    lds_upper: float
    num_constant: int = 0
    counterfactual: dict[int, float] | None = None
    seconds: float | None = None
    memory_bytes: int | None = None

    def rises(self, ks: list[int]) -> list[float | None]:
        """Mean rise of a query's loss without its top k, None if nobody measured it."""
        return [(self.counterfactual or {}).get(k) for k in ks]

    @property
    def interval_text(self) -> str:
        """The score and its interval."""
        return f"{self.lds:.3f} [{self.lds_lower:.3f}, {self.lds_upper:.3f}]"


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Several attributions side by side; prints as a table.

    Args:
        rows: One per attribution, the best linear datamodeling score first.
        ceiling: The score that a perfect predictor would get; None if the truth has a single seed.
        num_subsets: Subsets of the ground truth, with ``num_seeds`` models each and losses of ``num_queries`` queries.
        confidence: Coverage of the intervals, between 0 and 1.
        per_query: The score of every query, shape ``(num_queries,)``, by name.
        measure: What was measured of the queries, its name and direction.
    """

    rows: tuple[EvaluationRow, ...]
    ceiling: float | None
    num_subsets: int
    num_seeds: int
    num_queries: int
    confidence: float
    per_query: dict[str, Tensor]
    measure: Mapping[str, str] = field(default_factory=lambda: dict(OF_LOSS))

    def __getitem__(self, name: str) -> EvaluationRow:
        """The row of one attribution."""
        rows = {row.name: row for row in self.rows}
        if name not in rows:
            raise KeyError(f"No attribution {name!r} was evaluated: choose one of {list(rows)}.")
        return rows[name]

    @property
    def ks(self) -> list[int]:
        """Numbers of examples whose removal was measured, ascending."""
        return sorted({k for row in self.rows for k in row.counterfactual or {}})

    def share_of_ceiling(self, name: str) -> float | None:
        """Linear datamodeling score of one attribution, divided by the noise ceiling; None if that is unknown."""
        return self[name].lds / self.ceiling if self.ceiling else None

    def to_dataframe(self) -> DataFrame:
        """A table with one row per attribution; missing values are NaN."""
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_dataframe() needs pandas: pip install 'stride-lightning[pandas]'.") from error
        columns, rows = value_table(self)
        frame = pd.DataFrame(rows, columns=columns)
        # Pandas makes a column of objects of nothing but None.
        return frame.astype({name: float for name in columns[1:] if frame[name].dtype == object})

    def log(self, loggers: Any, *, step: int = 0) -> None:
        """Log scalars to any Lightning logger, and to TensorBoard and Weights & Biases the table and the figure.

        Args:
            loggers: A logger or a list of them, such as ``trainer.loggers``, or the trainer.
            step: Global step to log at.
        """
        from stride_lightning.views.evaluation import log_evaluation

        if rank() == 0:
            log_evaluation(self, loggers, step=step)

    def plot(self) -> Figure:
        """A figure of scores with intervals, single queries and ceiling, and of counterfactual effects if known.

        Returns:
            A figure without pyplot: ``figure.savefig("evaluation.png")`` writes it, nothing needs closing.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from stride_lightning.views.evaluation import plot_evaluation

        return plot_evaluation(self)

    def __repr__(self) -> str:
        table = text_rows(self)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join([caption(self), *lines, ceiling_line(self)])


def value_table(evaluation: Evaluation) -> tuple[list[str], list[list[Any]]]:
    """The table as columns and rows of numbers; a missing number is None."""
    ks = evaluation.ks
    columns = ["method", "lds", "lds_lower", "lds_upper", "lds_of_ceiling", "num_constant"]
    columns += [f"rise_without_top_{k}" for k in ks] + ["seconds", "memory_bytes"]
    rows = []
    for row in evaluation.rows:
        scores = [row.lds, row.lds_lower, row.lds_upper, evaluation.share_of_ceiling(row.name)]
        rows.append([row.name, *scores, row.num_constant, *row.rises(ks), row.seconds, row.memory_bytes])
    return columns, rows


def text_rows(evaluation: Evaluation) -> list[list[str]]:
    """Header and rows as texts, without empty columns other than seconds and memory."""
    ks, ceiling = evaluation.ks, evaluation.ceiling
    constant = any(row.num_constant for row in evaluation.rows)
    header = ["method", "LDS"] + ["of ceiling"] * bool(ceiling) + ["constant queries"] * constant
    table = [[*header, *(f"without top {k}" for k in ks), "seconds", "memory"]]
    for row in evaluation.rows:
        cells = [shortened(row.name, NAME_LENGTH), row.interval_text]
        cells += [f"{100 * row.lds / ceiling:.0f} %"] if ceiling else []
        cells += [str(row.num_constant)] * constant
        cells += ["-" if rise is None else score_text(rise) for rise in row.rises(ks)]
        table.append([*cells, _seconds(row.seconds), _memory(row.memory_bytes)])
    return table


def caption(evaluation: Evaluation) -> str:
    """The sizes of the evaluation, in a line."""
    queries = f"{evaluation.num_queries} quer{'ies' if evaluation.num_queries > 1 else 'y'}"
    models = f"{evaluation.num_subsets} subsets x {evaluation.num_seeds} seed{'s' if evaluation.num_seeds > 1 else ''}"
    removal = f"; without top k: mean {harm_of(evaluation.measure)}" if evaluation.ks else ""
    measure = "" if evaluation.measure == OF_LOSS else f" ({in_words(evaluation.measure)})"
    return f"LDS of {queries}{measure} over {models}, with {100 * evaluation.confidence:g} % intervals{removal}"


def ceiling_line(evaluation: Evaluation) -> str:
    """The noise ceiling, in a line."""
    if evaluation.ceiling is None:
        return "noise ceiling unknown: it needs a ground truth of at least two seeds"
    return f"noise ceiling {evaluation.ceiling:.2f}: what a perfect predictor would get"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2g}" if seconds < 1 else f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def _memory(memory: int | None) -> str:
    if memory is None:
        return "-"
    return f"{memory / 2**20:.0f} MiB" if memory < 10 * 2**30 else f"{memory / 2**30:.0f} GiB"
