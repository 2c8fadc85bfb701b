"""The page as one file: a template filled with style, script and data, written in one step."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from stride_lightning.results.agreement import EXPLANATION, MARK, agreement_text
from stride_lightning.results.scores import AttributionResult
from stride_lightning.results.texts import STD
from stride_lightning.storage.files import hidden_name
from stride_lightning.tasks.measures import OF_LOSS, effect_of
from stride_lightning.views.report.content import report_content

#: Files beside this one that run as one script, in this order.
_SCRIPTS = ("elements.js", "query.js", "page.js")
#: Heading, meaning and placeholder of each side of a query.
_SIGNED = (
    ("Proponents", "Training on them {}.", "No training example helps this query."),
    ("Opponents", "Training on them {}.", "No training example harms this query."),
)
_UNSIGNED = (
    ("Most informative", "They tell most about the query.", "No training example tells anything of this query."),
)


def write_report(
    attribution: AttributionResult,
    path: Path,
    *,
    queries: int | Sequence[int] | None = None,
    k: int = 5,
    title: str | None = None,
    **shown: Any,
) -> None:
    """Write the page to ``path``; other arguments are those of :meth:`~stride_lightning.Attribution.report`."""
    if queries is None:
        queries = range(attribution.num_queries)
    elif isinstance(queries, int):
        queries = [queries]
    if len(queries) == 0:
        raise ValueError("`queries` is empty: nothing to report.")
    # Rows are counted from the start, as the page names them.
    rows = list(dict.fromkeys(int(row) + attribution.num_queries if row < 0 else int(row) for row in queries))
    content = report_content(attribution, rows, k, **shown)
    _write_at_once(path, page(attribution, content, k=k, title=title).encode(errors="replace"))


def html_path(path: str | os.PathLike[str]) -> Path:
    """The file to write, with the home folder for ``~`` and with ``.html`` at its end.

    Raises:
        IsADirectoryError: If the path is a folder.

    Example:
        >>> html_path("runs/report.html").name, html_path("runs/v1.2").name
        ('report.html', 'v1.2.html')
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the file to write, such as {path / 'report.html'}.")
    return path if path.suffix.lower() in (".html", ".htm") else path.with_name(f"{path.name}.html")


def page(attribution: AttributionResult, content: dict[str, Any], *, k: int, title: str | None = None) -> str:
    """The whole page as text; ``content`` comes from :func:`~stride_lightning.views.report.content.report_content`.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> attribution = Attribution(torch.tensor([[0.5, -0.25]]))
        >>> text = page(attribution, report_content(attribution, [0], 1), k=1, title="a < b")
        >>> "<title>a &lt; b · scores · 1 query, 2 training examples</title>" in text
        True
    """
    # The template escapes every value but `style` and `script`, which are the package's.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["sha256"] = _sha256
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    sides = _SIGNED if attribution.is_signed else _UNSIGNED
    effects = effect_of(attribution.measure), effect_of(attribution.measure, helpful=False)
    named = [
        {"name": name, "meaning": text.format(effect), "none": none}
        for (name, text, none), effect in zip(sides, effects, strict=False)
    ]
    count, num_train = len(content["queries"]), attribution.num_train
    sizes = f"{count:,} {'query' if count == 1 else 'queries'}, {num_train:,} training example{'s' * (num_train != 1)}"
    return environment.from_string(_file("page.html")).render(
        heading="Training-data attribution" if title is None else title,
        sizes=sizes,
        facts=header_facts(attribution, count, k),
        style=_file("page.css"),
        script='"use strict";\n{\n' + "\n".join(map(_file, _SCRIPTS)) + "}\n",
        notes=[meaning(attribution)] + [EXPLANATION] * any(query["disagrees"] for query in content["queries"]),
        data={"sides": named, "std": STD if attribution.has_std else None, "mark": MARK, **content},
    )


def header_facts(attribution: AttributionResult, num_shown: int, k: int) -> dict[str, str]:
    """Facts above the queries, by name: method, sizes, seconds, unit.

    Example:
        >>> import torch
        >>> from stride_lightning.results.attribution import Attribution
        >>> facts = header_facts(Attribution(torch.ones(3, 2000), metadata={"method": "grad-cos"}), 2, 5)
        >>> facts["Method"], facts["Queries"], facts["Training examples"]
        ('grad-cos', '2 of 3', '2,000')
    """
    metadata, seconds = attribution.metadata, attribution.seconds
    total = f"{attribution.num_queries:,}"
    known = min(k, attribution.num_ranked)
    facts = {
        "Method": attribution.label,
        "Queries": total if num_shown == attribution.num_queries else f"{num_shown:,} of {total}",
        "Training examples": f"{attribution.num_train:,}",
        "Shown per query": f"{known} strongest" + (" of each side" if attribution.is_signed else ""),
    }
    if isinstance(seconds, int | float):
        facts["Computed in"] = f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"
    facts |= {} if attribution.measure == OF_LOSS else {"Explained": attribution.measure["name"]}
    agreement = agreement_text(attribution.query_info)
    facts |= {} if agreement is None else {"Readout": agreement}
    return facts | {"Unit of scores": str(metadata.get("unit") or "that of the method")}


def meaning(attribution: AttributionResult) -> str:
    """How to read scores and whiskers, in a sentence or two."""
    words = f"Positive scores are helpful: training on the example {effect_of(attribution.measure)}."
    if not attribution.is_signed:
        words = "Scores have no direction: they say how much an example tells about the query, not which way."
    return words + (f" ± and whiskers: one {STD} to each side." if attribution.has_std else "")


def _file(name: str) -> str:
    return (files("stride_lightning.views.report") / name).read_text("utf-8")


def _sha256(text: str) -> str:
    """The hash by which a content security policy allows an inline style or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _write_at_once(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = hidden_name(path)
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except BaseException:  # Ctrl-C too
        part.unlink(missing_ok=True)
        raise
