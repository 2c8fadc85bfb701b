"""The result of evaluate(): rows of plain values, printed as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stride_lightning.runtime.distributed import rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True)
class EvaluationRow:
    """How well one attribution did.

    Args:
        name: What it is called.
        lds: Linear datamodeling score, mean over queries.
        lds_lower: Lower end of its interval.
        lds_upper: Upper end of its interval.
        num_constant: Queries whose predicted or measured losses are all equal; they count 0 in ``lds``.
        counterfactual: Number of examples removed to mean rise of a query's loss; None if that was not measured.
        seconds: What the attribution took, if it says.
        memory_bytes: Its peak memory, if it says.
    """

    name: str
    lds: float
    lds_lower: float
    lds_upper: float
    num_constant: int = 0
    counterfactual: dict[int, float] | None = None
    seconds: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Several attributions side by side; prints as a table.

    Args:
        rows: One per attribution, the best linear datamodeling score first.
        ceiling: The score that a perfect predictor would get; None where the truth has a single seed.
        num_subsets: Subsets of the ground truth.
        num_seeds: Models per subset.
        num_queries: Queries.
        confidence: Of the intervals.
        per_query: Name to the score of every query, shape ``(num_queries,)``.
    """

    rows: tuple[EvaluationRow, ...]
    ceiling: float | None
    num_subsets: int
    num_seeds: int
    num_queries: int
    confidence: float
    per_query: dict[str, Tensor]

    def __getitem__(self, name: str) -> EvaluationRow:
        """The row of one attribution."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"No attribution {name!r} was evaluated: there are {[row.name for row in self.rows]}.")

    def share_of_ceiling(self, name: str) -> float | None:
        """Linear datamodeling score of one attribution, divided by the noise ceiling; None where that is unknown."""
        return self[name].lds / self.ceiling if self.ceiling else None

    def to_dataframe(self) -> DataFrame:
        """A table with one row per attribution; values that are missing are NaN."""
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_dataframe() needs pandas: pip install 'stride-lightning[pandas]'.") from error
        from stride_lightning.views.evaluation import value_table

        columns, rows = value_table(self)
        frame = pd.DataFrame(rows, columns=columns)
        # A column of nothing but None would be of objects.
        return frame.astype({name: float for name in columns[1:] if frame[name].dtype == object})

    def log(self, loggers: Any, *, step: int = 0) -> None:
        """Log scalars to any Lightning logger, and to TensorBoard and Weights & Biases the table and the figure.

        Args:
            loggers: A logger or a list of them, such as ``trainer.loggers``, or the trainer.
            step: Global step to log at.
        """
        from stride_lightning.views.evaluation import log_evaluation

        if rank() == 0:
            loggers = getattr(loggers, "loggers", loggers)  # a trainer will do
            log_evaluation(self, loggers if isinstance(loggers, list | tuple) else [loggers], step=step)

    def plot(self) -> Figure:
        """A figure: scores with intervals, single queries and ceiling; beside it what removing examples does, if known.

        Returns:
            A figure without pyplot: ``figure.savefig("evaluation.png")`` writes it, nothing needs closing.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from stride_lightning.views.evaluation import plot_evaluation

        return plot_evaluation(self)

    def __repr__(self) -> str:
        from stride_lightning.views.evaluation import text_table

        return text_table(self)
