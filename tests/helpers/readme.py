"""The Python of the README and of pages of docs/, to run it and to check its types: every line stays in its place."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

README = Path(__file__).parents[2] / "README.md"
YOUR_MODEL = README.parent / "docs" / "your_model.md"
YOUR_DATA = README.parent / "docs" / "your_data.md"

# The README takes these names for granted.
model: L.LightningModule
MyModel: type[L.LightningModule]
datamodule: L.LightningDataModule
queries: Dataset[tuple[Tensor, Tensor]]
language_model: L.LightningModule
texts: list[dict[str, Tensor]]
text_queries: list[dict[str, Tensor]]
tokenizer: Any


def readme_code(text: str) -> str:
    """The Python fences of a Markdown text, with empty lines in place of all else."""
    language, lines = "", []
    for line in text.splitlines():
        is_fence = line.startswith("```")
        lines.append(line if language == "```python" and not is_fence else "")
        if is_fence:
            language = "" if language else line
    return "\n".join(lines) + "\n"


class Snippet(NamedTuple):
    """A Python fence, and the text fence that follows it."""

    page: Path
    heading: str
    code: str  # every line is where the page has it
    output: str


def snippets(page: Path) -> list[Snippet]:
    """The Python fences of a page; outputs are empty where no text fence follows."""
    text = page.read_text("utf-8")
    result = []
    for fence in re.finditer(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL):
        before = text[: fence.start(1)]
        heading = re.findall(r"^#+ (.*)$", before, re.MULTILINE)[-1]
        result.append(Snippet(page, heading, "\n" * before.count("\n") + fence[1], fence[2] or ""))
    return result


def id_of(snippet: Snippet) -> str:
    """What pytest calls a snippet."""
    return re.sub(r"\W+", "-", snippet.heading).lower()


def skip_without_packages(snippet: Snippet) -> None:
    """Skip where a package that a snippet imports is not installed."""
    for package in re.findall(r"^(?:import|from) (\w+)", snippet.code, re.MULTILINE):
        pytest.importorskip(package)


def check_snippet(shared: Snippet, snippet: Snippet) -> None:
    """Run a snippet after the lines that all share, and check what it prints and leaves in the working directory."""
    before, names, printed = set(Path().iterdir()), {"__name__": "snippet"}, io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
        for part in (shared, snippet):
            exec(compile(part.code, str(part.page), "exec"), names)
    assert snippet.output
    assert " ".join(printed.getvalue().split()) == " ".join(snippet.output.split())
    attribution: Any = names["attribution"]
    assert attribution.scores.shape == (attribution.metadata["num_queries"], attribution.metadata["num_train"])
    assert (attribution.scores.abs().amax(1) > 0).all()
    saved = {Path(name) for name in re.findall(r'save\("(.*?)"', snippet.code)}
    assert set(Path().iterdir()) - before == saved


def module_of(page: Path) -> str:
    """A module of a page's Python, ready for a type checker."""
    code = readme_code(page.read_text("utf-8"))
    # In place of the heading and the empty line below it. Other type checkers tell the types in a dictionary apart.
    header = "from tests.helpers.readme import *\n# pyright: strictDictionaryInference=true, strictListInference=true\n"
    if page != README:  # the types of torch know no list as a dataset, those of Lightning no pair of optimizers
        # Nor are the packages of every snippet installed, and some bring no types.
        header = "# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportMissingImports=false\n\n"
    assert code.startswith("\n\n")
    return header + code[2:]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.parent.mkdir(exist_ok=True)
        path.write_text(module_of({page.stem: page for page in (README, YOUR_MODEL, YOUR_DATA)}[path.stem]), "utf-8")
