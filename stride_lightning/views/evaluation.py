"""An evaluation as Markdown, as a figure, and in the dashboards of Lightning's loggers."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from stride_lightning.results.evaluation import NAME_LENGTH, caption, ceiling_line, text_rows, value_table
from stride_lightning.results.texts import shortened
from stride_lightning.views.drawing import INK, RULE, blank_figure, style_axes, text_width, write_text
from stride_lightning.views.loggers import escaped, log_views

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from stride_lightning.results.evaluation import Evaluation

# In inches.
_CHART, _CURVES, _BAR, _TITLE, _AXIS, _MARGIN, _LOWEST = 4.2, 3.0, 0.36, 0.5, 0.55, 0.25, 1.5


def markdown_evaluation(evaluation: Evaluation) -> str:
    """The table as Markdown; names are escaped."""
    table = text_rows(evaluation)
    lines = ["| " + " | ".join([escaped(name), *cells]) + " |" for name, *cells in table]
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    return "\n".join([caption(evaluation), "", *lines, "", ceiling_line(evaluation)])


def scalars_of(evaluation: Evaluation) -> dict[str, float]:
    """Every number there is, as ``evaluation/<name>/<column>``, and ``evaluation/ceiling``."""
    columns, rows = value_table(evaluation)
    scalars = {} if evaluation.ceiling is None else {"evaluation/ceiling": evaluation.ceiling}
    for name, *values in rows:
        pairs = zip(columns[1:], values, strict=True)
        scalars |= {f"evaluation/{name}/{column}": float(value) for column, value in pairs if value is not None}
    return scalars


def log_evaluation(evaluation: Evaluation, loggers: Any, *, step: int) -> None:
    """Log scalars to every logger, and the table and the figure (without matplotlib none) to those that can show them.

    Arguments as in :meth:`~stride_lightning.Evaluation.log`.
    """
    tables = {"evaluation/table": (partial(value_table, evaluation), partial(markdown_evaluation, evaluation))}
    figures = {"evaluation/figure": plot_evaluation(evaluation)} if importlib.util.find_spec("matplotlib") else {}
    log_views(loggers, step, scalars_of(evaluation), tables, figures, {})


def plot_evaluation(evaluation: Evaluation) -> Figure:
    """Bars of the scores with intervals, dots for single queries, a line at the ceiling; and counterfactual curves."""
    figure = blank_figure(1, 1)
    labels = [shortened(row.name, NAME_LENGTH) for row in evaluation.rows]
    texts = [row.interval_text for row in evaluation.rows]
    left = _MARGIN + 0.1 + max(text_width(figure, label, 8.5) for label in labels)
    right = left + _CHART + 0.25 + max(text_width(figure, text, 8) for text in texts)
    curves = right + 0.6 if evaluation.ks else None
    inner = max(_LOWEST, _BAR * len(labels)) if curves else _BAR * len(labels)
    width, height = (curves + _CURVES if curves else right) + _MARGIN, _TITLE + inner + _AXIS
    figure.set_size_inches(width, height)

    def chart(at: float, size: float, title: str) -> Axes:
        write_text(figure, at, _TITLE - 0.2, title, color=INK, size=10, weight="bold")
        axes = figure.add_axes((at / width, _AXIS / height, size / width, inner / height))
        axes.spines[["left", "bottom"]].set_color(RULE)
        return axes

    colors = [f"C{place % 10}" for place in range(len(labels))]
    _fill_scores(chart(left, _CHART, "Linear datamodeling score"), evaluation, labels, texts, colors)
    if curves:
        _fill_curves(chart(curves, _CURVES, "Counterfactual"), evaluation, labels, colors)
    return figure


def _fill_scores(axes: Axes, evaluation: Evaluation, labels: list[str], texts: list[str], colors: list[str]) -> None:
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
    note = {"textcoords": "offset points", "color": INK, "annotation_clip": False}
    if evaluation.ceiling is not None:
        axes.axvline(evaluation.ceiling, color=INK, linestyle="dashed", linewidth=1.0)
        place, text = (evaluation.ceiling, 1), f"ceiling {evaluation.ceiling:.2f}"
        axes.annotate(text, place, (0, 2), xycoords=("data", "axes fraction"), ha="center", fontsize=7.5, **note)
    for place, text in enumerate(texts):
        axes.annotate(text, (1, place), (7, 0), xycoords=("axes fraction", "data"), va="center", fontsize=8, **note)
    lowest = min(0.0, *(min(evaluation.per_query[row.name].min().item(), row.lds_lower) for row in rows))
    axes.set_xlim(1.05 * lowest, 1.02)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(places, labels, fontsize=8.5, color=INK, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.spines["left"].set_visible(False)


def _fill_curves(axes: Axes, evaluation: Evaluation, labels: list[str], colors: list[str]) -> None:
    style_axes(axes, "examples removed: the top k of each query", "mean rise of its loss")
    ks = evaluation.ks
    for row, label, color in zip(evaluation.rows, labels, colors, strict=True):
        if row.counterfactual:
            axes.plot(list(row.counterfactual), list(row.counterfactual.values()), "o-", color=color, label=label)
    if ks[-1] > 10 * ks[0]:
        axes.set_xscale("log")
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.axhline(0, color=INK, linewidth=0.9)
    for text in axes.legend(fontsize=7.5, frameon=False).get_texts():
        text.set_parse_math(False)
