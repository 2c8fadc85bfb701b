"""FurtherTrainingCallback on real Trainers."""

import copy
import csv
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from stride_lightning import (
    BinaryClassification,
    Classification,
    FurtherTraining,
    FurtherTrainingCallback,
    attribute,
    further_train,
)
from stride_lightning.model.weights import weight_hash
from stride_lightning.storage.records import find_records, read_record
from tests.helpers.models import (
    Classifier,
    ConvNet,
    Data,
    DictClassifier,
    Dicts,
    DictTask,
    Validated,
    build,
    classification_data,
    hooks_of,
    loader,
    make_trainer,
    picture_data,
    train,
)
from tests.helpers.processes import run_two, start
from tests.helpers.runs import callbacks_of, fit_in_the_other_tree, run_cli, write_config
from tests.retraining.further import SPREAD

DATA, QUERIES, LEFT_OUT = classification_data(), classification_data(5, seed=1), [12, 3, 30]
QUIET = {"show_progress": False}
SGD = partial(torch.optim.SGD, lr=0.1)


def callback(queries=QUERIES, **more):
    return FurtherTrainingCallback(queries, **({"left_out": LEFT_OUT, "num_seeds": 2} | more))


def expected(model, data=None, queries=QUERIES, **more):
    """What further_train() gives of the final weights."""
    how = {"left_out": LEFT_OUT, "num_seeds": 2, **QUIET}
    return further_train(model, queries, train_data=loader(DATA) if data is None else data, **(how | more))


# ---- the record and what is logged --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A finished run with two loggers: model, trainer, callback."""
    folder = tmp_path_factory.mktemp("run")
    loggers = [CSVLogger(folder), TensorBoardLogger(folder, name="board")]
    model, further = build(Classifier), callback(epochs=[2, 1], seed=5)
    trainer = train(model, DATA, folder, further, logger=loggers, log_every_n_steps=1)
    return model, trainer, further


def test_record_holds_the_effects_at_the_final_weights(recorded):
    model, trainer, further = recorded
    (path,) = find_records(f"{trainer.log_dir}/further-training")
    assert path.name == f"step={trainer.global_step}" == "step=8"
    assert further.records == [path]
    assert read_record(path).info["epoch"] == trainer.current_epoch
    saved, reference = FurtherTraining.load(path), expected(model, epochs=[1, 2], seed=5)
    assert saved.effects_by_seed.equal(reference.effects_by_seed)
    assert saved.effects_by_seed.equal(further.result.effects_by_seed)
    assert saved.effects().abs().max() > 1e-4
    assert (saved.left_out.tolist(), saved.epochs, saved.seeds) == (LEFT_OUT, [1, 2], [5, 6])
    assert (saved.metadata["step"], saved.metadata["batch_size"]) == (8, 16)
    for name in ("data", "query_data", "weights", "optimizer", "batch_size", "shuffle"):
        assert saved.metadata[name] == reference.metadata[name], name


def test_csv_logger_gets_sizes_of_effects_and_scalars_of_the_scores(recorded):
    _, trainer, further = recorded
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    logged = {key: (float(row[key]), int(row["step"])) for row in rows for key in row if row[key]}
    for epoch in (1, 2):
        values = {"effect_rms": further.result.effects(epoch), "std_error_rms": further.result.std_error(epoch)}
        for name, value in values.items():
            reference = value.square().mean().sqrt().item()
            assert logged[f"further-training/epochs={epoch}/{name}"] == (pytest.approx(reference), 8)
    scores = further.result.effects(2)
    assert logged["further-training/score_std"] == (pytest.approx(scores.std(correction=0).item()), 8)
    assert logged["further-training/positive_fraction"][0] == pytest.approx((scores > 0).float().mean().item())
    assert logged["further-training/seconds/total"][0] > 0
    assert all(row["loss"] for row in rows if int(row["step"]) in (1, 2))  # the user's own metrics are all there


def test_tensorboard_shows_scalars_and_the_table(recorded):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, trainer, further = recorded
    events = accumulator.EventAccumulator(trainer.loggers[1].log_dir).Reload()
    (event,) = events.Scalars("further-training/epochs=1/effect_rms")
    assert (event.step, event.value) == (8, pytest.approx(further.result.effects(1).square().mean().sqrt().item()))
    assert {"further-training/scores", "further-training/uncalibrated_std"} <= set(events.Tags()["histograms"])
    (text,) = events.Tensors("further-training/top_examples/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    best = LEFT_OUT[further.result.effects()[0].argmax()]
    assert f"| proponent | 1 | {best} |" in table


def test_one_seed_logs_no_error(tmp_path):
    further = callback(num_seeds=1)
    train(build(Classifier), DATA, tmp_path, further, logger=CSVLogger(tmp_path, name="t", version=0))
    text = (tmp_path / "t/version_0/metrics.csv").read_text()
    assert "further-training/epochs=1/effect_rms" in text
    assert "std_error_rms" not in text


def test_pictures_of_what_was_left_out(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pictures, drawn = picture_data(), []
    monkeypatch.setattr(
        "stride_lightning.views.loggers.plot_grid",
        lambda attribution, *args, **kwargs: drawn.append((attribution, args)),
    )
    further = callback(queries=picture_data(2, seed=3), left_out=[31, 2])
    train(build(ConvNet), pictures, tmp_path, further, logger=CSVLogger(tmp_path))
    ((attribution, _),) = drawn
    for column, position in enumerate([31, 2]):
        assert attribution.train_data[column][0].equal(pictures[position][0])
    assert attribution.queries[1][0].equal(picture_data(2, seed=3)[1][0])


def test_attribute_finds_it(recorded, monkeypatch):
    model, _, further = recorded
    monkeypatch.setattr("stride_lightning.retraining.attributors.measure_effects", None)
    scored = attribute(model, QUERIES, train_data=DATA, method="further-training", **QUIET)
    assert scored.scores.equal(further.result.effects())
    assert scored.metadata["record"] == str(further.records[0])


def test_by_default_a_hundred_examples_and_five_seeds(tmp_path):
    data = classification_data(130)
    further = FurtherTrainingCallback(Subset(QUERIES, [0]))
    train(build(Classifier), loader(data, 65), tmp_path, further)
    assert further.result.effects_by_seed.shape == (5, 1, 100, 1)
    few = FurtherTrainingCallback(Subset(QUERIES, [0]))
    train(build(Classifier), loader(Subset(data, range(9)), 9), tmp_path, few)
    assert few.result.left_out.tolist() == list(range(9))


# ---- batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "size"), [({}, 16), ({"accumulate_grad_batches": 3}, 48)])
def test_a_batch_is_what_one_optimizer_step_takes_in(tmp_path, options, size):
    model, further = build(Classifier), callback()
    train(model, DATA, tmp_path, further, **options)
    assert further.result.metadata["batch_size"] == size
    assert further.result.effects_by_seed.equal(expected(model, batch_size=size).effects_by_seed)


def test_order_and_size_are_those_of_the_loader_or_as_passed(tmp_path):
    model, further = build(Classifier), callback()
    sequential = DataLoader(DATA, 7, drop_last=True)
    train(model, sequential, tmp_path, further)
    metadata = further.result.metadata
    assert (metadata["batch_size"], metadata["shuffle"], metadata["drop_last"]) == (7, False, True)
    assert further.result.effects_by_seed.equal(expected(model, sequential).effects_by_seed)
    reference = callback(batch_size=5, optimizer=SGD)
    train(model, DATA, tmp_path, reference)
    assert reference.result.metadata["optimizer"] == repr(SGD(model.parameters()))
    assert reference.result.effects_by_seed.equal(expected(model, batch_size=5, optimizer=SGD).effects_by_seed)


def test_train_indices(tmp_path):
    chosen = [30, 4, 22, 9, 1, 16, 8, 3]
    sampled = DataLoader(DATA, 4, sampler=SubsetRandomSampler(chosen))
    model, further = build(Classifier), callback(left_out=[9, 30], train_indices=chosen)
    train(model, sampled, tmp_path, further)
    reference = TensorDataset(*(tensor[chosen] for tensor in DATA.tensors))
    assert further.result.left_out.tolist() == [9, 30]
    torch.testing.assert_close(
        further.result.effects(), expected(model, loader(reference, 4), left_out=[3, 0]).effects(), rtol=1e-4, atol=1e-6
    )
    scored = attribute(model, QUERIES, train_data=DATA, train_indices=chosen, method="further-training", **QUIET)
    assert scored.metadata["record"] == str(further.records[0])


def test_data_modules(tmp_path):
    """The queries of one that is not attached, and hooks that move a batch."""

    class Shifted(Data):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 3, batch[1]

    model, further = build(Validated), callback(queries=Shifted())
    make_trainer(tmp_path, further).fit(model, Shifted())
    data, held_out = Shifted(), Shifted()
    held_out.setup("test")
    x, y = held_out.held_out.tensors
    reference = expected(model, data, TensorDataset(x[:4], y[:4]))
    assert further.result.effects().shape == (4, 3)
    torch.testing.assert_close(further.result.effects(), reference.effects())


def test_a_task_of_ones_own(tmp_path):
    model, further = build(DictClassifier), callback(queries=Dicts(QUERIES), task=DictTask())
    train(model, Dicts(DATA), tmp_path, further)
    plain = build(Classifier)
    plain.load_state_dict(model.state_dict())
    assert further.result.effects().equal(expected(plain).effects())
    assert read_record(further.records[0]).info["task"] == "DictTask()"


# ---- state, resume, several ---------------------------------------------------------------------------------------


def test_further_training_that_diverges_only_warns(tmp_path, guarded):
    """And does not show the result of the last fit."""
    later = []

    class Later(L.Callback):
        def on_train_end(self, trainer, pl_module):
            later.append(weight_hash(pl_module))

    model, further = build(Classifier), callback(epochs=3)
    trainer = train(model, DATA, tmp_path, further, Later())
    assert further.result is not None
    further.optimizer, trainer.fit_loop.max_epochs = partial(torch.optim.SGD, lr=1e30), 4
    message = "FurtherTrainingCallback stopped at step 16; .*example 12 gave.*Lower the learning"
    with pytest.warns(UserWarning, match=message):
        trainer.fit(model, loader(DATA))
    assert further.result is None
    assert further.records == find_records(tmp_path / "further-training")
    assert len(further.records) == 1
    assert later[1] == weight_hash(model)


# ---- what is refused, before the first step -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 0}, "`num_seeds` must be an integer of at least 1, got 0"),
        ({"num_seeds": 2.5}, r"`num_seeds` must be an integer of at least 1, got 2\.5"),
        ({"epochs": True}, "`epochs` must be an integer of at least 1, got True"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, got 0"),
        ({"epochs": [1, 0]}, r"`epochs` must be an integer of at least 1, got 0"),
        ({"epochs": []}, r"`epochs` must be an integer or a list of at least one, got \[\]"),
        ({"epochs": 0.5}, r"`epochs` must be an integer of at least 1, got 0\.5"),
        ({"task": Classification}, "`task` must be an instance of Task, got the class Classification"),
        ({"queries": None}, "`queries` must be a Dataset, a DataLoader"),
        ({"optimizer": SGD(nn.Linear(1, 1).parameters())}, "got an instance of SGD"),
        ({"left_out": "abc"}, "`left_out` must be integer positions.*got 'abc'"),
        ({"left_out": []}, "`left_out` must name at least one example"),
        ({"memory_budget": 0}, "`memory_budget` must be an integer of at least 1, got 0"),
        ({"seed": -1}, "`seed` must be an integer of at least 0, got -1"),
        (
            {"train_indices": [0.5]},
            r"`train_indices` must be integer positions, at least one, got torch.float32 of shape \(1,\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_arguments(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        callback(**options)


class Newton(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class ByHand(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


class Weighted(Classifier):
    loss = staticmethod(partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 5.0])))


WITH_NAN = classification_data(80, seed=1)
WITH_NAN.tensors[0][70] = torch.nan


REFUSED = {
    "no position": ({"left_out": [3, 60]}, r"\[60\] are not among the 60 training examples"),
    "no labels": ({"queries": TensorDataset(QUERIES.tensors[0])}, "has no targets"),
    "other task": ({"task": BinaryClassification()}, r"Expected 3 target\(s\) per example"),
    "optimizer": ({"kind": Newton}, r"LBFGS computes the loss several times.*Pass `optimizer=`"),
    "NaN": ({"queries": WITH_NAN}, "Query 70 has NaN in its loss before any further"),
    "batches": (
        {"data": DataLoader(DATA, batch_sampler=[[0, 1], [2, 3]]), "train_indices": [0, 1, 2, 3], "left_out": [2]},
        "do not say their batch size.*or `batch_size=`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_training(tmp_path, name):
    options, message = REFUSED[name]
    options = {"data": loader(DATA), "kind": Classifier} | options
    data, kind = options.pop("data"), options.pop("kind")
    model, trainer = build(kind), make_trainer(tmp_path, callback(**options))
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.fit(model, data)
    assert trainer.global_step == 0
    assert hooks_of(model) == []


class Keeping(Classifier):
    def training_step(self, batch, batch_idx):
        self.kept = super().training_step(batch, batch_idx)
        return self.kept


def test_a_model_that_cannot_be_copied_at_the_end_only_warns(tmp_path, guarded):
    further = callback()
    with pytest.warns(UserWarning, match="FurtherTrainingCallback stopped at step 8; .*Keeping cannot be copied"):
        trainer = train(build(Keeping), DATA, tmp_path, further)
    assert trainer.state.finished
    assert (further.result, further.records) == (None, [])


def test_copies_read_what_the_trainer_of_the_original_says(tmp_path):
    class Reading(Classifier):
        def training_step(self, batch, batch_idx):
            return SPREAD(self(batch[0]), batch[1]) * self.trainer.accumulate_grad_batches

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)

    class Plain(Classifier):
        def training_step(self, batch, batch_idx):
            return SPREAD(self(batch[0]), batch[1]) * 2

    model, further = build(Reading), callback()
    trainer = train(model, DATA, tmp_path, further, accumulate_grad_batches=2)
    assert trainer.estimated_stepping_batches == 4
    plain = build(Plain)
    plain.load_state_dict(model.state_dict())
    known = expected(plain, loader(DATA, 32), optimizer=partial(torch.optim.SGD, lr=1 / 4))
    assert further.result.effects().equal(known.effects())
    assert model.trainer is trainer


def test_clipping_and_hooks_that_change_gradients_are_warned_of_once(tmp_path):
    class Hooked(Classifier):
        def on_after_backward(self):
            torch.nn.utils.clip_grad_value_(self.parameters(), 0.1)

    model, further = build(Hooked), callback()
    with pytest.warns(UserWarning, match="urther training does not") as seen:
        train(model, DATA, tmp_path, further, gradient_clip_val=0.5)
    texts = [str(one.message) for one in seen]
    assert sum("Hooked overrides on_after_backward. Further training does not call" in text for text in texts) == 1
    assert sum("clips gradients (gradient_clip_val=0.5). Further training does not" in text for text in texts) == 1
    plain = build(Classifier)
    plain.load_state_dict(model.state_dict())
    assert further.result.effects().equal(expected(plain).effects())


@pytest.mark.parametrize("precision", ["bf16-true", "32-true", "64-true"])
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, SPREAD], ids=["likelihood", "own loss"])
def test_precision(tmp_path, precision, loss_fn):
    class Smoothed(Classifier):
        loss = staticmethod(loss_fn)

    model, further = build(Smoothed), callback(left_out=[12, 3])
    train(model, DATA, tmp_path, further, precision=precision)
    assert further.result.effects_by_seed.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    if precision != "bf16-true":
        assert ("own loss" in str(further.result.metadata["one_by_one_because"])) is (loss_fn is SPREAD)
    single = build(Smoothed)
    single.load_state_dict(model.state_dict())
    reference = expected(single, left_out=[12, 3])
    rough = {"bf16-true": 0.1, "32-true": 0.0, "64-true": 1e-3}[precision]
    torch.testing.assert_close(further.result.effects(), reference.effects(), rtol=rough, atol=rough / 10)


# ---- two processes ----------------------------------------------------------------------------------------------


def fit_on_two(number, port, folder):
    """An uneven number of chunks, BatchNorm whose statistics differ, and a question of both ranks."""
    start(number, port)
    pictures, queries = picture_data(), picture_data(3, seed=5)
    further = callback(dirpath=folder / "records", queries=queries, left_out=[7, 2, 31], num_seeds=3, memory_budget=1)
    model = build(ConvNet)
    trainer = make_trainer(folder, further, strategy="ddp", devices=2, logger=CSVLogger(folder), log_every_n_steps=1)
    trainer.fit(model, loader(pictures, batch_size=4))
    results = {"records": list(map(str, further.records)), "state": copy.deepcopy(model.state_dict())}
    results["effects"], results["size"] = further.result.effects_by_seed, further.result.metadata["batch_size"]
    arguments = {"train_data": loader(pictures, 8), "method": "further-training", **QUIET}
    scored = attribute(model, queries, **arguments)
    results["found"], results["record"] = scored.scores, scored.metadata["record"]
    if number == 1:  # as on a node with a disk of its own
        further.dirpath = folder / "nowhere"
    alone = attribute(model, queries, left_out=[7, 2, 31], num_seeds=3, **arguments)
    results["alone"], results["note"] = alone.scores, alone.metadata["record_note"]
    torch.set_num_threads(1 + number)  # ranks that would cut the work otherwise
    how = {"train_data": loader(pictures, 8), "left_out": [7, 2, 31], "num_seeds": 2, **QUIET}
    for name in ("first", "again"):
        result = further_train(model, queries, path=folder / "effects", **how)
        results[name] = result.effects_by_seed
    results["in memory"] = further_train(model, queries, **how).effects_by_seed
    results["saved"] = [str(result.save(folder / "saved")) for _ in range(2)]
    torch.save(results, folder / f"rank{number}.pt")


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(tmp_path):
    first, second = run_two(fit_on_two, tmp_path)
    (path,) = find_records(tmp_path / "records")
    assert (first["records"], second["records"]) == ([str(path)], [])
    assert first["size"] == second["size"] == 8  # over both
    differing = [name for name, value in first["state"].items() if not value.equal(second["state"][name])]
    assert all("running" in name for name in differing)
    assert differing
    for key in ("effects", "found", "alone", "first", "again", "in memory"):
        assert first[key].equal(second[key]), key
    assert first["record"] == second["record"] == str(path)
    assert "the ranks have different records" in first["note"]
    assert first["saved"] == second["saved"] == [str(tmp_path / "saved"), str(tmp_path / "saved-v1")]
    model = build(ConvNet)
    model.load_state_dict(first["state"])
    assert read_record(path).info["weights"] == weight_hash(model)
    how = {"left_out": [7, 2, 31], "num_seeds": 3}
    reference = expected(model, loader(picture_data(), 8), picture_data(3, seed=5), **how)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-6)
    assert reference.effects_by_seed.abs().max() > 1e-4
    close(first["effects"], reference.effects_by_seed)
    close(FurtherTraining.load(path).effects_by_seed, reference.effects_by_seed)
    close(first["found"], reference.effects())
    close(first["alone"], reference.effects())
    for key in ("first", "again", "in memory"):
        close(first[key], reference.effects_by_seed[:2])
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert logged.count("further-training/epochs=1/effect_rms") == 1


# ---- the command line ---------------------------------------------------------------------------------------------


CALLBACK = """
- class_path: stride_lightning.FurtherTrainingCallback
  init_args:
    queries:
      class_path: tests.helpers.models.Data
    left_out: [3, 1]
    epochs: [1, 2]
    num_seeds: 2
    optimizer:
      class_path: torch.optim.SGD
      init_args:
        lr: 0.05
"""


def test_yaml(tmp_path, monkeypatch):
    config = write_config(tmp_path, CALLBACK)
    (further,) = callbacks_of(run_cli(monkeypatch, tmp_path, "fit", "--config", config), FurtherTrainingCallback)
    result = FurtherTraining.load(tmp_path / "further-training" / "step=4")
    assert (result.left_out.tolist(), result.epochs, len(result.seeds)) == ([3, 1], [1, 2], 2)
    assert result.effects().shape == (4, 2)
    assert "lr: 0.05" in result.metadata["optimizer"]
    assert further.result.effects().equal(result.effects())


def test_pytorch_lightning_trainer(tmp_path):
    further = callback(optimizer=SGD)
    model = fit_in_the_other_tree(further, DATA, tmp_path)
    assert further.result.effects().equal(expected(model, optimizer=SGD).effects())
