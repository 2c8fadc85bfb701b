"""Figures of ranked examples, pictures or bars, in matplotlib's constrained layout; pyplot knows nothing of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from stride_lightning.results.agreement import EXPLANATION
from stride_lightning.results.scores import AttributionResult
from stride_lightning.results.texts import STD, interval_text, score_text, shortened
from stride_lightning.tasks.measures import OF_LOSS, effect_of
from stride_lightning.views.ranking import RankedExample, query_facts, query_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.gridspec import GridSpec

#: Proponents and opponents of each query.
Ranked: TypeAlias = "Sequence[tuple[list[RankedExample], list[RankedExample]]]"

GREEN, RED, INK, GREY, RULE = "#1a7f37", "#c4262e", "#1f2328", "#656d76", "#d0d7de"
#: Of a query, its proponents and its opponents.
COLORS = INK, GREEN, RED
#: Inches from picture to picture. The layout makes room for the height of captions and titles, not for their width.
_CELL = 1.08


def draw_pictures(
    attribution: AttributionResult, queries: Sequence[int], ranked: Ranked, to_image: Callable[[Any], Tensor | None]
) -> Figure:
    """One row per query: its picture, then its proponents framed in green and its opponents framed in red.

    The attribution has ``queries`` and ``train_data``; ``to_image`` makes a picture of an example.
    """
    assert attribution.queries is not None
    assert attribution.train_data is not None
    counts = [1, *(max(len(sides[side]) for sides in ranked) for side in (0, 1))]
    facts_of = {query: query_facts(attribution, query, with_readout=False) for query in queries}
    has_info = bool(attribution.train_info) or any(facts.keys() - {"target"} for facts in facts_of.values())
    height = 0.4 + (1.55 if has_info else 1.4) * len(queries)
    figure = _figure(attribution, queries, _CELL * sum(counts), height)
    grids = _panels(figure, counts, len(queries), attribution.measure)

    def show(example: Any, side: int, row: int, place: int, heading: str, captions: list[str]) -> None:
        panel, grid = grids[side]
        axes = panel.add_subplot(grid[row, place], xticks=[], yticks=[])
        image = to_image(example)
        if image is not None:
            axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        for spine in axes.spines.values():
            spine.set(color=COLORS[side], linewidth=1.3)
        axes.set_title(heading, color=COLORS[side], size=8.2, weight="bold", pad=3)
        # As many lines under every picture, so that rows have one height.
        lines = [fitted(figure, caption, 7, _CELL - 0.08) or " " for caption in captions[: 1 + has_info]]
        axes.set_xlabel("\n".join(lines), color=GREY, size=7, labelpad=3, parse_math=False)

    for row, (query, sides) in enumerate(zip(queries, ranked, strict=True)):
        facts = dict(facts_of[query])
        label = f"label {facts.pop('target')}" if "target" in facts else ""
        heading = f"query {query_name(attribution, query)}"
        show(attribution.queries[query], 0, row, 0, heading, [label, " · ".join(facts.values())])
        for side, examples in enumerate(sides, 1):
            for place, example in enumerate(examples):
                label = "" if example.target is None else f" · label {example.target}"
                captions = [f"#{example.position}{label}", " · ".join(example.info)]
                show(attribution.train_data[example.column], side, row, place, score_text(example.score), captions)
    return figure


def _panels(
    figure: Figure, counts: list[int], num_rows: int, measure: Mapping[str, str]
) -> dict[int, tuple[SubFigure, GridSpec]]:
    """A panel with a heading and a grid for the query, the proponents and the opponents, unless they are none."""
    sides = [side for side, count in enumerate(counts) if count]
    ratios = [counts[side] for side in sides]
    panels = figure.subfigures(1, len(sides), squeeze=False, width_ratios=ratios, wspace=0.02)[0]
    name = "its loss" if measure == OF_LOSS else measure["name"]
    verbs = ("", "lower", "raise") if measure["direction"] == "lowers" else ("", "raise", "lower")
    for side, panel in zip(sides, panels, strict=True):
        heading = ("Query", "Proponents", "Opponents")[side]
        meaning = f" ({verbs[side]} {name})" if side and counts[side] > 1 else ""
        left = 0.06 / (_CELL * counts[side])
        panel.suptitle(heading + meaning, x=left, ha="left", color=COLORS[side], size=9.5, weight="bold")
    return {
        side: (panel, panel.add_gridspec(num_rows, counts[side])) for side, panel in zip(sides, panels, strict=True)
    }


def draw_bars(attribution: AttributionResult, queries: Sequence[int], ranked: Ranked) -> Figure:
    """One chart per query, bars in order of their score, error bars of one uncalibrated standard deviation."""
    counts = [max(1, len(proponents) + len(opponents)) for proponents, opponents in ranked]
    figure = _figure(attribution, queries, 7.5, 0.27 * sum(counts) + 0.85 * len(counts))
    charts = figure.subplots(len(counts), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, query, (proponents, opponents) in zip(charts, queries, ranked, strict=True):
        facts = query_facts(attribution, query, with_readout=False)
        label = [f"label {facts.pop('target')}"] if "target" in facts else []
        title = fitted(figure, " · ".join([f"Query {query_name(attribution, query)}", *label, *facts.values()]), 9, 4.6)
        axes.set_title(title, loc="left", color=INK, size=9, parse_math=False)
        _fill_chart(figure, axes, [*proponents, *reversed(opponents)], effect_of(attribution.measure))
    return figure


def _figure(attribution: AttributionResult, queries: Sequence[int], width: float, height: float) -> Figure:
    """A blank figure for some queries; if one is marked, a note below everything says once what the mark means."""
    # A line takes at most 18 characters of this size per inch.
    lines = textwrap.wrap(EXPLANATION, int(18 * width)) if any(map(attribution.disagrees, queries)) else []
    figure = blank_figure(width, height + 0.14 * len(lines))
    if lines:
        figure.supxlabel("\n".join(lines), color=GREY, size=7.5, parse_math=False)
    return figure


def _fill_chart(figure: Figure, axes: Axes, examples: list[RankedExample], effect: str) -> None:
    scores = [example.score for example in examples]
    stds = [example.std or 0.0 for example in examples]
    has_std = any(example.std is not None for example in examples)
    meaning = f"score (positive: training on the example {effect})"
    style_axes(axes, f"{meaning}; ± and error bars: {STD}" if has_std else meaning, grid="x")
    places = range(len(examples))
    colors = [GREEN if score > 0 else RED for score in scores]
    axes.barh(places, scores, height=0.66, color=colors)
    if any(stds):
        axes.errorbar(scores, places, xerr=stds, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    axes.set_ylim(len(examples) - 0.4 if examples else 1, -0.6)
    label_rows(axes, [fitted(figure, _bar_label(example), 8, 2.6) for example in examples], size=8)
    texts = [interval_text(example.score, example.std) for example in examples]
    for text, color in zip(label_rows(axes, texts, size=7.5, right=True), colors, strict=True):
        text.set_color(color)
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def style_axes(axes: Axes, xlabel: str, ylabel: str = "", *, grid: Literal["both", "x"] = "both") -> None:
    """Small grey labels, a light grid behind the data, no frame at the top and the right."""
    axes.set_xlabel(xlabel, fontsize=7.5, color=GREY)
    axes.set_ylabel(ylabel, fontsize=7.5, color=GREY)
    axes.tick_params(labelsize=7.5, color=RULE, labelcolor=GREY)
    axes.grid(axis=grid, color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_rows(axes: Axes, texts: list[str], *, size: float, right: bool = False) -> list[Any]:
    """Write a text beside every bar of a chart, left or right of it; the layout makes room. A dollar sign stays one."""
    if right:
        axis: Any = axes.secondary_yaxis("right")
        axis.spines["right"].set_visible(False)
    else:
        axis = axes
    axis.set_yticks(range(len(texts)), texts, fontsize=size, color=INK, parse_math=False)
    axis.tick_params(axis="y", length=0)
    return axis.get_yticklabels()


def _bar_label(example: RankedExample) -> str:
    label = [] if example.target is None else [f"label {example.target}"]
    return " · ".join([f"#{example.position}", *label, *example.info])


def fitted(figure: Figure, text: str, size: float, width: float) -> str:
    """The text on one line, cut with an ellipsis where it is wider than ``width`` inches."""
    from matplotlib.font_manager import FontProperties

    canvas: Any = figure.canvas
    renderer, font = canvas.get_renderer(), FontProperties(size=size)
    text = shortened(text, 80)
    while renderer.get_text_width_height_descent(text, font, ismath=False)[0] > width * figure.dpi:
        text = shortened(text, len(text) - 1)
    return text


def blank_figure(width: float, height: float) -> Figure:
    """A white figure of a size in inches, without pyplot; its layout leaves room for every text."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Figures need matplotlib: pip install 'stride-lightning[plot]'.") from error
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure
