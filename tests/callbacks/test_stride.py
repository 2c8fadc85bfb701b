"""StrideCallback on real Trainers."""

import csv
import re

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from stride_lightning import Classification, StrideCallback, attribute
from stride_lightning.attribute import create
from stride_lightning.model.weights import weight_hash
from stride_lightning.steering.subsets import Design
from stride_lightning.storage.records import find_records, read_record
from tests.helpers.models import (
    NUM_TRAIN,
    Augmented,
    BinaryClassifier,
    Classifier,
    ConvNet,
    Data,
    DictClassifier,
    Dicts,
    DictTask,
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
from tests.helpers.runs import fit_in_the_other_tree

DATA = classification_data()
QUERIES = classification_data(5, seed=1)
QUIET = {"show_progress": False}


def only_record(folder):
    (path,) = find_records(folder / "stride")
    return read_record(path)


# ---- the record -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A finished run with a CSV logger: model, trainer, callback."""
    folder = tmp_path_factory.mktemp("run")
    model, callback = build(Classifier), StrideCallback(num_subsets=20, statistics_every_n_steps=3, seed=5)
    trainer = train(model, DATA, folder, callback, logger=CSVLogger(folder), log_every_n_steps=1)
    return model, trainer, callback


def test_record_lies_in_the_log_folder_under_its_step(recorded):
    _, trainer, callback = recorded
    assert trainer.global_step == 8
    (path,) = find_records(f"{trainer.log_dir}/stride")
    assert path.name == "step=8"
    assert callback.records == [path]


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
    model, trainer, callback = recorded
    record = read_record(callback.records[0])
    info = record.info
    assert record.groups == ("basis", "design", "losses", "statistics")
    assert info["weights"] == weight_hash(model)
    assert info["layers"] == ["network.0", "network.2"]
    assert (info["step"], info["epoch"], info["model"], info["mode"]) == (
        8,
        trainer.current_epoch,
        "Classifier",
        "eval",
    )
    assert info["data"]["num_examples"] == NUM_TRAIN
    assert re.fullmatch("[0-9a-f]{64}", info["data"]["content"])
    assert info["task"] == "Classification()"
    assert {"torch", "lightning", "stride-lightning"} <= info["versions"].keys()
    basis = record.tensors("basis")
    assert basis["rotation"].shape[0] == 4 + 8 + 1
    # sqrt(mean |z|^2) of the raw features is the first layer's scale
    assert basis["scales"][0].item() == pytest.approx(DATA.tensors[0].square().sum(1).mean().sqrt().item(), rel=1e-5)


def test_streamed_statistics_are_those_of_the_sampled_batches(tmp_path):
    """Steps 0, 3 and 6 of an unshuffled run; the first layer sees the raw features, whatever the weights."""
    callback = StrideCallback(num_subsets=8, statistics_every_n_steps=3)
    train(build(Classifier), loader(DATA, shuffle=False), tmp_path, callback, max_epochs=2)
    x = DATA.tensors[0]
    batches = [x[:16], x[48:], x[32:48]]  # batches 0 and 3 of the first epoch, 2 of the second
    seen = torch.cat(batches)
    statistics = only_record(tmp_path).tensors("statistics")
    assert statistics["0.count"].item() == len(seen)
    torch.testing.assert_close(statistics["0.mean"], seen.mean(0))
    torch.testing.assert_close(statistics["0.covariance"], torch.cov(seen.T, correction=0))


def test_scalars_reach_the_csv_logger_at_sampled_steps(recorded):
    _, trainer, _ = recorded
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for key in ("norm", "effective_rank", "dead_fraction"):
        for layer in ("network.0", "network.2"):
            logged = {
                int(row["step"]): float(row[f"stride/{layer}/{key}"]) for row in rows if row[f"stride/{layer}/{key}"]
            }
            assert sorted(logged) == [0, 3, 6]
    assert 1 < logged_value(rows, "stride/network.0/effective_rank") <= 4
    assert all(row["loss"] for row in rows if int(row["step"]) in (1, 2))  # the user's own metrics are all there


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
    with torch.no_grad():
        model.network[0].weight[:2] = 0
        model.network[0].bias[:2] = -1
    train(model, DATA, tmp_path, StrideCallback(num_subsets=8), logger=CSVLogger(tmp_path, name="t", version=0))
    with open(tmp_path / "t/version_0/metrics.csv") as file:
        assert logged_value(list(csv.DictReader(file)), "stride/network.2/dead_fraction") == pytest.approx(2 / 8)


# ---- training goes on as if it were not there ---------------------------------------------------------------------


def trajectory(folder, kind, data, *callbacks, **options):
    """Final weights, and the next random numbers; dropout and shuffling draw from the global generator."""
    model = build(kind, **({"dropout": 0.4} if kind is Classifier else {}))
    train(model, data, folder, *callbacks, **options)
    return weight_hash(model), torch.rand(3).tolist(), model


@pytest.mark.parametrize(
    ("kind", "data", "options"),
    [
        (Classifier, DATA, {}),
        (ConvNet, picture_data(), {}),
        (ConvNet, Augmented(picture_data()), {}),
        (Classifier, DATA, {"accumulate_grad_batches": 3}),
        (Classifier, DATA, {"precision": "bf16-mixed"}),
    ],
    ids=["dropout", "batchnorm", "augmentation", "accumulation", "bf16-mixed"],
)
@pytest.mark.filterwarnings("ignore:Two reads of one example")
def test_training_is_bit_identical(tmp_path, kind, data, options):
    callback = StrideCallback(
        num_subsets=8, statistics_every_n_steps=1, every_n_train_steps=2, every_n_epochs=1, fit_operators=True
    )
    plain = trajectory(tmp_path / "without", kind, data, **options)
    watched = trajectory(tmp_path / "with", kind, data, callback, **options)
    assert plain[:2] == watched[:2]
    assert len(callback.records) > 1
    assert hooks_of(watched[2]) == []
    assert all(parameter.requires_grad for parameter in watched[2].parameters())


def test_modes_are_left_alone(tmp_path):
    """A part that the user keeps in eval mode stays so, the rest trains."""
    seen = []

    class Frozen(ConvNet):
        def on_train_batch_start(self, batch, batch_idx):
            self.network[1].eval()

        def training_step(self, batch, batch_idx):
            seen.append((self.training, self.network[1].training, self.network[5].training, len(hooks_of(self))))
            return super().training_step(batch, batch_idx)

    callback = StrideCallback(num_subsets=8, statistics_every_n_steps=1, every_n_train_steps=1)
    train(build(Frozen), picture_data(), tmp_path, callback)
    assert set(seen) == {(True, False, True, 0)}


def test_exception_in_training_step_leaves_nothing_behind(tmp_path):
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    model = build(Failing, dropout=0.4)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, DATA, tmp_path, StrideCallback(num_subsets=8, statistics_every_n_steps=1))
    assert hooks_of(model) == []
    assert model.training
    assert find_records(tmp_path / "stride") == []


def test_exception_inside_the_callbacks_own_pass_leaves_nothing_behind(tmp_path):
    class Failing(Classifier):
        def forward(self, inputs):
            if not self.training and self.global_step == 4:
                raise RuntimeError("out of luck")
            return super().forward(inputs)

    model = build(Failing, dropout=0.4)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, DATA, tmp_path, StrideCallback(num_subsets=8, statistics_every_n_steps=4))
    assert hooks_of(model) == []
    assert all(module.training for module in model.modules())


def test_validation_and_sanity_check_in_between(tmp_path):
    model, callback = build(Validated), StrideCallback(num_subsets=8, statistics_every_n_steps=2, every_n_epochs=1)
    trainer = make_trainer(tmp_path, callback, num_sanity_val_steps=2, val_check_interval=0.5)
    trainer.fit(model, Data())
    assert [path.name for path in callback.records] == ["step=4", "step=8"]
    assert read_record(callback.records[1]).info["weights"] == weight_hash(model)


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
    folder = tmp_path / "stride"
    train(build(Classifier), DATA, tmp_path, StrideCallback(num_subsets=8), max_epochs=1)
    callback = StrideCallback(num_subsets=10, every_n_train_steps=1, save_last_k=2)
    train(build(Classifier), DATA, tmp_path, callback)
    assert [path.name for path in find_records(folder)] == ["step=4", "step=7", "step=8"]
    assert [path.name for path in callback.records] == ["step=7", "step=8"]
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_one_record_per_step_also_with_operators(tmp_path):
    """The epoch's end has written the step already; the record with operators takes its place."""
    callback = StrideCallback(num_subsets=8, every_n_epochs=1, fit_operators=True)
    train(build(Classifier), DATA, tmp_path, callback)
    first, last = find_records(tmp_path / "stride")
    assert callback.records == [first, last]
    assert "operators" not in read_record(first).groups
    assert read_record(last).info["step"] == 8
    assert read_record(last).tensors("operators")["coefficients"].shape[0] == 3
    assert read_record(last).tensors("operators")["coefficients"].shape[2] == 8


def test_a_name_that_is_taken_gets_a_version(tmp_path):
    for _ in range(2):
        train(build(Classifier), DATA, tmp_path, StrideCallback(num_subsets=8))
    assert [path.name for path in find_records(tmp_path / "stride")] == ["step=8", "step=8-v1"]


def test_dirpath(tmp_path):
    callback = StrideCallback(tmp_path / "elsewhere", num_subsets=8)
    train(build(Classifier), DATA, tmp_path, callback)
    assert [path.name for path in find_records(tmp_path / "elsewhere")] == ["step=8"]
    assert not (tmp_path / "stride").exists()


def test_relative_log_folder_is_stored_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = StrideCallback(num_subsets=8)
    train(build(Classifier), DATA, ".", callback, logger=CSVLogger("logs"))
    assert callback.state_dict()["dirpath"].startswith(str(tmp_path))


def test_fast_dev_run_writes_nothing_but_runs_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted = []
    original = StrideCallback._record
    monkeypatch.setattr(StrideCallback, "_record", lambda self, *a, **k: fitted.append(k) or original(self, *a, **k))
    train(build(Classifier), DATA, tmp_path, StrideCallback(fit_operators=True), fast_dev_run=True)
    assert fitted == [{"final": True}]
    assert list(tmp_path.iterdir()) == []


def test_fast_dev_run_still_refuses_unknown_layers(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"'nothing' is not a submodule"):
        train(build(Classifier), DATA, tmp_path, StrideCallback(layers=["nothing"]), fast_dev_run=True)


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


def test_second_fit_on_the_same_trainer(tmp_path):
    model, callback = build(Classifier), StrideCallback(num_subsets=8, save_last_k=1)
    trainer = train(model, DATA, tmp_path, callback)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(model, loader(DATA))
    assert [path.name for path in callback.records] == ["step=8", "step=16"]
    assert read_record(callback.records[1]).info["weights"] == weight_hash(model)
    trainer.fit(model, loader(DATA))  # nothing left to train
    assert [path.name for path in find_records(tmp_path / "stride")] == ["step=8", "step=16"]


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_state_survives_weights_only_loading(tmp_path, recorded):
    _, trainer, callback = recorded
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state == callback.state_dict()
    other = StrideCallback(num_subsets=20, seed=5)
    other.load_state_dict(state)
    assert other.records == callback.records


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("steps", [4, 6], ids=["epoch's end", "mid-epoch"])
def test_resume(tmp_path, steps):
    def callbacks():
        keep = ModelCheckpoint(dirpath=tmp_path / "kept", every_n_train_steps=steps, save_top_k=-1, filename="{step}")
        return StrideCallback(tmp_path / "records", num_subsets=8, every_n_train_steps=2), keep

    first = callbacks()
    train(build(Classifier), DATA, tmp_path, *first, enable_checkpointing=True)
    stride, keep = callbacks()
    model = build(Classifier, seed=1)
    checkpoint = tmp_path / "kept" / f"step={steps}.ckpt"
    trainer = train(model, DATA, tmp_path, stride, keep, enable_checkpointing=True, max_epochs=3, ckpt_path=checkpoint)
    assert trainer.global_step == 12
    before = [path.name for path in first[0].records if int(path.name.split("=")[1]) <= steps]
    names = [path.name for path in stride.records]
    # What the checkpoint knew comes first; what is written again carries a version.
    later = [f"step={step}" for step in range(steps + 2, 13, 2)]
    assert names == before + [name + "-v1" * (name in ("step=6", "step=8")) for name in later]
    assert read_record(stride.records[-1]).info["weights"] == weight_hash(model)
    attribution = attribute(model, QUERIES, train_data=DATA, ckpt_path=checkpoint, **QUIET)
    assert attribution.metadata["record"].endswith(f"step={steps}")
    assert attribution.metadata["step"] == steps


def test_resume_at_the_end_writes_nothing_more(tmp_path):
    trainer = train(build(Classifier), DATA, tmp_path, StrideCallback(num_subsets=8))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    train(build(Classifier), DATA, tmp_path, StrideCallback(num_subsets=8), ckpt_path=tmp_path / "end.ckpt")
    assert [path.name for path in find_records(tmp_path / "stride")] == ["step=8"]


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
def test_operators_of_the_record_are_used_and_give_equal_scores(tmp_path, kind, data, queries):
    model = build(kind)
    train(model, data, tmp_path, StrideCallback(num_subsets=12, fit_operators=True))
    reused = attribute(model, queries, train_data=data, **QUIET)
    assert reused.metadata["operators"]["from_record"]
    assert reused.metadata["record"].endswith("step=8") or reused.metadata["record"].endswith("step=6")
    model.trainer = None
    fresh = attribute(model, queries, train_data=data, num_subsets=12, **QUIET)
    assert fresh.metadata["record"] is None
    torch.testing.assert_close(reused.scores, fresh.scores, rtol=1e-3, atol=1e-3 * fresh.scores.abs().max().item())


def test_operators_of_the_record_are_not_used_for_other_options(tmp_path):
    model = build(Classifier)
    train(model, DATA, tmp_path, StrideCallback(num_subsets=12, fit_operators=True))
    metadata = attribute(model, QUERIES, train_data=DATA, ridge=0.1, **QUIET).metadata
    assert metadata["record"] is not None
    assert not metadata["operators"]["from_record"]


def test_a_subclass_is_found_too(tmp_path):
    class Mine(StrideCallback):
        pass

    model = build(Classifier)
    trainer = train(model, DATA, tmp_path, Mine(num_subsets=8))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    asked = {"train_data": DATA, **QUIET}
    assert attribute(model, QUERIES, **asked).metadata["record"] is not None
    other = build(Classifier, seed=1)
    assert attribute(other, QUERIES, ckpt_path=tmp_path / "end.ckpt", **asked).metadata["record"] is not None


def test_train_indices_and_custom_samplers(tmp_path):
    chosen = list(range(0, NUM_TRAIN, 2))
    sampled = DataLoader(DATA, batch_size=8, sampler=SubsetRandomSampler(chosen))
    with pytest.raises(MisconfigurationException, match=r"SubsetRandomSampler.*`train_indices=`"):
        train(build(Classifier), sampled, tmp_path, StrideCallback())
    model, callback = build(Classifier), StrideCallback(num_subsets=8, train_indices=chosen)
    train(model, sampled, tmp_path, callback)
    assert read_record(callback.records[0]).tensors("losses")["train"].shape == (30,)
    attribution = attribute(model, QUERIES, train_data=DATA, train_indices=chosen, **QUIET)
    assert attribution.metadata["record"] == str(callback.records[0])
    assert attribution.train_indices.tolist() == chosen


@pytest.mark.parametrize(
    "sampler",
    [SubsetRandomSampler(range(10)), WeightedRandomSampler([1.0] * NUM_TRAIN, 10)],
    ids=["subset", "weighted"],
)
def test_a_sampler_inside_a_batch_sampler_is_seen(tmp_path, sampler):
    batches = DataLoader(DATA, batch_sampler=BatchSampler(sampler, 5, drop_last=False))
    with pytest.raises(MisconfigurationException, match=f"{type(sampler).__name__}.*`train_indices=`"):
        train(build(Classifier), batches, tmp_path, StrideCallback())


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
    with pytest.warns(UserWarning, match="Two reads"):
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
    attribution = attribute(model, QUERIES, train_data=DATA, **QUIET)
    assert attribution.metadata["operators"]["from_record"]
    assert torch.isfinite(attribution.scores).all()
    assert attribution.scores.dtype == torch.float32


def test_compiled_submodule(tmp_path):
    """The record is that of the plain model; the compiled graph still runs in training steps."""
    plain = build(Classifier)
    train(plain, DATA, tmp_path / "plain")
    model = build(Classifier)
    calls = []

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


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


class Bucketed(BatchSampler):
    pass


class NoForward(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


LOADERS = {
    "combined": (CombinedLoader([loader(DATA), loader(DATA)]), "one DataLoader over one map-style dataset"),
    "several": ([loader(DATA), loader(DATA)], "one DataLoader over one map-style dataset"),
    "generator": ([batch for batch in loader(DATA)], "one DataLoader over one map-style dataset"),
    "iterable": (DataLoader(Stream(), batch_size=4), "Stream.*map-style dataset with __getitem__ and __len__"),
    "unbatched": (DataLoader(DATA, batch_size=None), "batch_size=None.*Give it a batch_size"),
    "bucketed": (
        DataLoader(DATA, batch_sampler=Bucketed(SequentialSampler(DATA), 4, False)),
        "Bucketed.*`train_indices=`",
    ),
    "one example": (loader(Subset(DATA, [3])), "at least 2 training examples"),
    "soft labels": (loader(TensorDataset(DATA.tensors[0], torch.full((60, 3), 1 / 3))), "soft labels.*`task=`"),
    "dictionaries": (loader(Dicts(DATA)), "dict with keys.*`task=`"),
}


@pytest.mark.parametrize(("data", "message"), LOADERS.values(), ids=LOADERS.keys())
def test_data_that_cannot_work_are_refused(tmp_path, data, message):
    steps = []
    model = build(Classifier)
    model.training_step = lambda *args: steps.append(args)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, StrideCallback()).fit(model, data)
    assert steps == []
    assert hooks_of(model) == []


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_strategies_are_refused(tmp_path, name):
    trainer = make_trainer(tmp_path)
    strategy = type(name, (type(trainer.strategy),), {})(device="cpu")
    trainer = make_trainer(tmp_path, StrideCallback(), strategy=strategy)
    with pytest.raises(MisconfigurationException, match=f"{name} is not supported.*call attribute\\(\\) afterwards"):
        trainer.fit(build(Classifier), loader(DATA))
    assert trainer.global_step == 0


def test_no_forward(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"NoForward defines no `forward`.*`task=`"):
        train(NoForward(), DATA, tmp_path, StrideCallback())

    class Through(Classification):
        def outputs(self, model, inputs):
            return model.net(inputs)

    callback = StrideCallback(num_subsets=8, task=Through())
    train(NoForward(), DATA, tmp_path, callback)
    assert read_record(callback.records[0]).info["layers"] == ["net"]


def test_layers(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"'network\.9' is not a submodule.*'network\.0'"):
        train(build(Classifier), DATA, tmp_path, StrideCallback(layers=["network.9"]))

    class Idle(Classifier):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

    with pytest.raises(MisconfigurationException, match=r"\['unused'\] do not run"):
        train(build(Idle), DATA, tmp_path, StrideCallback(layers=["unused"]))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("every_n_epochs", 0),
        ("every_n_train_steps", -1),
        ("statistics_every_n_steps", 0),
        ("batch_size", 0),
        ("save_last_k", 0),
        ("save_last_k", -2),
    ],
)
def test_arguments(argument, value):
    with pytest.raises(MisconfigurationException, match=f"`{argument}` must be.*got {value}"):
        StrideCallback(**{argument: value})


def test_subset_numbers_that_make_no_design(tmp_path):
    with pytest.raises(MisconfigurationException, match="`num_subsets` must be an integer of at least 2, got 1"):
        train(build(Classifier), DATA, tmp_path, StrideCallback(num_subsets=1))


def test_diverged_weights_warn_and_write_nothing(tmp_path):
    with pytest.warns(UserWarning, match=r"no record at step .*example 0 has NaN in its .*did training diverge"):
        train(build(Classifier, lr=float("inf")), DATA, tmp_path, StrideCallback(num_subsets=8))
    assert find_records(tmp_path / "stride") == []


# ---- other ways in ----------------------------------------------------------------------------------------------


def test_custom_task_with_dictionaries(tmp_path):
    callback = StrideCallback(num_subsets=8, task=DictTask(), statistics_every_n_steps=1)
    model = build(DictClassifier)
    train(model, Dicts(DATA), tmp_path, callback)
    x, y = DATA.tensors
    with torch.no_grad():
        expected = F.cross_entropy(model(x), y, reduction="none")
    torch.testing.assert_close(read_record(callback.records[0]).tensors("losses")["train"], expected)


def test_pytorch_lightning_trainer(tmp_path):
    callback = StrideCallback(num_subsets=8, statistics_every_n_steps=1, fit_operators=True)
    model = fit_in_the_other_tree(callback, DATA, tmp_path)
    attribution = attribute(model, QUERIES, train_data=DATA, **QUIET)
    assert attribution.metadata["record"] == str(tmp_path / "stride" / "step=4")
    assert attribution.metadata["operators"]["from_record"]


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


def test_weights_that_changed_after_the_last_record_are_recorded(tmp_path):
    """As weight averaging does, which is listed before this callback: it swaps weights in at the end."""

    class Averaging(L.Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                for weight in pl_module.parameters():
                    weight.mul_(0.5)

    model, stride = build(Classifier), StrideCallback(num_subsets=8, every_n_epochs=1)
    trainer = make_trainer(tmp_path, Averaging(), stride, max_epochs=1)
    trainer.fit(model, loader(DATA))
    infos = [read_record(path).info for path in stride.records]
    assert len(infos) == 2
    assert infos[0]["weights"] != infos[1]["weights"] == weight_hash(model)


def test_only_some_examples_of_a_batch_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("stride_lightning.callbacks.stride.STATISTICS_EXAMPLES", 5)
    stride = StrideCallback(num_subsets=8, statistics_every_n_steps=1)
    train(build(Classifier), loader(DATA, batch_size=20), tmp_path, stride, max_epochs=1)
    assert read_record(stride.records[-1]).tensors("statistics")["0.count"] == 3 * 5
