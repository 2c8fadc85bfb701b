"""StrideCallback on real Trainers."""

import csv
import re

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from stride_lightning import Classification, StrideCallback, attribute
from stride_lightning.attribute import create
from stride_lightning.model.weights import weight_hash
from stride_lightning.steering import fit
from stride_lightning.steering.subsets import Design
from stride_lightning.storage.records import find_records, read_record
from tests.helpers.models import (
    NUM_TRAIN,
    Augmented,
    BinaryClassifier,
    Classifier,
    ConvNet,
    Data,
    Regressor,
    Validated,
    binary_data,
    build,
    classification_data,
    hooks_of,
    loader,
    make_trainer,
    picture_data,
    regression_data,
    train,
)

DATA = classification_data()
QUERIES = classification_data(5, seed=1)
QUIET = {"show_progress": False}


# ---- the record -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A finished run with a CSV logger: model, trainer, callback."""
    folder = tmp_path_factory.mktemp("run")
    model, callback = build(Classifier), StrideCallback(num_subsets=20, statistics_every_n_steps=3, seed=5)
    trainer = train(model, DATA, folder, callback, logger=CSVLogger(folder), log_every_n_steps=1)
    return model, trainer, callback


def test_record_holds_losses_and_design(recorded):
    model, _, callback = recorded
    record = read_record(callback.records[0])
    x, y = DATA.tensors
    with torch.no_grad():
        losses = F.cross_entropy(model.eval()(x), y, reduction="none")
    torch.testing.assert_close(record.tensors("losses")["train"], losses)
    design = Design.restore(record.info["design"], record.tensors("design"))
    masks = design.dense()
    assert masks.shape == (20, NUM_TRAIN)
    assert (masks.sum(0) == 10).all()
    torch.testing.assert_close(record.tensors("losses")["subsets"], masks @ losses / masks.sum(1))
    assert record.info["train_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert record.info["design"]["seed"] == 5


def test_record_names_what_it_is_of(recorded):
    _, trainer, callback = recorded
    record = read_record(callback.records[0])
    info = record.info
    assert record.groups == ("design", "losses", "readout", "statistics")
    assert info["layers"] == ["network.0", "network.2"]
    assert (info["epoch"], info["mode"]) == (trainer.current_epoch, "eval")
    assert re.fullmatch("[0-9a-f]{64}", info["data"]["content"])
    assert {"torch", "lightning", "stride-lightning"} <= info["versions"].keys()
    assert record.tensors("readout")["coefficients"].shape == (4 + 8 + 1, 3)
    # sqrt(mean |z|^2) of the raw features is the first layer's scale
    scale = record.tensors("statistics")["scales"][0].item()
    assert scale == pytest.approx(DATA.tensors[0].square().sum(1).mean().sqrt().item(), rel=1e-5)


def test_streamed_statistics_are_those_of_the_sampled_batches(tmp_path):
    """Steps 0, 3 and 6 of an unshuffled run; the first layer sees the raw features, whatever the weights."""
    callback = StrideCallback(num_subsets=8, statistics_every_n_steps=3)
    train(build(Classifier), loader(DATA, shuffle=False), tmp_path, callback, max_epochs=2)
    x = DATA.tensors[0]
    seen = torch.cat([x[:16], x[48:], x[32:48]])  # batches 0 and 3 of the first epoch, 2 of the second
    statistics = read_record(callback.records[0]).tensors("statistics")
    assert statistics["0.count"].item() == len(seen)
    torch.testing.assert_close(statistics["0.mean"], seen.mean(0))
    torch.testing.assert_close(statistics["0.covariance"], torch.cov(seen.T, correction=0))


def test_scalars_reach_the_csv_logger_at_sampled_steps(recorded):
    rows = rows_of(recorded[1])
    for key in ("norm", "effective_rank", "dead_fraction"):
        for layer in ("network.0", "network.2"):
            assert [int(row["step"]) for row in rows if row[f"stride/{layer}/{key}"]] == [0, 3, 6]
    assert 1 < logged_value(rows, "stride/network.0/effective_rank") <= 4
    assert all(row["loss"] for row in rows if int(row["step"]) in (1, 2))  # the user's own metrics are all there


def rows_of(trainer):
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        return list(csv.DictReader(file))


def logged_value(rows, key):
    return float(next(row[key] for row in rows if row[key]))


def test_scalars_reach_tensorboard_and_every_logger(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")]
    callback = StrideCallback(num_subsets=8, statistics_every_n_steps=4)
    trainer = train(build(Classifier), DATA, tmp_path, callback, logger=loggers)
    assert [path.parent.parent for path in callback.records] == [tmp_path / "board" / "version_0"]
    events = accumulator.EventAccumulator(trainer.log_dir).Reload()
    assert [event.step for event in events.Scalars("stride/network.2/norm")] == [0, 4]
    assert "stride/network.2/norm" in (tmp_path / "table" / "version_0" / "metrics.csv").read_text()


def test_dead_units_are_counted(tmp_path):
    model = build(Classifier)
    model.network[0].weight.data[:2], model.network[0].bias.data[:2] = 0, -1
    trainer = train(model, DATA, tmp_path, StrideCallback(num_subsets=8), logger=CSVLogger(tmp_path))
    assert logged_value(rows_of(trainer), "stride/network.2/dead_fraction") == pytest.approx(2 / 8)


# ---- when records are written ---------------------------------------------------------------------------------------


def test_every_n_epochs(tmp_path):
    callback = StrideCallback(num_subsets=8, every_n_epochs=2)
    train(build(Classifier), DATA, tmp_path, callback, max_epochs=5)
    assert [path.name for path in callback.records] == ["step=8", "step=16", "step=20"]
    assert [read_record(path).info["epoch"] for path in callback.records[:2]] == [1, 3]
    assert len({read_record(path).info["weights"] for path in callback.records}) == 3


def test_every_n_train_steps_counts_optimizer_steps(tmp_path):
    """4 batches an epoch, 2 optimizer steps: 6 in all; a record at 2, 4 and 6, each once."""
    callback = StrideCallback(num_subsets=8, every_n_train_steps=2, statistics_every_n_steps=1)
    logger = CSVLogger(tmp_path, name="t", version=0)
    train(build(Classifier), DATA, tmp_path, callback, max_epochs=3, accumulate_grad_batches=2, logger=logger)
    assert [path.name for path in callback.records] == ["step=2", "step=4", "step=6"]
    # one batch of 16 is sampled per optimizer step, not one per batch
    assert read_record(callback.records[-1]).tensors("statistics")["0.count"] == 6 * 16


def test_save_last_k_removes_only_its_own(tmp_path):
    """Neither records of another callback nor those of its fits before."""
    folder, model = tmp_path / "stride", build(Classifier)
    train(build(Classifier), DATA, tmp_path, StrideCallback(num_subsets=8), max_epochs=1)
    callback = StrideCallback(num_subsets=10, every_n_train_steps=1, save_last_k=2)
    trainer = train(model, DATA, tmp_path, callback)
    assert [path.name for path in find_records(folder)] == ["step=4", "step=7", "step=8"]
    assert [path.name for path in callback.records] == ["step=7", "step=8"]
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, loader(DATA))
    assert [path.name for path in callback.records] == ["step=7", "step=8", "step=15", "step=16"]


def test_one_record_per_step_also_with_operators(tmp_path):
    """The epoch's end has written the step already; the record with operators takes its place."""
    callback = StrideCallback(num_subsets=8, every_n_epochs=1, fit_operators=True)
    train(build(Classifier), DATA, tmp_path, callback)
    first, last = map(read_record, find_records(tmp_path / "stride"))
    assert callback.records == [first.path, last.path]
    assert "operators" not in first.groups
    assert last.info["step"] == 8
    assert last.tensors("operators")["coefficients"].shape == (4 + 8 + 1, 3, 8)


def test_relative_log_folder_is_stored_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = StrideCallback(num_subsets=8)
    train(build(Classifier), DATA, ".", callback, logger=CSVLogger("logs"))
    assert callback.state_dict()["dirpath"].startswith(str(tmp_path))


def test_fast_dev_run_writes_nothing_but_runs_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted, original = [], StrideCallback._record
    monkeypatch.setattr(StrideCallback, "_record", lambda self, *a, **k: fitted.append(k) or original(self, *a, **k))
    train(build(Classifier), DATA, tmp_path, StrideCallback(fit_operators=True), fast_dev_run=True)
    assert fitted == [{"final": True}]
    assert list(tmp_path.iterdir()) == []


def test_several_instances(tmp_path):
    one, two = StrideCallback(num_subsets=8), StrideCallback(num_subsets=12, layers=["network.2"])
    assert one.state_key != two.state_key
    model = build(Classifier)
    train(model, DATA, tmp_path, one, two)
    assert [read_record(r.records[0]).info["design"]["num_subsets"] for r in (one, two)] == [8, 12]
    assert read_record(two.records[0]).info["layers"] == ["network.2"]
    for num_subsets, callback in ((8, one), (12, two)):
        attribution = attribute(model, QUERIES, train_data=DATA, num_subsets=num_subsets, **QUIET)
        assert attribution.metadata["record"] == str(callback.records[0])


# ---- operators and what attribute() makes of the record ---------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "queries"),
    [
        (Classifier, DATA, QUERIES),
        (ConvNet, picture_data(), picture_data(3, seed=2)),
        (Regressor, regression_data(), regression_data(3, seed=1)),
        (BinaryClassifier, binary_data(), binary_data(3, seed=1)),
    ],
)
@pytest.mark.usefixtures("few_steps")
def test_operators_of_the_record_are_used_and_give_equal_scores(tmp_path, kind, data, queries):
    model = build(kind)
    train(model, data, tmp_path, StrideCallback(num_subsets=12, fit_operators=True))
    reused = attribute(model, queries, train_data=data, recovery="prior", **QUIET)
    assert reused.metadata["operators"]["from_record"]
    assert reused.metadata["record"].endswith(("step=8", "step=6"))
    metadata = attribute(model, queries, train_data=data, basis="learned", num_subsets=12, **QUIET).metadata
    assert metadata["record"] is not None
    assert not metadata["operators"]["from_record"]  # which another basis refuses
    model.trainer = None
    fresh = attribute(model, queries, train_data=data, num_subsets=12, **QUIET)
    assert fresh.metadata["record"] is None
    torch.testing.assert_close(reused.scores, fresh.scores, rtol=1e-3, atol=1e-3 * fresh.scores.abs().max().item())


def test_a_large_readout_is_left_out_and_fitted_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "MOST_RECORDED", 100)
    model, callback = build(Classifier), StrideCallback(num_subsets=12)
    train(model, DATA, tmp_path, callback)
    assert "readout" not in read_record(callback.records[-1]).groups
    scored = attribute(model, QUERIES, train_data=DATA, recovery="prior", **QUIET)
    assert "it has no readout, so that was computed on the spot" in scored.metadata["record_note"]
    model.trainer = None
    fresh = attribute(model, QUERIES, train_data=DATA, recovery="prior", num_subsets=12, **QUIET)
    torch.testing.assert_close(scored.scores, fresh.scores, rtol=1e-3, atol=1e-3 * fresh.scores.abs().max().item())


def test_a_subclass_is_found_too(tmp_path):
    class Mine(StrideCallback):
        pass

    model = build(Classifier)
    trainer = train(model, DATA, tmp_path, Mine(num_subsets=8))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    arguments = {"train_data": DATA, **QUIET}
    assert attribute(model, QUERIES, **arguments).metadata["record"] is not None
    other = build(Classifier, seed=1)
    assert attribute(other, QUERIES, ckpt_path=tmp_path / "end.ckpt", **arguments).metadata["record"] is not None


def test_augmented_data_warn_once_and_still_match(tmp_path):
    data, model = Augmented(DATA), build(Classifier)
    with pytest.warns(UserWarning, match="Two reads of one example of Augmented differ") as caught:
        train(model, data, tmp_path, StrideCallback(num_subsets=8, batch_size=7, every_n_epochs=1))
    assert len([w for w in caught if "Two reads" in str(w.message)]) == 1
    with pytest.warns(UserWarning, match="Two reads"):
        attribution = attribute(model, QUERIES, train_data=data, **QUIET)
    assert attribution.metadata["record"] is not None
    assert attribution.metadata["data"]["content"] is None
    # other targets are another data set all the same
    flipped = Augmented(TensorDataset(DATA.tensors[0], 2 - DATA.tensors[1]))
    with (
        pytest.warns(UserWarning, match="Two reads"),
        pytest.warns(UserWarning, match="made with other training data.*random_split"),
    ):
        other = attribute(model, QUERIES, train_data=flipped, **QUIET)
    assert "other training data" in other.metadata["record_note"]


# ---- precision and compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(tmp_path, precision):
    model, callback = build(Classifier), StrideCallback(num_subsets=8, statistics_every_n_steps=1, fit_operators=True)
    train(model, DATA, tmp_path, callback, precision=precision)
    losses = read_record(callback.records[0]).tensors("losses")["train"]
    x, y = DATA.tensors
    with torch.no_grad():
        outputs = model.eval()(x.to(model.network[0].weight.dtype))
    torch.testing.assert_close(losses.float(), F.cross_entropy(outputs.float(), y, reduction="none"))
    attribution = attribute(model, QUERIES, train_data=DATA, recovery="prior", **QUIET)
    assert attribution.metadata["operators"]["from_record"]
    assert torch.isfinite(attribution.scores).all()
    assert attribution.scores.dtype == torch.float32


def test_compiled_submodule(tmp_path):
    """The record is that of the plain model; the compiled graph still runs in training steps."""
    plain = build(Classifier)
    train(plain, DATA, tmp_path / "plain")
    model, calls = build(Classifier), []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    model.network[0] = torch.compile(model.network[0], backend=backend)
    callback = StrideCallback(num_subsets=8, statistics_every_n_steps=1, every_n_train_steps=3)
    train(model, DATA, tmp_path, callback)
    assert calls
    record = read_record(callback.records[-1])
    assert record.info["layers"] == ["network.0", "network.2"]
    assert record.info["weights"] == weight_hash(plain) == weight_hash(model)
    assert record.tensors("statistics")["0.count"] > 0
    assert hooks_of(model) == []
    attribution = attribute(plain, QUERIES, train_data=DATA, record=tmp_path / "stride", **QUIET)
    assert attribution.metadata["record"] == str(record.path)


# ---- what is refused, before the first step ---------------------------------------------------------------------


class NoForward(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Through(Classification):
    def outputs(self, model, inputs):
        return model.net(inputs)


def test_no_forward(tmp_path):
    with pytest.raises(ValueError, match=r"STRIDE needs a likelihood, .*NoForward defines no `forward`"):
        train(NoForward(), DATA, tmp_path, StrideCallback())
    callback = StrideCallback(num_subsets=8, task=Through())
    train(NoForward(), DATA, tmp_path, callback)
    assert read_record(callback.records[0]).info["layers"] == ["net"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("every_n_epochs", 0),
        ("every_n_train_steps", -1),
        ("statistics_every_n_steps", 0),
        ("batch_size", 0),
        ("save_last_k", 0),
        ("save_last_k", -2),
        ("layers", "network"),
        ("num_subsets", 1),
        ("degree", 0),
        ("seed", -1),
    ],
)
def test_arguments(argument, value):
    with pytest.raises(MisconfigurationException, match=f"`{argument}` must be.*got .*{value}"):
        StrideCallback(**{argument: value})


def test_a_design_that_cannot_be():
    for options, numbers in (
        ({"num_subsets": 4, "degree": 4}, "degree=4 with num_subsets=4"),
        ({"degree": 200}, "degree=200 with num_subsets=16"),
    ):
        with pytest.raises(MisconfigurationException, match=f"in fewer than all: got {numbers}"):
            StrideCallback(**options)


def test_an_unknown_argument_is_named():
    with pytest.raises(
        TypeError, match=r"^StrideCallback has no argument num_subset\. help\(StrideCallback\) shows its arguments\.$"
    ):
        StrideCallback(num_subset=3)


class Idle(Classifier):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["network.9"]}, r"'network\.9' is not a submodule.*'network\.0'"),
        ({"layers": ["unused"]}, r"\['unused'\] do not run"),
    ],
)
def test_what_a_model_or_its_data_refuse(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(build(Idle), DATA, tmp_path, StrideCallback(**options))


# ---- other ways in ----------------------------------------------------------------------------------------------


def test_data_module_hooks_apply_to_the_record(tmp_path):
    class Shifted(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 3, batch[1]

    model, callback, data = build(Validated), StrideCallback(num_subsets=8), Shifted()
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(model, data)
    x, y = DATA.tensors
    with torch.no_grad():
        expected = F.cross_entropy(model(x + 3), y, reduction="none")
    torch.testing.assert_close(read_record(callback.records[0]).tensors("losses")["train"], expected)
    attribution = create("stride", **QUIET).fit(model, data).attribute(data)
    assert attribution.metadata["record"] == str(callback.records[0])
    assert attribution.metadata["num_queries"] == 4


def test_only_some_examples_of_a_batch_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("stride_lightning.callbacks.stride.STATISTICS_EXAMPLES", 5)
    stride = StrideCallback(num_subsets=8, statistics_every_n_steps=1)
    train(build(Classifier), loader(DATA, batch_size=20), tmp_path, stride, max_epochs=1)
    assert read_record(stride.records[-1]).tensors("statistics")["0.count"] == 3 * 5
