"""StrideCallback in LightningCLI: YAML, command line and help text."""

from functools import partial

import pytest

from stride_lightning import Classification, StrideCallback
from stride_lightning.storage.records import find_records, read_record
from tests.helpers.runs import callbacks_of, run_cli, write_config

pytest.importorskip("jsonargparse")

pytestmark = pytest.mark.filterwarnings(r"ignore:The training_step of Wide minimises another loss than Tempered\(2.5\)")


class Tempered(Classification):
    """A task with a setting of its own."""

    def __init__(self, temperature: float = 1.0):
        self.temperature = temperature

    def outputs(self, model, inputs):
        return model(inputs) / self.temperature

    def __repr__(self):
        return f"Tempered({self.temperature})"


CALLBACK = """
- class_path: stride_lightning.StrideCallback
  init_args:
    dirpath: {folder}/records
    num_subsets: 8
    layers: [network.2]
    every_n_train_steps: 2
    task:
      class_path: tests.callbacks.test_cli.Tempered
      init_args:
        temperature: 2.5
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command line with these arguments in an empty folder."""
    return partial(run_cli, monkeypatch, tmp_path)


def test_yaml(run, tmp_path):
    (callback,) = callbacks_of(run("fit", "--config", write_config(tmp_path, CALLBACK)), StrideCallback)
    assert isinstance(callback.task, Tempered)
    assert callback.task.temperature == 2.5
    in_code = StrideCallback(tmp_path / "records", num_subsets=8, layers=["network.2"], every_n_train_steps=2)
    assert callback.state_key == in_code.state_key
    first, last = find_records(tmp_path / "records")
    assert (first.name, last.name) == ("step=2", "step=4")
    info = read_record(last).info
    assert info["layers"] == ["network.2"]
    assert info["task"] == "Tempered(2.5)"
    assert info["design"]["num_subsets"] == 8


def test_command_line_arguments(run, tmp_path):
    ran = run(
        *("fit", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        *("--trainer.enable_model_summary=false", "--trainer.callbacks+=stride_lightning.StrideCallback"),
        *("--trainer.callbacks.fit_operators=true", "--trainer.callbacks.every_n_epochs=3"),
    )
    (callback,) = callbacks_of(ran, StrideCallback)
    assert (callback.fit_operators, callback.every_n_epochs) == (True, 3)
    assert not (tmp_path / "stride").exists()


def test_help(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--trainer.callbacks.help=stride_lightning.StrideCallback")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for argument in ("dirpath", "layers", "num_subsets", "every_n_train_steps", "save_last_k", "fit_operators"):
        assert f".{argument} " in text
    assert "Keep only the last k records of this run; -1 keeps all" in text
    assert "Fit the steering operators at the end" in text


def test_wrong_argument_is_refused_by_name(run, capsys):
    with pytest.raises(SystemExit):
        run("fit", "--trainer.callbacks+=stride_lightning.StrideCallback", "--trainer.callbacks.every_n_epoch=3")
    assert "every_n_epoch" in capsys.readouterr().err


def test_printed_config_can_be_run_again(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("fit", "--config", write_config(tmp_path, CALLBACK), "--print_config")
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    (callback,) = callbacks_of(run("fit", "--config", tmp_path / "again.yaml"), StrideCallback)
    assert callback.layers == ["network.2"]
    assert callback.task.temperature == 2.5
    assert len(callback.records) == 2
