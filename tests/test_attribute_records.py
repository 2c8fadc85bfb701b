"""attribute(): which weights it takes, and which record."""

import copy
import re
import shutil
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import Subset, TensorDataset

from stride_lightning import (
    Classification,
    RecordError,
    StrideAttributor,
    StrideCallback,
    attribute,
    further_train,
    self_influence,
)
from stride_lightning.model.weights import weight_hash
from tests.helpers.models import NUM_TRAIN, Classifier, ConvNet, build, train
from tests.test_attribute import DATA, FEW, QUERIES, same

# ---- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs, a checkpoint and a record each; the model is attached to the trainer and stands at the end."""
    folder = tmp_path_factory.mktemp("run")
    keep = ModelCheckpoint(dirpath=folder / "kept", save_top_k=-1, monitor="loss", mode="max", save_last=True)
    callback = StrideCallback(num_subsets=16, every_n_epochs=1)
    model = build(Classifier)
    train(model, DATA, folder, callback, keep, enable_checkpointing=True)
    return model, callback, keep, folder


def test_best_and_last(run):
    model, callback, keep, _ = run
    by_name = {name: attribute(model, QUERIES, train_data=DATA, ckpt_path=name, **FEW) for name in ("best", "last")}
    by_path = attribute(model, QUERIES, train_data=DATA, ckpt_path=keep.best_model_path, **FEW)
    same(by_name["best"], by_path)
    assert by_name["last"].metadata["record"] == str(callback.records[1])
    assert by_name["last"].metadata["weights"] == weight_hash(model)
    assert by_name["last"].metadata["step"] == 8
    assert by_name["best"].metadata["record"] == str(callback.records[0])


def test_best_and_last_errors(model, run, tmp_path):
    with pytest.raises(ValueError, match=r"ckpt_path='best'.*not attached"):
        attribute(model, QUERIES, train_data=DATA, ckpt_path="best")
    unkept = build(Classifier)
    train(unkept, DATA, tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"ckpt_path='last'.*save_last=True"):
        attribute(unkept, QUERIES, train_data=DATA, ckpt_path="last")


def test_checkpoints_that_cannot_be_read(model, tmp_path):
    def ask(name):
        return attribute(model, QUERIES, train_data=DATA, ckpt_path=tmp_path / name)

    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.ckpt"):
        ask("nowhere.ckpt")
    content = {"state_dict": model.state_dict(), "hyper_parameters": {"net": nn.Linear(1, 1)}}
    torch.save(content, tmp_path / "object.ckpt")
    with pytest.raises(ValueError, match=r"object\.ckpt holds objects .*: 'hyper_parameters\.net' \(torch\.nn\."):
        ask("object.ckpt")
    content = (tmp_path / "object.ckpt").read_bytes()
    (tmp_path / "short.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"short\.ckpt cannot be read; it may be damaged"):
        ask("short.ckpt")
    (tmp_path / "text.ckpt").write_text("hello, this is no checkpoint")
    with pytest.raises(ValueError, match=r"text\.ckpt cannot be read; it may be damaged, cut short or no checkpoint"):
        ask("text.ckpt")
    torch.save(Classifier(width=9, dropout=0.3).state_dict(), tmp_path / "wide.ckpt")
    with pytest.raises(ValueError, match=r"do not fit Classifier.*network\.0\.bias is \(9,\), the model has \(8,\)"):
        ask("wide.ckpt")
    torch.save(ConvNet().state_dict(), tmp_path / "conv.ckpt")
    with pytest.raises(ValueError, match=r"missing: .*network\.3\.bias.*not in the model: network\.1\.bias"):
        ask("conv.ckpt")


class WithNetwork(Classifier):
    """Its hyper-parameters hold a module, as Lightning's documentation has it."""

    def __init__(self, activation):
        super().__init__()
        self.network[1] = activation
        self.save_hyperparameters()


def test_a_checkpoint_that_holds_objects_is_loaded_if_it_is_trusted(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_top_k=-1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attribute 'activation' is an instance of `nn.Module`")
        model = build(WithNetwork, activation=nn.Tanh())
    train(model, DATA, tmp_path, keep, enable_checkpointing=True)
    data, path, plain = {"train_data": DATA, "show_progress": False}, keep.best_model_path, copy.deepcopy(model)
    plain.trainer = None
    further = {"batch_size": 16, "num_seeds": 1, "left_out": [0, 1], **data}
    calls = {
        "attribute": lambda **how: attribute(model, QUERIES, num_subsets=16, ckpt_path=path, **data, **how).scores,
        "best": lambda **how: attribute(model, QUERIES, num_subsets=16, ckpt_path="best", **data, **how).scores,
        "self_influence": lambda **how: self_influence(model, method="grad-dot", ckpt_path=path, **data, **how),
        "tracin": lambda **how: attribute(plain, QUERIES, method="tracin", record=keep.dirpath, **data, **how).scores,
        "checkpoints": lambda **how: (
            attribute(plain, QUERIES, method="grad-dot", checkpoints=[path], **data, **how).scores
        ),
        "further_train": lambda **how: further_train(plain, QUERIES, ckpt_path=path, **further, **how).effects(),
    }
    for call in calls.values():
        for how in ({}, {"weights_only": None}, {"weights_only": True}):
            with pytest.raises(
                ValueError, match=r"'hyper_parameters\.activation' \(torch\.nn.*pass weights_only=False\."
            ):
                call(**how)
        assert call(weights_only=False).isfinite().all()
    again = attribute(model, QUERIES, num_subsets=16, ckpt_path=path, weights_only=False, **data)
    same(again, attribute(plain, QUERIES, num_subsets=16, **data))


def test_a_checkpoint_answers_whatever_the_model_holds_now(run):
    model, _, keep, _ = run
    blank = build(Classifier, seed=9)
    assert weight_hash(blank) != weight_hash(model)
    attributor = StrideAttributor(**FEW).fit(blank, DATA, ckpt_path=keep.last_model_path)
    with torch.no_grad():
        blank.network[0].weight.zero_()
    same(attributor.attribute(QUERIES), attribute(model, QUERIES, train_data=DATA, **FEW))


# ---- records ----------------------------------------------------------------------------------------------------


def test_record_from_the_checkpoints_callback_state(run):
    _, callback, keep, _ = run
    metadata = attribute(build(Classifier), QUERIES, train_data=DATA, ckpt_path=keep.last_model_path, **FEW).metadata
    assert metadata["record"] == str(callback.records[1])
    assert "which has these weights" in metadata["record_note"]


def test_record_from_the_attached_trainer(run):
    model, callback, _, _ = run
    metadata = attribute(model, QUERIES, train_data=DATA, recovery="prior", show_progress=False).metadata
    assert metadata["record"] == str(callback.records[1])
    assert metadata["design"]["num_subsets"] == 16


def test_record_from_the_trainer_for_a_checkpoint_without_callback_state(run, tmp_path):
    model, callback, _, _ = run
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.ckpt")
    metadata = attribute(model, QUERIES, train_data=DATA, ckpt_path=tmp_path / "weights.ckpt", **FEW).metadata
    assert metadata["record"] == str(callback.records[1])


def test_moved_records(run, tmp_path):
    model, _, keep, folder = run
    moved = shutil.copytree(folder / "stride", tmp_path / "moved")
    other = build(Classifier)
    for record in (moved, moved / "step=8"):
        options = {"ckpt_path": keep.last_model_path, "record": record, **FEW}
        metadata = attribute(other, QUERIES, train_data=DATA, **options).metadata
        assert metadata["record"] == str(moved / "step=8")
        assert metadata["record_note"] == "given by the caller"
    with pytest.raises(FileNotFoundError):
        attribute(model, QUERIES, train_data=DATA, record=tmp_path / "nowhere", **FEW)


def test_record_of_other_weights_is_refused_with_both_hashes(run):
    model, _, _, folder = run
    other = build(Classifier, seed=3)
    with pytest.raises(ValueError, match="is of the weights that are attributed") as caught:
        attribute(other, QUERIES, train_data=DATA, record=folder / "stride")
    assert weight_hash(other) in str(caught.value)
    assert weight_hash(model) in str(caught.value)


def changed_pixel():
    x, y = (tensor.clone() for tensor in DATA.tensors)
    x[17, 2] += 1e-3
    return TensorDataset(x, y)


OTHER_DATA = {
    "one pixel": changed_pixel(),
    "order": Subset(DATA, [1, 0, *range(2, NUM_TRAIN)]),
    "length": Subset(DATA, range(NUM_TRAIN - 1)),
    "label": TensorDataset(DATA.tensors[0], DATA.tensors[1].clone().index_fill_(0, torch.tensor([5]), 0)),
}


@pytest.mark.parametrize("data", OTHER_DATA.values(), ids=OTHER_DATA.keys())
def test_record_of_other_data(run, data):
    model, _, _, folder = run
    with pytest.raises(ValueError, match="made with other training data") as caught:
        attribute(model, QUERIES, train_data=data, record=folder / "stride", **FEW)
    fingerprints = re.findall(r"(\d+) examples, content (\w{16})", str(caught.value))
    assert len(set(fingerprints)) == 2
    assert fingerprints[1][0] == str(len(data))
    with pytest.warns(
        UserWarning, match="made with other training data.* computed on the spot.*random_split"
    ) as warned:
        attribution = attribute(model, QUERIES, train_data=data, **FEW)
    assert len(warned) == 1
    assert attribution.metadata["record"] is None
    assert "made with other training data" in attribution.metadata["record_note"]
    alone = copy.deepcopy(model)
    alone.trainer = None
    same(attribution, attribute(alone, QUERIES, train_data=data, **FEW))


def test_weights_without_a_record_are_warned_of_once(run):
    """Those of an earlier epoch, attributed while the trainer with its callback is attached."""
    model, _, _, _ = run
    weights = build(Classifier, seed=5).state_dict()
    moved = copy.deepcopy(model)
    moved.load_state_dict(weights)
    moved.trainer = model.trainer
    for method in ("stride", "grad-dot"):
        options = {"num_subsets": 16} if method == "stride" else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attribute(moved, QUERIES, train_data=DATA, method=method, show_progress=False, **options)
        texts = [str(warning.message) for warning in caught]
        assert [text.startswith("No record that StrideCallback wrote") for text in texts] == [True] * (
            method == "stride"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(build(Classifier, seed=5), QUERIES, train_data=DATA, **FEW)  # nothing says that there are records


def test_damaged_record(run, tmp_path):
    model, callback, keep, folder = run
    damaged = shutil.copytree(folder / "stride", tmp_path / "stride")
    file = damaged / "step=8" / "readout.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RecordError, match=r"readout\.safetensors"):
        attribute(model, QUERIES, train_data=DATA, record=damaged, **FEW)
    other = build(Classifier)
    checkpoint = torch.load(keep.last_model_path, weights_only=True)
    checkpoint["callbacks"][callback.state_key]["dirpath"] = str(damaged)
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    with pytest.warns(UserWarning, match=r"No record that StrideCallback wrote can be used.*readout\.safetensors"):
        attribution = attribute(other, QUERIES, train_data=DATA, ckpt_path=tmp_path / "moved.ckpt", **FEW)
    assert attribution.metadata["record"] is None
    assert "computed on the spot" in attribution.metadata["record_note"]
    assert "readout.safetensors" in attribution.metadata["record_note"]
    same(attribution, attribute(model, QUERIES, train_data=DATA, **FEW))


def test_record_and_options_that_conflict(run):
    model, _, _, folder = run
    with pytest.raises(ValueError, match="has num_subsets=16, but you passed num_subsets=30"):
        attribute(model, QUERIES, train_data=DATA, record=folder / "stride", num_subsets=30)
    metadata = attribute(model, QUERIES, train_data=DATA, num_subsets=30, show_progress=False).metadata
    assert metadata["record"] is None
    assert "num_subsets=30" in metadata["record_note"]
    minimises = pytest.warns(UserWarning, match=r"minimises another loss than Tempered\(\)")
    with pytest.raises(ValueError, match="made with task Classification"), minimises:
        attribute(model, QUERIES, train_data=DATA, record=folder / "stride", task=Tempered())


class Tempered(Classification):
    def outputs(self, model, inputs):
        return model(inputs) / 2
