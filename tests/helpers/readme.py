"""The Python of the README, to run it and to check its types: every line is where the README has it."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch import Tensor
from torch.utils.data import Dataset

README = Path(__file__).parents[2] / "README.md"

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


def readme_module() -> str:
    """A module of the README's Python, ready for a type checker."""
    code = readme_code(README.read_text("utf-8"))
    # In place of the heading and the empty line below it. Other type checkers tell the types in a dictionary apart.
    header = "from tests.helpers.readme import *\n# pyright: strictDictionaryInference=true, strictListInference=true\n"
    assert code.startswith("\n\n")
    return header + code[2:]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(exist_ok=True)
    path.write_text(readme_module(), "utf-8")
