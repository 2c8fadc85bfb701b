"""TracInCallback on real Trainers."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from stride_lightning import Classification, StrideCallback, attribute
from stride_lightning.callbacks.tracin import TracInCallback
from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import fingerprint_of
from stride_lightning.model.weights import weight_hash
from stride_lightning.storage.records import find_records, read_info, read_record, write_record
from tests.helpers.models import (
    Classifier,
    ConvNet,
    build,
    classification_data,
    loader,
    make_trainer,
    picture_data,
    train,
)
from tests.helpers.processes import run_two, start
from tests.helpers.runs import callbacks_of, run_cli, write_config
from tests.helpers.schedules import OneCycle, Stepped, TensorRate, TwoGroups, TwoOptimizers, by_hand

DATA = classification_data()
IN_ORDER = loader(DATA, shuffle=False)
NAMES = ["network.0.bias", "network.0.weight", "network.2.bias", "network.2.weight"]


def info_of(callback):
    return [read_info(path) for path in callback.records]


def steps_of(callback):
    return [info["step"] for info in info_of(callback)]


def names_in(folder):
    return [path.name for path in find_records(folder)]


def trajectory_of(path):
    return [entry["name"] for entry in read_info(path)["trajectory"]]


# ---- weights and learning rates, against training by hand -----------------------------------------------------------


@pytest.mark.parametrize("kind", [Classifier, Stepped, OneCycle, TwoGroups, TensorRate])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_and_rates_are_those_of_training_by_hand(tmp_path, kind, accumulate):
    callback = TracInCallback(every_n_train_steps=1)
    train(build(kind), IN_ORDER, tmp_path, callback, accumulate_grad_batches=accumulate)
    states, rates = by_hand(build(kind), DATA, accumulate=accumulate)
    assert steps_of(callback) == list(range(1, len(states) + 1))
    assert kind is Classifier or len({tuple(of_step.values()) for of_step in rates}) > 1
    for path, state, of_step in zip(callback.records, states, rates, strict=True):
        record = read_record(path)
        assert record.groups == ("weights",)
        saved = record.tensors("weights")
        assert sorted(saved) == NAMES
        for name in NAMES:
            torch.testing.assert_close(saved[name], state[name], rtol=0, atol=1e-6)
        assert record.info["learning_rates"] == of_step


def test_two_optimizers(tmp_path):
    """Two steps a batch; records at 2, 4 and 6 where every third is asked for: the first seen past 3 is 4."""
    for every, steps in ((1, [2, 4, 6, 8]), (3, [4, 6, 8])):
        callback = TracInCallback(tmp_path / str(every), every_n_train_steps=every)
        train(build(TwoOptimizers), IN_ORDER, tmp_path, callback, max_epochs=1)
        assert steps_of(callback) == steps
        states, rates = by_hand(build(TwoOptimizers), DATA, epochs=1)
        for path, info in zip(callback.records, info_of(callback), strict=True):
            assert info["learning_rates"] == rates[info["step"] - 1]
            saved = read_record(path).tensors("weights")
            torch.testing.assert_close(saved, states[info["step"] - 1], rtol=0, atol=1e-6)
    assert info_of(callback)[-1]["learning_rates"]["network.2.bias"] == 0.01 * 0.5**3


def test_rates_set_late_and_bare_optimizers(tmp_path):
    """Hooks of the module that run after callbacks, and steps that Lightning does not see."""

    class Late(Classifier):
        def on_before_optimizer_step(self, optimizer):
            optimizer.param_groups[0]["lr"] = 0.5 / (self.global_step + 1)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.optimizers().param_groups[0]["lr"] = 7.0

    class Bare(TwoOptimizers):
        def optimizers(self):
            return super().optimizers(use_pl_optimizer=False)

    callback = TracInCallback(every_n_train_steps=1)
    train(build(Late), DATA, tmp_path, callback, max_epochs=1)
    assert [info["learning_rates"]["network.0.bias"] for info in info_of(callback)] == [0.5, 0.25, 0.5 / 3, 0.125]
    bare = TracInCallback(tmp_path / "bare")
    train(build(Bare), IN_ORDER, tmp_path, bare, max_epochs=1)
    assert info_of(bare)[0]["learning_rates"] == by_hand(build(TwoOptimizers), DATA, epochs=1)[1][-1]


def test_only_trainable_parameters_that_an_optimizer_holds_have_rates(tmp_path):
    class Partly(Classifier):
        def configure_optimizers(self):
            self.network[0].bias.requires_grad_(False)
            return torch.optim.SGD([*self.network[0].parameters(), self.network[2].weight], lr=0.3)

    class Unfrozen(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network[2].parameters(), lr=0.1)

        def on_train_epoch_end(self):
            self.optimizers().add_param_group({"params": self.network[0].parameters(), "lr": 0.7})

    callback = TracInCallback()
    train(build(Partly), DATA, tmp_path, callback)
    assert info_of(callback)[0]["learning_rates"] == {"network.0.weight": 0.3, "network.2.weight": 0.3}
    assert sorted(read_record(callback.records[0]).tensors("weights")) == NAMES[1:]
    assert list(info_of(callback)[0]["frozen"]["digests"]) == NAMES[:1]
    later = TracInCallback(tmp_path / "later", every_n_train_steps=100)  # the end, right after a group is added
    train(build(Unfrozen), DATA, tmp_path, later, max_epochs=1)
    rates = info_of(later)[0]["learning_rates"]
    assert (rates["network.2.weight"], rates["network.0.weight"]) == (0.1, 0.7)


def test_buffers_are_saved_and_compiled_names_are_plain(tmp_path):
    model, callback = build(ConvNet), TracInCallback()
    model.network[0] = torch.compile(model.network[0], backend=lambda graph, inputs: graph.forward)
    train(model, picture_data(), tmp_path, callback, max_epochs=1)
    record = read_record(callback.records[0])
    saved = record.tensors("weights")
    assert sorted(saved) == sorted(build(ConvNet).state_dict())
    assert saved["network.1.running_var"].equal(model.network[1].running_var)
    assert saved["network.0.weight"].equal(model.network[0].weight)
    assert set(record.info["learning_rates"]) == {name for name, _ in build(ConvNet).named_parameters()}
    assert record.info["weights"] == weight_hash(model)


# ---- the record -----------------------------------------------------------------------------------------------------


def test_record_names_what_it_is_of(tmp_path, monkeypatch):
    reads = []
    read = Examples.batches
    monkeypatch.setattr(Examples, "batches", lambda self, *args: reads.append(args[0]) or read(self, *args))
    callback = TracInCallback()
    trainer = train(build(Classifier), DATA, tmp_path, callback, logger=CSVLogger(tmp_path), max_epochs=3)
    assert callback.records == find_records(f"{trainer.log_dir}/tracin")
    assert [path.name for path in callback.records] == ["step=4", "step=8", "step=12"]
    infos = info_of(callback)
    last = infos[-1]
    assert [info["epoch"] for info in infos] == [0, 1, 2]
    assert last["trajectory"] == [{"name": f"step={step}", "step": step} for step in (4, 8, 12)]
    assert infos[0]["trajectory"] == last["trajectory"][:1]
    assert {"torch", "lightning", "stride-lightning"} <= last["versions"].keys()
    assert len({info["run"] for info in infos}) == 1
    assert last["data"] == fingerprint_of(Examples(DATA))
    # By the callback, once; by the line above.
    assert reads == [1024, 1024]


def test_rates_reach_every_logger(tmp_path):
    def logged(kind):
        loggers = [CSVLogger(tmp_path, name=f"{kind.__name__}{number}") for number in range(2)]
        train(build(kind), IN_ORDER, tmp_path, TracInCallback(tmp_path / kind.__name__), logger=loggers)
        one, other = ([], [])
        for logger, rates in zip(loggers, (one, other), strict=True):
            with open(f"{logger.log_dir}/metrics.csv") as file:
                for row in csv.DictReader(file):
                    of_step = {key: float(value) for key, value in row.items() if value and "tracin" in key}
                    if of_step:
                        rates.append((int(row["step"]), of_step))
        assert one == other
        return one

    assert logged(Stepped) == [(4, {"tracin/learning_rate": 0.1}), (8, {"tracin/learning_rate": 0.05})]
    step, rates = logged(TwoGroups)[0]  # the fourth step is the first after the schedule's
    assert step == 4
    assert rates == pytest.approx({"tracin/learning_rate/0": 0.001, "tracin/learning_rate/1": 0.02})


# ---- when records are written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [4, 8, 12, 16, 20]),
        ({"every_n_epochs": 2}, [8, 16, 20]),
        ({"every_n_train_steps": 8}, [8, 16, 20]),
        ({"every_n_train_steps": 8, "every_n_epochs": 2}, [8, 16, 20]),
        ({"every_n_train_steps": 7, "every_n_epochs": 3}, [7, 12, 14, 20]),
        ({"every_n_epochs": 100}, [20]),
        ({"save_last_k": 2}, [16, 20]),
        ({"save_last_k": 3}, [12, 16, 20]),
    ],
)
def test_steps(tmp_path, options, steps):
    callback = TracInCallback(**options)
    train(build(Classifier), DATA, tmp_path, callback, max_epochs=5)
    assert steps_of(callback) == steps
    assert callback.records == find_records(tmp_path / "tracin")
    assert trajectory_of(callback.records[-1]) == [f"step={step}" for step in steps]
    if options == {"save_last_k": 3}:  # each knows those that were kept beside it
        assert trajectory_of(callback.records[0]) == ["step=4", "step=8", "step=12"]
    assert len({info["weights"] for info in info_of(callback)}) == len(steps)


def test_the_end_is_recorded_again_if_averaging_changed_the_weights(tmp_path):
    model, callback = build(Classifier), TracInCallback()
    train(model, DATA, tmp_path, WeightAveraging(use_buffers=False), callback)
    assert [path.name for path in callback.records] == ["step=4", "step=8-v1"]
    assert trajectory_of(callback.records[-1]) == ["step=4", "step=8-v1"]  # averages stand for the step's own weights
    assert info_of(callback)[-1]["weights"] == weight_hash(model)


def test_a_stop_in_the_middle_is_recorded_and_an_exception_is_not(tmp_path):
    callback = TracInCallback(every_n_epochs=1)
    train(build(Classifier), DATA, tmp_path, callback, max_steps=6, max_epochs=-1)
    assert steps_of(callback) == [4, 6]

    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step == 6:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    model, callback = build(Failing), TracInCallback(tmp_path / "failed")
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, DATA, tmp_path, callback)
    assert names_in(tmp_path / "failed") == ["step=4"]
    assert not model.optimizers().optimizer._optimizer_step_post_hooks


def test_diverged_weights_are_not_recorded_but_masks_of_minus_infinity_are(tmp_path, guarded):
    class Diverging(Classifier):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((2,), -torch.inf))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 6:
                self.network[0].weight.data[0, 0] = torch.nan

    callback = TracInCallback()
    with pytest.warns(
        UserWarning, match=r"TracInCallback stopped at step 8; .*Weights or learning rates are not finite"
    ):
        train(build(Diverging), DATA, tmp_path, callback)
    assert steps_of(callback) == [4]


def test_second_fit_goes_on_and_another_trainer_begins_anew(tmp_path):
    model, callback = build(Stepped), TracInCallback(tmp_path / "records")
    trainer = train(model, DATA, tmp_path, callback)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, loader(DATA))
    assert trajectory_of(callback.records[-1]) == ["step=4", "step=8", "step=12"]
    run = read_info(callback.records[0])["run"]
    train(build(Classifier, seed=1), DATA, tmp_path, callback)
    assert [path.name for path in callback.records] == ["step=4-v1", "step=8-v1"]
    assert trajectory_of(callback.records[-1]) == ["step=4-v1", "step=8-v1"]
    assert read_info(callback.records[0])["run"] != run


# ---- two processes ----------------------------------------------------------------------------------------------


def fit_on_two(number, port, folder):
    start(number, port)
    results = {}
    for name, saved in {"first": None, "resumed": folder / "end.ckpt"}.items():
        callback = TracInCallback(folder / "records", every_n_train_steps=2)
        model = build(ConvNet)
        trainer = make_trainer(folder, callback, strategy="ddp", devices=2, max_epochs=2 + (saved is not None))
        trainer.fit(model, loader(picture_data(), batch_size=8), ckpt_path=saved)
        results[name] = {"hash": weight_hash(model), "state": callback.state_dict(), "steps": trainer.global_step}
        trainer.save_checkpoint(folder / "end.ckpt")
    torch.save(results, folder / f"rank{number}.pt")


@pytest.mark.distributed
def test_rank_zero_writes_and_all_know(tmp_path):
    first, second = run_two(fit_on_two, tmp_path)
    for name, steps in {"first": [2, 4, 6], "resumed": [2, 4, 6, 8, 9]}.items():
        here, there = first[name], second[name]
        assert here["hash"] != there["hash"]  # statistics of BatchNorm differ
        assert here["state"] == there["state"]
        infos = [read_info(path) for path in here["state"]["records"]]
        assert [info["step"] for info in infos] == steps
        assert here["steps"] == steps[-1]
        assert infos[-1]["weights"] == here["hash"]
        assert {info["run"] for info in infos} == {here["state"]["run"]}
    assert first["resumed"]["state"]["records"] == [str(path) for path in find_records(tmp_path / "records")]


# ---- what is refused, before the first step -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "`every_n_epochs` must be an integer of at least 1, got 0"),
        ({"every_n_train_steps": 0.5}, "`every_n_train_steps` must be an integer of at least 1, got 0.5"),
        ({"save_last_k": 0}, r"`save_last_k` must be -1 \(keep all\) or positive, got 0"),
        ({"save_last_k": -2}, "`save_last_k` must be -1"),
        ({"task": Classification}, "task"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(MisconfigurationException, match=message):
        TracInCallback(**options)


def test_optimizers_that_cannot_work(tmp_path):
    class NoOptimizer(Classifier):
        def configure_optimizers(self):
            return None

    class NoRate(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            del optimizer.param_groups[0]["lr"]
            return optimizer

    class Own:
        """All that Lightning asks of an optimizer."""

        def __init__(self, inner):
            names = "param_groups", "defaults", "state", "state_dict", "load_state_dict", "step", "zero_grad"
            vars(self).update({name: getattr(inner, name) for name in names})

    class Foreign(Classifier):
        def configure_optimizers(self):
            return Own(super().configure_optimizers())

    with pytest.raises(TypeError, match=r"must be torch\.optim\.Optimizer, got Own"):
        train(build(Foreign), DATA, tmp_path, TracInCallback())
    with pytest.raises(ValueError, match=r"A parameter group of SGD has no 'lr'\. TracIn needs"):
        train(build(NoRate), DATA, tmp_path, TracInCallback())
    with (
        pytest.warns(UserWarning, match="`LightningModule.configure_optimizers` returned `None`"),
        pytest.raises(ValueError, match="no optimizer, so there are no learning rates"),
    ):
        train(build(NoOptimizer), DATA, tmp_path, TracInCallback())
    assert not (tmp_path / "tracin").exists()


# ---- beside others ------------------------------------------------------------------------------------------------


def test_other_things_in_the_folder(tmp_path):
    folder = tmp_path / "records"
    write_record(folder, "step=4", {"kind": "stride", "weights": "w"}, {})
    (folder / "step=8").mkdir()
    callback = TracInCallback(folder)
    train(build(Classifier), DATA, tmp_path, callback)
    assert [path.name for path in callback.records] == ["step=4-v1", "step=8-v1"]


CALLBACK = """
- class_path: stride_lightning.callbacks.tracin.TracInCallback
  init_args:
    every_n_train_steps: 3
    save_last_k: 2
    task:
      class_path: stride_lightning.Classification
"""


def test_yaml(tmp_path, monkeypatch):
    config = write_config(tmp_path, CALLBACK)
    (callback,) = callbacks_of(run_cli(monkeypatch, tmp_path, "fit", "--config", config), TracInCallback)
    assert callback.every_n_epochs is None
    assert steps_of(callback) == [3, 4]


def test_records_of_other_training_data_are_refused(tmp_path):
    model = build(Classifier)
    train(model, DATA, tmp_path, TracInCallback())
    with pytest.raises(ValueError, match=r"(?s)made with other training data\..*random_split given no seed"):
        attribute(model, DATA, train_data=classification_data(seed=1), method="tracin", show_progress=False)


def test_steps_that_a_grad_scaler_skips_are_none(tmp_path):
    """Gradients of half precision overflow until the scale has come down."""

    def fit(*callbacks):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=10)
        mixed = MixedPrecision("16-mixed", "cpu", scaler)
        model = build(Classifier)
        return model, train(model, DATA, tmp_path, *callbacks, plugins=[mixed]), scaler

    bare, *_ = fit()
    callback, stride = TracInCallback(every_n_train_steps=1), StrideCallback(num_subsets=6)
    model, trainer, scaler = fit(callback, stride)
    assert weight_hash(model) == weight_hash(bare)
    assert scaler.get_scale() < 2.0**20
    infos = [read_info(path) for path in callback.records]
    assert 0 < len(infos) < trainer.global_step
    assert len({info["weights"] for info in infos}) == len(infos)
    assert infos[-1]["weights"] == read_info(stride.records[-1])["weights"] == weight_hash(model)
    assert {value.dtype for value in read_record(callback.records[-1]).tensors("weights").values()} == {torch.float32}
