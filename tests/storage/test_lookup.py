"""Which record is chosen, and why not another."""

import re
import shutil

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from stride_lightning import StrideCallback
from stride_lightning.callbacks.tracin import TracInCallback
from stride_lightning.storage.lookup import attached_states, choose_record, explain_mismatch, saved_states
from stride_lightning.storage.records import RecordError, find_records, read_record, write_record
from tests.helpers.models import Classifier, build, make_trainer

DESIGN = {"num_subsets": 8, "num_train": 20, "degree": 4, "seed": 0}
NOTHING = {"layers": None, "num_subsets": None, "degree": None}


def write(folder, name, weights="w", **changes):
    info = {"kind": "stride", "weights": weights, "layers": ["a"], "design": DESIGN, "task": "Classification()"}
    return write_record(folder, name, info | changes, {"basis": {}})


def checkpoint(*folders):
    states = {f"StrideCallback{{{i}}}": {"dirpath": str(folder), "records": []} for i, folder in enumerate(folders)}
    return {"callbacks": {"ModelCheckpoint": {"dirpath": "/elsewhere"}, **states}}


def choose(explicit=None, saved=None, weights="w", **asked):
    return choose_record(explicit, saved, nn.Identity(), weights, NOTHING | asked)


def test_nothing_known():
    for saved in (None, {}, checkpoint("/no/such/folder")):
        assert choose(saved=saved)[0] is None
    assert choose()[1] == "none of these weights was found, so everything was computed on the spot"


def test_the_newest_record_of_these_weights_from_any_callback(tmp_path):
    write(tmp_path, "step=1", "other")
    write(tmp_path, "step=2")
    newest = write(tmp_path, "step=2")
    write(tmp_path, "step=3", "other")
    record, note = choose(saved=checkpoint(tmp_path))
    assert record.path == newest
    assert note == f"found at {newest}, which has these weights"
    assert choose(tmp_path)[0].path == newest
    one, two = write(tmp_path / "one", "step=1", "v"), write(tmp_path / "two", "step=1", "w")
    saved = checkpoint(tmp_path / "one", tmp_path / "two")
    assert choose(saved=saved, weights="v")[0].path == one
    assert choose(saved=saved, weights="w")[0].path == two


def test_options_that_were_asked_for(tmp_path):
    small = write(tmp_path, "step=1")
    large = write(tmp_path, "step=1", design=DESIGN | {"num_subsets": 16})
    for given in ({"explicit": tmp_path}, {"saved": checkpoint(tmp_path)}):
        assert choose(**given)[0].path == large
        assert choose(**given, num_subsets=8)[0].path == small
    with pytest.raises(ValueError, match=r"has layers=\['a'\], but you passed layers=\['b'\]. Leave out the option"):
        choose(tmp_path, layers=["b"])
    record, note = choose(saved=checkpoint(tmp_path), degree=3)
    assert record is None
    assert "step=1 has degree=4, but you passed degree=3" in note


def test_other_weights(tmp_path):
    write(tmp_path, "step=1", "first hash")
    write(tmp_path, "step=2", "second hash")
    with pytest.raises(ValueError, match=r"step=1: first hash\n.*step=2: second hash\n.*model: third hash"):
        choose(tmp_path, weights="third hash")
    with pytest.warns(
        UserWarning, match=r"^No record that StrideCallback wrote .*step=2 is of other weights"
    ) as caught:
        assert choose(saved=checkpoint(tmp_path), weights="third hash")[0] is None
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_records_of_other_callbacks_alone_are_not_warned_of(tmp_path):
    write(tmp_path, "step=1", "other", kind="tracin")
    assert choose(saved=checkpoint(tmp_path))[0] is None


def test_damaged_records(tmp_path):
    sound, damaged = write(tmp_path, "step=1"), write(tmp_path, "step=2")
    (damaged / "record.json").write_text("{}")
    assert choose(saved=checkpoint(tmp_path))[0].path == sound
    shutil.rmtree(sound)
    with pytest.warns(UserWarning, match=r"^No record that StrideCallback wrote can be used, .*record\.json"):
        record, note = choose(saved=checkpoint(tmp_path))
    assert record is None
    assert "step=2" in note
    with pytest.raises(RecordError, match=r"record\.json"):
        choose(damaged)


def test_paths_that_hold_no_record(tmp_path):
    with pytest.raises(FileNotFoundError):
        choose(tmp_path / "nowhere")
    with pytest.raises(RecordError):
        choose(tmp_path)
    scores = write_record(tmp_path, "scores", {"kind": "attribution"}, {})
    for path in (scores, tmp_path):
        with pytest.raises(ValueError, match="holds 'attribution', not what StrideCallback writes"):
            choose(path)
    record = write(tmp_path, "step=1")
    for given in ({"explicit": tmp_path}, {"explicit": record}, {"saved": checkpoint(tmp_path)}):
        assert choose(**given)[0].path == record


def test_records_of_several_kinds_in_one_folder(tmp_path):
    """Each kind is found among the others, from a checkpoint that knows of all their callbacks."""
    kinds = ("stride", "tracin", "further-training")
    paths = {kind: write(tmp_path, "step=1", kind=kind) for kind in kinds}
    saved = checkpoint(tmp_path)
    saved["callbacks"]["TracInCallback"] = {"dirpath": str(tmp_path), "records": [], "run": "r", "learning_rates": []}
    for kind in kinds:
        for explicit, known in ((tmp_path, None), (None, saved)):
            record, _ = choose_record(explicit, known, nn.Identity(), "w", {}, kind)
            assert record.path == paths[kind]
    with pytest.raises(ValueError, match="holds 'tracin', not what StrideCallback writes"):
        choose(paths["tracin"])
    with pytest.raises(ValueError, match="holds 'stride', not what TracInCallback writes"):
        choose_record(paths["stride"], None, nn.Identity(), "w", {}, "tracin")


def test_states_that_name_records(tmp_path):
    saved = checkpoint(tmp_path)
    assert saved_states(saved) == [{"dirpath": str(tmp_path), "records": []}]
    assert saved_states(None) == saved_states({"state_dict": {}}) == attached_states(nn.Identity()) == []
    model = build(Classifier)
    callbacks = StrideCallback(tmp_path / "a"), TracInCallback(tmp_path / "b"), ModelCheckpoint(tmp_path / "c")
    model.trainer = make_trainer(tmp_path, *callbacks, enable_checkpointing=True)
    assert [state["dirpath"] for state in attached_states(model)] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_explain_mismatch(tmp_path):
    data = {"num_examples": 20, "content": "c" * 64, "shapes": None, "targets": "t" * 64}
    record = read_record(write(tmp_path, "step=1", data=data))
    assert explain_mismatch(record, dict(data), "Classification()") is None
    others = {
        "made with other training data": (data | {"content": "d" * 64}, "Classification()"),
        "made with task Classification(), now it is Mine()": (data, "Mine()"),
    }
    for reason, given in others.items():
        with pytest.warns(UserWarning, match=f"{re.escape(reason)}.* computed on the spot") as caught:
            note = explain_mismatch(record, *given)
        assert len(caught) == 1
        assert "\n" not in str(caught[0].message) + note
        assert reason in note
        with pytest.raises(ValueError, match=re.escape(reason)):
            explain_mismatch(record, *given, is_explicit=True)
    with pytest.raises(ValueError, match="was random_split given no seed") as refused:
        explain_mismatch(record, data | {"content": "d" * 64}, "Classification()", is_explicit=True)
    assert all(f"20 examples, content {16 * letter}" in str(refused.value) for letter in "cd")
    with pytest.raises(ValueError, match="content is random or cannot be read"):
        explain_mismatch(record, data | {"content": None, "shapes": "s" * 64}, "Classification()", is_explicit=True)
    assert find_records(tmp_path) == [record.path]
