"""Attributions in the dashboards of Lightning's loggers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from stride_lightning.results.agreement import AGREES, EXPLANATION
from stride_lightning.results.scores import AttributionResult, ImageShape
from stride_lightning.results.texts import STD, STD_COLUMN, interval_text, shortened
from stride_lightning.tasks.measures import OF_LOSS, effect_of, in_words
from stride_lightning.views.figures import plot_grid, shows_images
from stride_lightning.views.ranking import RankedExample, query_facts, query_name, rank_examples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Characters that Markdown or HTML give a meaning, inside a table cell or a heading.
_ENTITIES = {ord(character): f"&#{ord(character)};" for character in "&<>|\\`*_~[]#\"'"}
#: Characters of a cell of the text table.
_CELL = 200


def log_views(
    loggers: Any,
    step: int,
    scalars: dict[str, float],
    tables: Mapping[str, tuple[Callable[[], tuple[list[str], list[list[Any]]]], Callable[[], str]]],
    figures: Mapping[str, Figure],
    histograms: Mapping[str, Tensor],
) -> None:
    """Log scalars to every logger, and tables, figures and histograms to the loggers that can show them.

    A logger's methods decide what it gets, not its class. A table is two functions, which run only if a logger shows
    tables: one returns columns and rows, the other Markdown.

    Args:
        loggers: A trainer, a list of loggers, or one logger.
        step: Global step to log at.
        scalars: Numbers by name.
        tables: The two functions of each table, by name.
        figures: Matplotlib's figures, by name.
        histograms: Values by name, of any shape.
    """
    loggers = getattr(loggers, "loggers", loggers)
    for logger in loggers if isinstance(loggers, list | tuple) else [loggers]:
        if logger is None:
            continue
        logger.log_metrics(scalars, step)
        # A TensorBoard writer. Never `add_scalars` or `add_hparams`: they open further runs.
        experiment: Any = getattr(logger, "experiment", None)
        for name, (columns_and_rows, markdown) in tables.items():
            if hasattr(logger, "log_table"):
                columns, rows = columns_and_rows()
                logger.log_table(name, columns=columns, data=rows, step=step)
            if hasattr(experiment, "add_text"):
                experiment.add_text(name, markdown(), step)
        for name, figure in figures.items():
            if hasattr(logger, "log_image"):
                logger.log_image(name, [pixels_of(figure)], step=step)
            if hasattr(experiment, "add_figure"):
                experiment.add_figure(name, figure, step, close=False)
        for name, values in histograms.items():
            if hasattr(experiment, "add_histogram"):
                experiment.add_histogram(name, values.float(), step)
        if hasattr(experiment, "add_text") and hasattr(experiment, "flush"):
            experiment.flush()


def log_attribution(
    attribution: AttributionResult,
    loggers: Any,
    *,
    step: int,
    k: int = 5,
    max_queries: int = 20,
    image_shape: ImageShape = None,
) -> None:
    """Log scalars to every logger, and histograms, tables and pictures to the loggers that can show them.

    Names begin with the attribution's method, here ``stride``. TensorBoard gets the histograms ``stride/scores`` and
    ``stride/uncalibrated_std``, the text ``stride/top_examples`` and the figure ``stride/top_pictures``. Weights &
    Biases gets the last two as a table and an image. The figure needs inputs that are images, and matplotlib.
    Arguments are those of :meth:`~stride_lightning.Attribution.log`; ``stride/top_share`` takes the same ``k``.
    """
    tag, queries, tables, figures = tag_of(attribution), range(min(max_queries, attribution.num_queries)), {}, {}
    if queries:
        makers = partial(example_table, attribution, queries, k), partial(markdown_table, attribution, queries, k)
        tables[f"{tag}/top_examples"] = makers
    if queries and importlib.util.find_spec("matplotlib") and shows_images(attribution, image_shape=image_shape):
        figures[f"{tag}/top_pictures"] = plot_grid(attribution, queries, k, image_shape=image_shape)
    names = {"std": STD_COLUMN}
    histograms = {f"{tag}/{names.get(name, name)}": values for name, values in attribution.distributions.items()}
    log_views(loggers, step, summarize(attribution, k), tables, figures, histograms)


def tag_of(attribution: AttributionResult) -> str:
    """The first part of names in dashboards: the method, and a measure, so that several stand side by side.

    Not every dashboard takes a comma or a space, so they become hyphens.
    """
    label = attribution.label if "method" in attribution.metadata else "stride"
    if attribution.measure != OF_LOSS:
        label += f" {in_words(attribution.measure)}"
    return re.sub(r"[, <>]+", "-", label)


def summarize(attribution: AttributionResult, k: int) -> dict[str, float]:
    """Scalars that describe the scores, if the attribution holds all of them, and their cost.

    Returns:
        ``stride/score_std`` (over all scores), ``stride/top_share`` (share of a query's total absolute score that its
        ``k`` largest hold, mean over queries), ``stride/positive_fraction`` and ``stride/nonzero_fraction``. With
        standard deviations also ``stride/mean_uncalibrated_std`` and ``stride/beyond_two_uncalibrated_std`` (the share
        of scores). With a readout also ``stride/readout_agreement`` (the share of queries). Seconds and peak memory
        come from the metadata.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> summarize(Attribution(torch.tensor([[3.0, -1.0, 0.0, 0.0]])), k=1)["stride/top_share"]
        0.75
    """
    tag, distributions = tag_of(attribution), attribution.distributions
    scalars: dict[str, float] = {}
    if "scores" in distributions:
        scores = distributions["scores"].float()
        size = scores.abs()
        top = size.topk(min(k, attribution.num_train)).values.sum(1)
        scalars = {
            f"{tag}/score_std": scores.std(correction=0).item(),
            f"{tag}/top_share": (top / size.sum(1).clamp_min(1e-30)).mean().item(),
            f"{tag}/positive_fraction": (scores > 0).float().mean().item(),
            f"{tag}/nonzero_fraction": (scores != 0).float().mean().item(),
        }
        if "std" in distributions:
            scalars[f"{tag}/mean_{STD_COLUMN}"] = distributions["std"].float().mean().item()
            scalars[f"{tag}/beyond_two_{STD_COLUMN}"] = (size > 2 * distributions["std"]).float().mean().item()
    if agrees := attribution.query_info.get(AGREES):
        scalars[f"{tag}/readout_agreement"] = sum(map(bool, agrees)) / len(agrees)
    for name, value in attribution.metadata.items():
        if name.startswith(("seconds", "peak_memory")):
            scalars |= dict(_numbers(f"{tag}/{name}", value))
    return scalars


def markdown_table(attribution: AttributionResult, queries: Sequence[int], k: int) -> str:
    """Proponents and opponents of some queries as Markdown, one table each; text from the data is escaped.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> attribution = Attribution(torch.tensor([[0.5, -0.25]]), train_info={"text": ["a|b", "<i>"]})
        >>> print(markdown_table(attribution, [0], k=1))
        ### Query 0
        <BLANKLINE>
        | | rank | position | score | text |
        |---|---:|---:|---:|---|
        | proponent | 1 | 0 | +0.50 | a&#124;b |
        | opponent | 1 | 1 | -0.25 | &#60;i&#62; |
    """
    has_target = attribution.train_targets is not None
    names = ["target"] * has_target + [escaped(name) for name in attribution.train_info]
    score = f"score ± {STD}" if attribution.has_std else "score"
    header = [
        "| " + " | ".join([f"| rank | position | {score}", *names]) + " |",
        "|---|---:|---:|---:|" + "---|" * len(names),
    ]
    parts = []
    for query in queries:
        facts = [f"{escaped(name)} {escaped(value)}" for name, value in query_facts(attribution, query).items()]
        lines = ["### " + " · ".join([f"Query {query_name(attribution, query)}", *facts]), "", *header]
        for side, rank, example in _ranked_rows(attribution, query, k):
            score = interval_text(example.score, example.std)
            cells = [side, str(rank), str(example.position), score, *map(escaped, _texts(example))]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    if attribution.measure != OF_LOSS:
        parts.append(f"Positive scores: training on the example {escaped(effect_of(attribution.measure))}.")
    if any(map(attribution.disagrees, queries)):
        parts.append(EXPLANATION)
    return "\n\n".join(parts)


def example_table(attribution: AttributionResult, queries: Iterable[int], k: int) -> tuple[list[str], list[list[Any]]]:
    """Proponents and opponents of some queries as columns and rows; texts are not escaped.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> example_table(Attribution(torch.tensor([[0.5, -0.25]])), [0], k=1)
        (['query', 'side', 'rank', 'position', 'score'], [[0, 'proponent', 1, 0, 0.5], [0, 'opponent', 1, 1, -0.25]])
    """
    columns = ["query"] + [f"query_{name}" for name in query_facts(attribution, 0)]
    columns += ["side", "rank", "position", score_column(attribution)] + [STD_COLUMN] * attribution.has_std
    columns += ["target"] * (attribution.train_targets is not None) + list(attribution.train_info)
    rows = []
    for query in queries:
        start = [query, *query_facts(attribution, query).values()]
        for side, rank, example in _ranked_rows(attribution, query, k):
            std = [] if example.std is None else [example.std]
            rows.append([*start, side, rank, example.position, example.score, *std, *_texts(example)])
    return columns, rows


def score_column(attribution: AttributionResult) -> str:
    """The name of the column of scores, with what a positive one does to a measure."""
    return "score" if attribution.measure == OF_LOSS else f"score ({in_words(attribution.measure)})"


def _ranked_rows(attribution: AttributionResult, query: int, k: int) -> Iterator[tuple[str, int, RankedExample]]:
    for side, examples in zip(("proponent", "opponent"), rank_examples(attribution, query, k), strict=True):
        for rank, example in enumerate(examples, 1):
            yield side, rank, example


def _texts(example: RankedExample) -> list[str]:
    return ([] if example.target is None else [example.target]) + list(example.info)


def escaped(text: object) -> str:
    """Text from the data as one cell of a Markdown table."""
    return shortened(str(text), _CELL).translate(_ENTITIES)


def _numbers(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers in nested dictionaries, named by their path."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(f"{tag}/{name}", item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield tag, float(value)


def pixels_of(figure: Figure) -> np.ndarray:
    """The figure as it is drawn, uint8 of shape ``(H, W, 3)``."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
