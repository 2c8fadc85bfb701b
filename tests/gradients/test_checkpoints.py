"""Which checkpoints are read, in which order, with which learning rates; and what is refused."""

import re
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import StepLR

from stride_lightning import StrideCallback, attribute
from stride_lightning.callbacks.tracin import TracInCallback
from stride_lightning.gradients.checkpoints import read_checkpoints, tracin_checkpoints
from stride_lightning.model.weights import weight_hash
from stride_lightning.storage.records import RecordError, find_records, read_info, read_record, write_record
from tests.helpers.models import Classifier, ConvNet, build, classification_data, loader, make_trainer, train
from tests.helpers.schedules import Stepped, TwoGroups, TwoOptimizers, by_hand

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
DATA = classification_data()
IN_ORDER = loader(DATA, shuffle=False)
NAMES = ["network.0.weight", "network.0.bias", "network.2.weight", "network.2.bias"]


def keeping(folder, **options):
    return ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the records and the plain checkpoints of one fit of 8 steps, and the model."""
    folder, model = tmp_path_factory.mktemp("run"), build(TwoGroups)
    callbacks = TracInCallback(folder / "records", every_n_train_steps=2), keeping(folder / "files", filename="{step}")
    train(model, IN_ORDER, folder, *callbacks, enable_checkpointing=True)
    return folder, model


def save(path, **content):
    torch.save({"state_dict": build(Classifier).state_dict(), **content}, path)
    return path


def stored(optimizer):
    return {"optimizer_states": [optimizer.state_dict()]}


def steps(checkpoints):
    return [checkpoint.step for checkpoint in checkpoints]


def names_in(folder, model):
    return [checkpoint.name for checkpoint in read_checkpoints(folder, model)]


# ---- records ------------------------------------------------------------------------------------------------------


def test_a_folder_of_records_is_one_runs_trajectory(run):
    folder, model = run
    checkpoints = read_checkpoints(folder / "records", model)
    assert [checkpoint.name for checkpoint in checkpoints] == ["step=2", "step=4", "step=6", "step=8"]
    assert [checkpoint.path for checkpoint in checkpoints] == find_records(folder / "records")
    states, rates = by_hand(build(TwoGroups), DATA)
    for checkpoint in checkpoints:
        assert checkpoint.learning_rates == rates[checkpoint.step - 1]
        torch.testing.assert_close(checkpoint.load(), dict(sorted(states[checkpoint.step - 1].items())))


def test_one_record_and_a_list(run):
    folder, model = run
    records = folder / "records"
    assert steps(read_checkpoints(records / "step=4", model)) == [4]
    assert steps(read_checkpoints(str(records / "step=4"), model)) == [4]
    chosen = [records / "step=6", str(records / "step=2"), records / "step=6"]
    assert steps(read_checkpoints(chosen, model)) == steps(read_checkpoints(tuple(chosen), model)) == [2, 6]
    both = names_in([records, folder / "files" / "step=2.ckpt"], model)
    assert both == ["step=2", "step=4", "step=6", "step=8"]


def test_the_run_of_the_models_weights_else_the_newest(tmp_path):
    models = []
    for seed in (0, 1):
        models.append(build(Classifier, seed=seed))
        train(models[-1], IN_ORDER, tmp_path, TracInCallback(tmp_path / "records"), max_epochs=2 + seed)
    names = [names_in(tmp_path / "records", model) for model in (*models, build(Classifier, seed=2))]
    assert names == [["step=4", "step=8"], *[["step=4-v1", "step=8-v1", "step=12"]] * 2]


def test_records_of_an_abandoned_path_are_not_used(tmp_path):
    """Resumed with another order of the data from step 4, so that steps 6 and 8 are trained twice."""
    options = {"enable_checkpointing": True}

    def callbacks():
        plain = keeping(tmp_path / "files", filename="{step}")
        return TracInCallback(tmp_path / "records", every_n_train_steps=2), plain

    abandoned, model = build(Classifier), build(Classifier)
    train(abandoned, IN_ORDER, tmp_path, *callbacks(), **options)
    saved = tmp_path / "files" / "step=4.ckpt"
    train(model, loader(DATA), tmp_path, *callbacks(), ckpt_path=saved, max_epochs=-1, max_steps=6, **options)
    first = build(Classifier)
    first.load_state_dict(read_record(tmp_path / "records/step=4").tensors("weights"))
    assert names_in(tmp_path / "records", abandoned) == ["step=2", "step=4", "step=6", "step=8"]
    for on_the_path in (model, first):
        assert names_in(tmp_path / "records", on_the_path) == ["step=2", "step=4", "step=6-v1"]


def test_moved_renamed_and_removed_records(run, tmp_path):
    folder, model = run
    shutil.copytree(folder / "records", tmp_path / "copy")
    (tmp_path / "copy/step=8").rename(tmp_path / "copy/last")
    checkpoints = read_checkpoints(tmp_path / "copy", model)
    assert [checkpoint.path.name for checkpoint in checkpoints] == ["step=2", "step=4", "step=6", "last"]
    assert {checkpoint.path.parent for checkpoint in checkpoints} == {tmp_path / "copy"}
    shutil.rmtree(tmp_path / "copy/step=4")
    with pytest.warns(UserWarning, match=r"1 of the 4 records of this run no longer exist .*copy/step=4\. If they"):
        assert steps(read_checkpoints(tmp_path / "copy", model)) == [2, 6, 8]


def test_a_model_with_state_that_is_no_tensor(tmp_path):
    class WithExtra(Classifier):
        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            assert state == {"seen": 3}

    model = build(WithExtra)
    train(model, IN_ORDER, tmp_path, TracInCallback(tmp_path / "records"))
    assert steps(read_checkpoints(tmp_path / "records", model)) == [4, 8]


# ---- plain files --------------------------------------------------------------------------------------------------


def test_a_folder_of_plain_checkpoints(run):
    folder, model = run
    checkpoints = read_checkpoints(folder / "files", model)
    assert [checkpoint.name for checkpoint in checkpoints] == [f"step={step}.ckpt" for step in (2, 4, 6, 8)]
    states, _ = by_hand(build(TwoGroups), DATA)
    for checkpoint in checkpoints:
        # Saved after the schedule's step, which comes after every third optimizer step.
        factor = 0.1 ** (checkpoint.step // 3)
        expected = {name: (0.01 if "network.2" in name else 0.2) * factor for name in NAMES}
        assert checkpoint.learning_rates == pytest.approx(expected)
        for name, value in checkpoint.load().items():
            torch.testing.assert_close(value, states[checkpoint.step - 1][name])


def test_last_ckpt_counts_once(tmp_path):
    keep = keeping(tmp_path / "files", save_last=True)
    train(build(Stepped), IN_ORDER, tmp_path, keep, enable_checkpointing=True)
    assert (tmp_path / "files/last.ckpt").exists()
    checkpoints = read_checkpoints(tmp_path / "files", build(Stepped))
    assert [checkpoint.name for checkpoint in checkpoints] == [
        f"epoch={epoch}-step={step}.ckpt" for epoch, step in ((0, 2), (0, 4), (1, 6), (1, 8))
    ]
    assert [set(checkpoint.learning_rates.values()) for checkpoint in checkpoints] == [{0.1}, {0.05}, {0.05}, {0.025}]
    # Other weights at the same step are another checkpoint.
    averaged = {name: value + 1 for name, value in build(Stepped).state_dict().items()}
    torch.save({"state_dict": averaged, "global_step": 8}, tmp_path / "files/averaged.ckpt")
    assert steps(read_checkpoints(tmp_path / "files", build(Stepped))) == [2, 4, 6, 8, 8]


def test_state_dicts_tell_neither_step_nor_rates(tmp_path):
    for name in ("epoch10.pt", "epoch9.pth"):
        torch.save(build(Classifier).state_dict(), tmp_path / name)
    save(tmp_path / "z.ckpt", global_step=3)
    (tmp_path / "notes.txt").write_text("not one of them")
    checkpoints = read_checkpoints(tmp_path, build(Classifier))
    assert [(c.name, c.step, c.learning_rates) for c in checkpoints] == [
        ("z.ckpt", 3, None),
        ("epoch9.pth", None, None),
        ("epoch10.pt", None, None),
    ]
    assert checkpoints[2].load()["network.0.bias"].equal(build(Classifier).network[0].bias)


def test_compiled_names(tmp_path):
    model = build(Classifier)
    torch.save({f"_orig_mod.{name}": value for name, value in model.state_dict().items()}, tmp_path / "a.pt")
    assert len(read_checkpoints(tmp_path / "a.pt", model)) == 1


# ---- learning rates of plain files --------------------------------------------------------------------------------


def rates_of(path, model):
    return read_checkpoints(path, model)[0].learning_rates


def test_one_rate_is_that_of_every_trainable_parameter(tmp_path):
    model = build(Classifier)
    model.network[0].bias.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    path = save(tmp_path / "a.ckpt", **stored(torch.optim.AdamW(trained, lr=torch.tensor(0.25))))
    assert rates_of(path, model) == dict.fromkeys([NAMES[0], *NAMES[2:]], 0.25)


def test_names_that_torch_stores(tmp_path):
    named = list(build(Classifier).named_parameters())
    groups = [{"params": named[2:], "lr": 0.3}, {"params": named[:1], "lr": 0.1}]
    path = save(tmp_path / "a.ckpt", **stored(torch.optim.SGD(groups)))
    assert rates_of(path, build(Classifier)) == {NAMES[2]: 0.3, NAMES[3]: 0.3, NAMES[0]: 0.1}


def test_names_of_a_part_are_not_the_models(tmp_path):
    class Part(Classifier):
        def configure_optimizers(self):
            head, body = (list(self.network[i].named_parameters()) for i in (2, 0))
            return torch.optim.SGD([{"params": head, "lr": 0.3}, {"params": body}], lr=0.1)

    path = save(tmp_path / "a.ckpt", **stored(build(Part).configure_optimizers()))
    assert rates_of(path, build(Part)) == {name: 0.1 if "0" in name else 0.3 for name in NAMES}


@pytest.mark.parametrize("form", ["optimizer", "list", "tuple of lists", "dict", "list of dicts"])
def test_groups_are_told_by_configure_optimizers(tmp_path, form):
    class Configured(Classifier):
        def configure_optimizers(self):
            groups = [{"params": [self.network[0].bias, self.network[2].weight], "lr": 9.0}, {"params": self.rest()}]
            optimizer = torch.optim.SGD(groups, lr=8.0)
            torch.rand(1)
            return {
                "optimizer": optimizer,
                "list": [optimizer],
                "tuple of lists": ([optimizer], [StepLR(optimizer, 1)]),
                "dict": {"optimizer": optimizer},
                "list of dicts": [{"optimizer": optimizer}],
            }[form]

        def rest(self):
            return [self.network[0].weight, self.network[2].bias]

    model = build(Configured)
    trained = list(build(Configured).parameters())  # only their number per group is stored
    optimizer = torch.optim.SGD([{"params": trained[:2], "lr": 0.4}, {"params": trained[2:]}], lr=0.2)
    path = save(tmp_path / "a.ckpt", **stored(optimizer))
    torch.manual_seed(3)
    expected = {NAMES[1]: 0.4, NAMES[2]: 0.4, NAMES[0]: 0.2, NAMES[3]: 0.2}
    assert rates_of(path, model) == expected
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn == torch.rand(1)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_two_optimizers(tmp_path):
    model = build(TwoOptimizers)
    train(model, IN_ORDER, tmp_path, keeping(tmp_path / "files"), max_epochs=1, enable_checkpointing=True)
    checkpoints = read_checkpoints(tmp_path / "files", build(TwoOptimizers))
    assert steps(checkpoints) == [2, 4, 6, 8]
    for number, checkpoint in enumerate(checkpoints, 1):
        expected = {name: 0.1 if "network.0" in name else 0.01 * 0.5**number for name in NAMES}
        assert checkpoint.learning_rates == pytest.approx(expected)


def test_rates_that_cannot_be_told(tmp_path):
    class NeedsTrainer(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.max_epochs)

    first, *others = build(Classifier).parameters()
    path = save(tmp_path / "a.ckpt", **stored(torch.optim.SGD([{"params": first, "lr": 0.5}, {"params": others}], 0.1)))
    advice = r".*Use records of TracInCallback, .*, or give the optimizer model\.named_parameters\(\) in training"
    plain = nn.Module()
    plain.network = build(Classifier).network
    for model, reason in (
        (build(Classifier), r"makes groups of \[\[4\]\] parameters \(by optimizer\), but the file has \[\[1, 3\]\]"),
        (build(NeedsTrainer), r"configure_optimizers\(\) gave RuntimeError"),
        (plain, "Module has no configure_optimizers"),
    ):
        with pytest.raises(ValueError, match=r"a\.ckpt has several learning rates \(0\.5, 0\.1\).*" + reason + advice):
            read_checkpoints(path, model)


def test_one_rate_of_a_part_of_the_parameters(tmp_path):
    class Head(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.network[2].parameters(), lr=3.0)

    path = save(tmp_path / "a.ckpt", **stored(torch.optim.SGD(build(Classifier).network[2].parameters(), lr=0.2)))
    assert rates_of(path, build(Head)) == dict.fromkeys(NAMES[2:], 0.2)
    with pytest.warns(UserWarning, match=r"hold other parameters than .* Classifier, .*learning rate 0\.2\. Give"):
        assert rates_of(path, build(Classifier)) == dict.fromkeys(NAMES, 0.2)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_nothing_there(tmp_path):
    model = build(Classifier)
    with pytest.raises(FileNotFoundError, match=r"There are no checkpoints at .*nowhere: the path does not exist"):
        read_checkpoints(tmp_path / "nowhere", model)
    with pytest.raises(ValueError, match=r"holds nothing: expected records of TracInCallback, or \.ckpt, \.pt or"):
        read_checkpoints(tmp_path, model)
    with pytest.raises(ValueError, match="got an empty list"):
        read_checkpoints([], model)
    (tmp_path / "notes.txt").write_text("?")
    with pytest.raises(ValueError, match=r"holds other things \(notes\.txt\): expected records"):
        read_checkpoints(tmp_path, model)


def test_folders_of_something_else(run, tmp_path):
    folder, model = run
    with pytest.raises(ValueError, match=r"Give the folder that holds them, .* Did you mean .*/files\?"):
        read_checkpoints(folder, model)
    path = write_record(tmp_path / "stride", "step=1", {"kind": "stride"}, {})
    for other in (path, path.parent):
        with pytest.raises(ValueError, match=r"holds .*'stride': expected records of TracInCallback"):
            read_checkpoints(other, model)
    shutil.copytree(folder / "records/step=2", tmp_path / "stride/step=2")
    assert steps(read_checkpoints(tmp_path / "stride", model)) == [2]


def test_damage(run, tmp_path):
    folder, model = run
    shutil.copytree(folder / "records", tmp_path / "records")
    checkpoints = read_checkpoints(tmp_path / "records", model)
    path = tmp_path / "records/step=4/weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert checkpoints[0].load()
    with pytest.raises(RecordError, match="SHA-256"):
        checkpoints[1].load()
    for source in (tmp_path / "records", path.parent):
        with pytest.raises(RecordError, match=r"weights\.safetensors.*expected SHA-256"):
            read_checkpoints(source, model)
    (path.parent / "MANIFEST").unlink()
    with pytest.raises(RecordError, match="not a record"):
        read_checkpoints(path.parent, model)
    half = (folder / "files/step=4.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(half[: len(half) // 2])
    with pytest.raises(ValueError, match=r"half\.ckpt cannot be read; it may be damaged"):
        read_checkpoints(tmp_path / "half.ckpt", model)
    torch.save({"model": {}, "epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt holds no weights: expected .* got a dictionary .* \['epoch', 'mo"):
        read_checkpoints(tmp_path / "other.pt", model)


def test_another_architecture_is_refused_by_name_before_anything_is_computed(run, tmp_path):
    folder, _ = run
    before = weight_hash(build(Classifier, width=9))
    wider = build(Classifier, width=9)
    shapes = r"network\.0\.bias is \(8,\), the model has \(9,\)"
    for source in (folder / "records", folder / "files"):
        with pytest.raises(ValueError, match=rf"{re.escape(str(source))}/step=2.*do not fit Classifier.*{shapes}"):
            read_checkpoints(source, wider)
    with pytest.raises(ValueError, match=r"missing: network\.1\.bias"):
        read_checkpoints(folder / "records/step=4", build(ConvNet))
    assert weight_hash(wider) == before


# ---- what attribution starts from -----------------------------------------------------------------------------------


def test_given_by_the_caller(run):
    folder, model = run
    info = read_info(folder / "records/step=8")
    checkpoints, data, note = tracin_checkpoints(folder / "records", None, model)
    assert (steps(checkpoints), data) == ([2, 4, 6, 8], info["data"])
    assert note == "4 checkpoints given by the caller"
    checkpoints, data, _ = tracin_checkpoints(folder / "files", None, model)
    assert (steps(checkpoints), data) == ([2, 4, 6, 8], None)


def test_known_from_the_trainer_and_from_checkpoints(tmp_path):
    """Beside another callback whose records are of another kind."""
    model, tracin = build(Classifier), TracInCallback(every_n_train_steps=2)
    callbacks = StrideCallback(num_subsets=6), tracin, keeping(tmp_path / "files", filename="{step}")
    trainer = make_trainer(tmp_path, *callbacks, enable_checkpointing=True)
    assert tracin_checkpoints(None, None, model) is None
    trainer.fit(model, IN_ORDER)
    checkpoints, data, note = tracin_checkpoints(None, None, model)
    assert [checkpoint.path for checkpoint in checkpoints] == tracin.records
    assert data == read_info(tracin.records[0])["data"]
    assert note == "4 records of the attached trainer's fit"
    for step in (4, 8):
        saved = torch.load(tmp_path / f"files/step={step}.ckpt")
        other = build(Classifier, seed=3)
        other.load_state_dict(saved["state_dict"])
        checkpoints, *_, note = tracin_checkpoints(None, saved, other)
        assert steps(checkpoints) == list(range(2, step + 1, 2))
        assert note == f"{step // 2} records of the checkpoint's run"


def test_a_subclass_is_known_too(tmp_path):
    class Mine(TracInCallback):
        pass

    model, callback = build(Classifier), Mine()
    trainer = train(model, IN_ORDER, tmp_path, callback)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert steps(tracin_checkpoints(None, None, model)[0]) == [4, 8]
    model.trainer = None
    assert steps(tracin_checkpoints(None, torch.load(tmp_path / "end.ckpt"), model)[0]) == [4, 8]


def test_a_checkpoint_from_before_the_record_of_its_own_weights(tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}", save_top_k=-1)
    train(build(Classifier), IN_ORDER, tmp_path, TracInCallback(), keep, enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=4.ckpt")
    assert next(state for key, state in saved["callbacks"].items() if "TracIn" in key)["records"] == []
    model = build(Classifier, seed=1)
    model.load_state_dict(saved["state_dict"])
    assert steps(tracin_checkpoints(None, saved, model)[0]) == [4]


def test_the_trainers_records_are_not_of_another_runs_checkpoint(tmp_path):
    model, other = build(Classifier), build(Classifier, seed=1)
    train(model, IN_ORDER, tmp_path, TracInCallback())
    train(other, IN_ORDER, tmp_path).save_checkpoint(tmp_path / "other.ckpt")
    checkpoint = {"state_dict": model.state_dict()}
    assert steps(tracin_checkpoints(None, checkpoint, model)[0]) == [4, 8]
    model.load_state_dict(other.state_dict())
    assert tracin_checkpoints(None, torch.load(tmp_path / "other.ckpt"), model) is None


def test_records_that_are_gone(tmp_path):
    model, callback = build(Classifier), TracInCallback()
    train(model, IN_ORDER, tmp_path, callback)
    shutil.rmtree(callback.records[0])
    with pytest.warns(UserWarning, match="1 of the 2 records of this run no longer exist"):
        assert steps(tracin_checkpoints(None, None, model)[0]) == [8]
    shutil.rmtree(callback.records[1])
    with pytest.warns(UserWarning, match="2 of the 2 records"):
        assert tracin_checkpoints(None, None, model) is None


def test_rates_beside_a_scheduler_may_have_changed(tmp_path):
    model = build(Stepped)
    train(model, IN_ORDER, tmp_path, keeping(tmp_path), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="beside a scheduler, which may have changed them after the last step"):
        attribute(model, DATA, train_data=DATA, method="tracin", record=tmp_path, show_progress=False)
