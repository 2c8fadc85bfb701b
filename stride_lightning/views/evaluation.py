"""An evaluation as Markdown, as a figure, and in the dashboards of Lightning's loggers."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from stride_lightning.results.evaluation import caption, ceiling_line, text_rows, value_table
from stride_lightning.tasks.measures import harm_of
from stride_lightning.views.drawing import INK, RULE, blank_figure, fitted, label_rows, style_axes
from stride_lightning.views.loggers import escaped, log_views

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stride_lightning.results.evaluation import Evaluation

_TITLES = "Linear datamodeling score", "Counterfactual"


def markdown_evaluation(evaluation: Evaluation) -> str:
    """The table as Markdown; names are escaped."""
    table = text_rows(evaluation)
    lines = ["| " + " | ".join([escaped(name), *cells]) + " |" for name, *cells in table]
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    return "\n".join([caption(evaluation), "", *lines, "", ceiling_line(evaluation)])


def scalars_of(evaluation: Evaluation) -> dict[str, float]:
    """Every number of the table as ``evaluation/<name>/<column>``, and ``evaluation/ceiling``."""
    columns, rows = value_table(evaluation)
    scalars = {} if evaluation.ceiling is None else {"evaluation/ceiling": evaluation.ceiling}
    for name, *values in rows:
        pairs = zip(columns[1:], values, strict=True)
        scalars |= {f"evaluation/{name}/{column}": float(value) for column, value in pairs if value is not None}
    return scalars


def log_evaluation(evaluation: Evaluation, loggers: Any, *, step: int) -> None:
    """Log scalars to every logger, and the table and the figure to loggers that show them. The figure needs matplotlib.

    Arguments as in :meth:`~stride_lightning.Evaluation.log`.
    """
    tables = {"evaluation/table": (partial(value_table, evaluation), partial(markdown_evaluation, evaluation))}
    figures = {"evaluation/figure": plot_evaluation(evaluation)} if importlib.util.find_spec("matplotlib") else {}
    log_views(loggers, step, scalars_of(evaluation), tables, figures, {})


def plot_evaluation(evaluation: Evaluation) -> Figure:
    """Bars of the scores with intervals, dots for single queries, a line at the ceiling; and counterfactual curves.

    A curve has the colour of its bar.
    """
    has_curves = bool(evaluation.ks)
    figure = blank_figure(11.0 if has_curves else 7.5, max(1.5 * has_curves, 0.36 * len(evaluation.rows)) + 1.05)
    charts = figure.subplots(1, 1 + has_curves, squeeze=False, width_ratios=[1.4, 1.0][: 1 + has_curves])[0]
    colors = [f"C{place % 10}" for place in range(len(evaluation.rows))]
    for axes, title, fill in zip(charts, _TITLES, (_fill_scores, _fill_curves), strict=False):
        axes.set_title(title, loc="left", color=INK, size=10, weight="bold")
        fill(figure, axes, evaluation, colors)
        axes.spines[["left", "bottom"]].set_color(RULE)
    return figure


def _fill_scores(figure: Figure, axes: Axes, evaluation: Evaluation, colors: list[str]) -> None:
    style_axes(axes, f"bars: mean, with {100 * evaluation.confidence:g} % interval; dots: queries", grid="x")
    rows, places = evaluation.rows, range(len(evaluation.rows))
    scores = [row.lds for row in rows]
    axes.barh(places, scores, height=0.62, color=colors, alpha=0.75)
    for place, row in enumerate(rows):
        values = evaluation.per_query[row.name].numpy()
        heights = place + 0.5 * (np.arange(len(values)) * 0.618 % 1 - 0.5)  # spread evenly, the same every time
        axes.scatter(values, heights, s=5, color=INK, alpha=0.2, linewidths=0)
    # An interval of percentiles need not hold the score itself.
    below = [max(0.0, row.lds - row.lds_lower) for row in rows]
    above = [max(0.0, row.lds_upper - row.lds) for row in rows]
    axes.errorbar(scores, places, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    if evaluation.ceiling is not None:
        axes.axvline(evaluation.ceiling, color=INK, linestyle="dashed", linewidth=1.0)
        top = axes.secondary_xaxis("top")
        top.set_xticks([evaluation.ceiling], [f"ceiling {evaluation.ceiling:.2f}"], fontsize=7.5, color=INK)
        top.tick_params(length=0)
        top.spines["top"].set_visible(False)
    lowest = min(0.0, *(min(evaluation.per_query[row.name].min().item(), row.lds_lower) for row in rows))
    axes.set_xlim(1.05 * lowest, 1.02)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    label_rows(axes, [fitted(figure, row.name, 8.5, 2.8) for row in rows], size=8.5)
    label_rows(axes, [row.interval_text for row in rows], size=8, right=True)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.spines["left"].set_visible(False)


def _fill_curves(_: Figure, axes: Axes, evaluation: Evaluation, colors: list[str]) -> None:
    style_axes(axes, "examples removed: the top k of each query", f"mean {harm_of(evaluation.measure)}")
    ks = evaluation.ks
    for row, color in zip(evaluation.rows, colors, strict=True):
        if row.counterfactual:
            curve = row.counterfactual
            axes.plot(list(curve), list(curve.values()), "o-", color=color, label=row.name)
    if ks[-1] > 10 * ks[0]:
        axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.axhline(0, color=INK, linewidth=0.9)
