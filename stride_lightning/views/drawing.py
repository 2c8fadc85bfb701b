"""How figures are drawn: pictures and bars placed in inches on a matplotlib figure that pyplot knows nothing of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from stride_lightning.results.scores import AttributionResult
from stride_lightning.results.texts import interval_text, score_text, shortened
from stride_lightning.views.ranking import RankedExample, query_facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Proponents and opponents of each query.
Ranked: TypeAlias = "Sequence[tuple[list[RankedExample], list[RankedExample]]]"

GREEN, RED, INK, GREY, RULE = "#1a7f37", "#c4262e", "#1f2328", "#656d76", "#d0d7de"
# The picture grid, in inches.
_PICTURE, _GAP, _GROUP_GAP, _MARGIN, _HEADER, _LINE = 0.92, 0.13, 0.34, 0.16, 0.42, 0.155
# The bar charts, in inches.
_CHART, _BAR, _TITLE, _AXIS = 4.6, 0.27, 0.42, 0.5


def draw_pictures(
    attribution: AttributionResult, queries: Sequence[int], ranked: Ranked, to_image: Callable[[Any], Tensor | None]
) -> Figure:
    """One row per query: its picture, then its proponents framed in green and its opponents framed in red.

    The attribution has ``queries`` and ``train_data``, of which ``to_image`` gives pictures as ``as_image`` does.
    """
    assert attribution.queries is not None
    assert attribution.train_data is not None
    columns = [max(len(groups[side]) for groups in ranked) for side in (0, 1)]
    lines = 3 if attribution.train_info or attribution.query_info else 2
    row_height = _PICTURE + _LINE * lines + 0.16
    lefts = [_MARGIN]  # of the query, the proponents, the opponents
    for count in (1, columns[0]):
        lefts.append(lefts[-1] + count * (_PICTURE + _GAP) - _GAP * (count > 0) + _GROUP_GAP * (count > 0))
    width = lefts[2] + (columns[1] * (_PICTURE + _GAP) - _GAP if columns[1] else -_GROUP_GAP) + _MARGIN
    height = _HEADER + row_height * len(queries) + _MARGIN / 2
    figure = blank_figure(width, height)
    titles, meanings = ("Query", "Proponents", "Opponents"), ("", "lower its loss", "raise its loss")
    for left, count, color, title, meaning in zip(
        lefts, (1, *columns), (INK, GREEN, RED), titles, meanings, strict=True
    ):
        if count:
            _group_header(figure, left, count * (_PICTURE + _GAP) - _GAP, title, meaning if count > 1 else "", color)

    def show(example: Any, left: float, row: int, color: str, captions: list[str]) -> None:
        top = _HEADER + row * row_height + 0.07
        box = (left / width, 1 - (top + _PICTURE) / height, _PICTURE / width, _PICTURE / height)
        axes = figure.add_axes(box, xticks=[], yticks=[])
        image = to_image(example)
        if image is not None:
            axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=1.3)
        center, below = left + _PICTURE / 2, top + _PICTURE + 0.06
        write_text(figure, center, below, captions[0], color=color, size=8.2, weight="bold", ha="center", va="top")
        for line, caption in enumerate(captions[1:], 1):
            text = _fitted(figure, caption, 7, _PICTURE + 0.7 * _GAP)
            write_text(figure, center, below + line * _LINE, text, color=GREY, size=7, ha="center", va="top")

    for row, (query, groups) in enumerate(zip(queries, ranked, strict=True)):
        facts = query_facts(attribution, query)
        label = f"label {facts.pop('target')}" if "target" in facts else ""
        captions = [f"query {query}", label, " · ".join(facts.values())]
        show(attribution.queries[query], lefts[0], row, INK, captions)
        for left, color, examples in zip(lefts[1:], (GREEN, RED), groups, strict=True):
            for place, example in enumerate(examples):
                label = "" if example.target is None else f" · label {example.target}"
                captions = [score_text(example.score), f"#{example.position}{label}"]
                captions.append(" · ".join(example.info))
                x = left + place * (_PICTURE + _GAP)
                show(attribution.train_data[example.column], x, row, color, captions)
    return figure


def draw_bars(attribution: AttributionResult, queries: Sequence[int], ranked: Ranked) -> Figure:
    """One chart per query, bars in order of their score, error bars of one posterior standard deviation."""
    heights = [_TITLE + _AXIS + _BAR * max(1, len(helpful) + len(harmful)) for helpful, harmful in ranked]
    labels = [_bar_label(example) for groups in ranked for examples in groups for example in examples]
    figure = blank_figure(1, 1)
    left = 0.25 + max([text_width(figure, label, 8) for label in labels], default=0.0)
    width, height = left + _CHART + 0.25, sum(heights)
    figure.set_size_inches(width, height)
    top = 0.0
    for query, (helpful, harmful), taken in zip(queries, ranked, heights, strict=True):
        examples = [*helpful, *reversed(harmful)]
        inner = taken - _TITLE - _AXIS
        box = (left / width, 1 - (top + _TITLE + inner) / height, _CHART / width, inner / height)
        axes = figure.add_axes(box)
        facts = query_facts(attribution, query)
        words = [f"label {facts.pop('target')}"] if "target" in facts else []
        note = shortened(" · ".join([*words, *facts.values()]), 60)
        write_text(figure, left, top + _TITLE - 0.12, f"Query {query}", color=INK, size=10, weight="bold")
        after = left + 0.2 + text_width(figure, f"Query {query}", 10, "bold")
        write_text(figure, after, top + _TITLE - 0.12, note, color=GREY, size=8.5)
        _fill_chart(figure, axes, examples)
        top += taken
    return figure


def _fill_chart(figure: Figure, axes: Axes, examples: list[RankedExample]) -> None:
    style_axes(axes, "score (positive: training on the example lowers the query's loss)", grid="x")
    scores = [example.score for example in examples]
    stds = [example.std or 0.0 for example in examples]
    places = range(len(examples))
    axes.barh(places, scores, height=0.66, color=[GREEN if score > 0 else RED for score in scores])
    if any(stds):
        axes.errorbar(scores, places, xerr=stds, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    texts = [interval_text(example.score, example.std) for example in examples]
    low = min([0.0, *map(operator.sub, scores, stds)])
    high = max([0.0, *map(operator.add, scores, stds)])
    # Room for the longest text at each side that has bars, as a share of the chart.
    sides = [[text for text, score in zip(texts, scores, strict=True) if score * sign > 0] for sign in (-1, 1)]
    rooms = [max([text_width(figure, text, 7.5) + 0.12 for text in side], default=0.0) / _CHART for side in sides]
    span = ((high - low) or 1.0) / (1 - sum(rooms))
    axes.set_xlim(low - rooms[0] * span, low - rooms[0] * span + span)
    for place, example, std, text in zip(places, examples, stds, texts, strict=True):
        if example.score > 0:
            end, offset, side, color = max(example.score + std, 0.0), 4, "left", GREEN
        else:
            end, offset, side, color = min(example.score - std, 0.0), -4, "right", RED
        style = {"textcoords": "offset points", "ha": side, "va": "center", "fontsize": 7.5, "color": color}
        axes.annotate(text, (end, place), (offset, 0), **style)
    axes.set_ylim(len(examples) - 0.4 if examples else 1, -0.6)
    axes.set_yticks(places, [_bar_label(example) for example in examples], fontsize=8, color=INK, parse_math=False)
    axes.tick_params(axis="y", length=0)
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


def _bar_label(example: RankedExample) -> str:
    label = [] if example.target is None else [f"label {example.target}"]
    return shortened(" · ".join([f"#{example.position}", *label, *example.info]), 44)


def _group_header(figure: Figure, left: float, width: float, title: str, meaning: str, color: str) -> None:
    from matplotlib.lines import Line2D

    total_width, total_height = figure.get_size_inches()
    write_text(figure, left, 0.27, title, color=color, size=9.5, weight="bold")
    write_text(figure, left + width, 0.27, meaning, color=GREY, size=7.5, ha="right")
    ends = [left / total_width, (left + width) / total_width]
    figure.add_artist(Line2D(ends, [1 - 0.34 / total_height] * 2, color=color, linewidth=1.0))


def write_text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text at ``x`` inches from the left and ``y`` from the top; a dollar sign is a dollar sign."""
    width, height = figure.get_size_inches()
    figure.text(x / width, 1 - y / height, text, parse_math=False, **style)


def _fitted(figure: Figure, text: str, size: float, width: float) -> str:
    """The text on one line, cut with an ellipsis where it is wider than ``width`` inches."""
    text = shortened(text, 60)
    while text_width(figure, text, size) > width:
        text = shortened(text, len(text) - 1)
    return text


def text_width(figure: Figure, text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of one line of text as it will be drawn."""
    from matplotlib.font_manager import FontProperties

    canvas: Any = figure.canvas
    font = FontProperties(size=size, weight=weight)
    return canvas.get_renderer().get_text_width_height_descent(text, font, ismath=False)[0] / figure.dpi


def blank_figure(width: float, height: float) -> Figure:
    """A white figure without pyplot, in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Figures need matplotlib: pip install 'stride-lightning[plot]'.") from error
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure
