"""The Python of the README and of a page of docs/, to run it and to check its types: every line stays in its place."""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
from torch import Tensor
from torch.utils.data import Dataset

README = Path(__file__).parents[2] / "README.md"
YOUR_MODEL = README.parent / "docs" / "your_model.md"

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
        result.append(Snippet(heading, "\n" * before.count("\n") + fence[1], fence[2] or ""))
    return result


def module_of(page: Path) -> str:
    """A module of a page's Python, ready for a type checker."""
    code = readme_code(page.read_text("utf-8"))
    # In place of the heading and the empty line below it. Other type checkers tell the types in a dictionary apart.
    header = "from tests.helpers.readme import *\n# pyright: strictDictionaryInference=true, strictListInference=true\n"
    if page != README:  # the types of torch know no list as a dataset, those of Lightning no pair of optimizers
        header = "# pyright: reportArgumentType=false, reportGeneralTypeIssues=false\n\n"
    assert code.startswith("\n\n")
    return header + code[2:]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        path.parent.mkdir(exist_ok=True)
        path.write_text(module_of({page.stem: page for page in (README, YOUR_MODEL)}[path.stem]), "utf-8")
