"""The README's Python runs as it stands."""

import re

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.readme import README, module_of, readme_code
from tests.helpers.texts import TinyLM


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def __init__(self, examples):
        super().__init__()
        self.examples = examples

    def train_dataloader(self):
        return DataLoader(self.examples, 16, shuffle=True)


class Tokenizer:
    @staticmethod
    def decode(ids):
        return " ".join(map(str, ids.tolist()))


def test_every_block_runs(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    examples = TensorDataset(torch.randn(48, 4), torch.arange(48) % 3)
    names = {"model": Model(), "MyModel": Model, "datamodule": Data(examples), "queries": TensorDataset(*examples[:5])}
    texts = [{"input_ids": torch.randint(7, (6,))} for _ in range(12)]
    names |= {"language_model": TinyLM().eval(), "texts": texts, "text_queries": texts[:3], "tokenizer": Tokenizer}
    exec(compile(readme_code(README.read_text("utf-8")), str(README), "exec"), names)
    assert (tmp_path / "scores" / "MANIFEST").is_file()
    assert (tmp_path / "query.png").stat().st_size > 1000
    assert names["attribution"].metadata["record"] is not None
    assert names["second"].scores.shape == (5, 48)
    assert names["exact"].scores.shape == names["datamodel"].scores.shape == (5, 48)
    assert -1 <= names["cosine"] <= 1
    assert names["tracin"].scores.shape == names["mine"].scores.shape == (5, 48)
    assert len(names["tracin"].metadata["checkpoints"]) == 3
    assert names["strongest"].top(5).proponents.shape == (5, 5)
    assert names["suspicious"].shape == (48,)
    assert (names["loss"].scores >= 0).all()
    assert names["different"].proponents.shape == (5, 5)
    assert len(names["subset"].unique()) == 10
    assert (names["retrieved"].positions % 3 != 0).all()
    assert names["sure"].std.shape == names["summed"].scores.shape == (3, 12)
    assert "noise ceiling" in str(names["evaluation"])


def test_code_has_the_lines_of_the_readme():
    text = "# Title\n```\npip install\n```\n\n```python\nx = 1\n\ny = 2\n```\ntext\n```python\nz = 3\n```\n"
    code = readme_code(text)
    assert len(code.splitlines()) == len(text.splitlines())
    assert [(i, line) for i, line in enumerate(code.splitlines()) if line] == [
        (6, "x = 1"),
        (8, "y = 2"),
        (12, "z = 3"),
    ]
    checked, readme = module_of(README).splitlines(), README.read_text("utf-8").splitlines()
    assert len(checked) == len(readme)
    assert [line for line, text in zip(checked[2:], readme[2:], strict=True) if line not in ("", text)] == []


def test_every_file_named_exists():
    tree = README.read_text().split("## Files")[1].split("```")[1]
    package = README.parent / "stride_lightning"
    named = re.findall(r"^ +([\w/]+\.py)", tree, re.MULTILINE)
    assert len(named) > 15
    for name in named:
        assert list(package.rglob(name)), name
