"""The page's content as plain values: queries, their ranked training examples, texts, pictures and facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stride_lightning.data.examples import Examples
from stride_lightning.results.agreement import is_of_readout
from stride_lightning.results.scores import AttributionResult, ImageShape, TextSource
from stride_lightning.results.texts import interval_text
from stride_lightning.runtime.progress import track
from stride_lightning.runtime.randomness import seeded
from stride_lightning.views.figures import as_image
from stride_lightning.views.ranking import RankedExample, info_text, rank_examples, target_text
from stride_lightning.views.report.pictures import Pictures

#: The page holds so many characters of a text. A column with a longer fact than this is shown as texts.
MAX_TEXT, MAX_FACT = 2000, 60


def report_content(
    attribution: AttributionResult,
    rows: Sequence[int],
    k: int,
    *,
    image_shape: ImageShape = None,
    query_text: TextSource = None,
    train_text: TextSource = None,
) -> dict[str, Any]:
    """Queries, examples and pictures of the page. Each example and picture is listed once and named by its place.

    ``rows`` are rows of the scores, each once; other arguments are those of
    :meth:`~stride_lightning.Attribution.report`.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> content = report_content(Attribution(torch.tensor([[0.5, -0.25]])), [0], k=1)
        >>> content["queries"][0]["ranked"], [example["name"] for example in content["examples"]]
        ([[[0, 0.5, None, '+0.50']], [[1, -0.25, None, '-0.25']]], ['0', '1'])
    """
    num_sides = 2 if attribution.is_signed else 1
    ranked = {row: rank_examples(attribution, row, k)[:num_sides] for row in track(rows, "Ranking", len(rows))}
    columns = list(dict.fromkeys(example.column for sides in ranked.values() for side in sides for example in side))
    place = {column: number for number, column in enumerate(columns)}
    pictures = Pictures()
    data, targets, info = attribution.queries, attribution.query_targets, attribution.query_info
    query_source = _Source("query", data, None, targets, info, query_text, image_shape)
    data, targets, info = attribution.train_data, attribution.train_targets, attribution.train_info
    train_source = _Source("train", data, attribution.train_indices, targets, info, train_text, image_shape)

    def entry(example: RankedExample) -> list[Any]:
        std = None if example.std is None else _brief(example.std)
        text = interval_text(example.score, example.std)
        text = text if attribution.is_signed else text.removeprefix("+")
        return [place[example.column], _brief(example.score), std, text]

    queries = query_source.described(rows, attribution.num_queries, pictures)
    for query, (row, sides) in zip(queries, ranked.items(), strict=True):
        query["disagrees"] = attribution.disagrees(row)
        query["ranked"] = [[entry(example) for example in side] for side in sides]
    examples = train_source.described(columns, attribution.num_train, pictures)
    # The list of queries shows values without their names, so it leaves these out.
    readout = [name for name in attribution.query_info if is_of_readout(name, attribution.query_info)]
    return {"queries": queries, "examples": examples, "pictures": pictures.uris(), "readout": readout}


def _brief(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class _Source:
    """Queries or training examples, with their targets, facts and texts."""

    kind: str
    data: Examples | None
    indices: Tensor | None
    targets: Tensor | None
    info: dict[str, list[Any]]
    text: TextSource
    image_shape: ImageShape

    def described(self, places: Sequence[int], length: int, pictures: Pictures) -> list[dict[str, Any]]:
        """The queries of some rows, or the training examples of some columns, as plain values; it reads no others."""
        self._check(length)
        # Where the first input is neither a picture nor a text, the others are not read.
        reads = self.data is not None and bool(places) and self._shows(self._read(places[0]))
        blocks = {name for name, values in self.info.items() if self._is_block(name, values, places)}
        described = []
        for place in track(places, "Reading what is shown", len(places), show=reads or callable(self.text)):
            example = self._read(place) if reads else None
            image = as_image(example, image_shape=self.image_shape) if reads else None
            shown = {name: info_text(self.info, name, place) for name in self.info}
            texts = self._texts(place, example) + [(name, shown[name]) for name in shown if name in blocks]
            values = {
                "name": str(place if self.indices is None else int(self.indices[place])),
                "target": target_text(self.targets, place),
                "facts": [[name, value] for name, value in shown.items() if name not in blocks],
                "texts": [[name, text[:MAX_TEXT], len(text)] for name, text in texts],
                "picture": None if image is None else pictures.add(image),
            }
            described.append(values)
        return described

    def _check(self, length: int) -> None:
        if isinstance(self.text, str) and self.text not in self.info:
            columns = f"{self.kind}_info {sorted(self.info)}"
            raise ValueError(f"`{self.kind}_text` names no column of {columns}: {self.text!r}.")
        if isinstance(self.text, Sequence) and not isinstance(self.text, str) and len(self.text) != length:
            raise ValueError(f"`{self.kind}_text` has {len(self.text)} texts, expected {length}.")

    def _read(self, place: int) -> Any:
        """The example as it was attributed: a random augmentation draws under the seed of its position."""
        assert self.data is not None
        with seeded(self.data.name(place)):
            return self.data[place]

    def _shows(self, example: Any) -> bool:
        has_text = self.text is None and bool(texts_of(example))
        return has_text or as_image(example, image_shape=self.image_shape) is not None

    def _is_block(self, name: str, values: Sequence[Any], places: Iterable[int]) -> bool:
        texts = (str(values[place]) for place in places)
        return name in ("text", self.text) or any(len(text) > MAX_FACT or "\n" in text for text in texts)

    def _texts(self, place: int, example: Any) -> list[tuple[str, str]]:
        """Texts of an example by name, without those of columns."""
        if self.text is None or isinstance(self.text, str):
            return texts_of(example) if self.text is None else []
        if not callable(self.text):
            return [("", str(self.text[place]))]
        positions = self.indices if self.data is None else self.data.positions
        return [("", str(self.text(place if positions is None else int(positions[place]))))]


def texts_of(example: Any) -> list[tuple[str, str]]:
    """Texts in an example: a string, a tuple that begins with one, or a dictionary's strings, by their names.

    Example:
        >>> texts_of(("so it goes", 1)), texts_of({"question": "why", "label": 3}), texts_of(2.5)
        ([('', 'so it goes')], [('question', 'why')], [])
    """
    if isinstance(example, str):
        return [("", example)]
    if isinstance(example, dict):
        return [(str(name), value) for name, value in example.items() if isinstance(value, str)]
    return texts_of(example[0]) if isinstance(example, tuple | list) and len(example) else []
