"""Runs that are killed and go on: the same numbers, nothing left behind, and other work refused."""

import itertools
import shutil
import threading

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning.retraining.together import Together
from stride_lightning.storage import parts
from stride_lightning.storage.parts import Work, differences, remove_parts
from stride_lightning.storage.records import RecordError, find_records
from tests.helpers.processes import needs_fork, what_helper_saw
from tests.helpers.refusals import assert_refused
from tests.retraining.cases import Net, mlp, points, sgd
from tests.retraining.test_retrain import ask as ask_to_retrain


@pytest.fixture(scope="module")
def after_kills(tmp_path_factory):
    """What tests/helpers/kill_retrain.py saw; one process for all kills, as importing torch is slow."""
    return what_helper_saw("kill_retrain.py", tmp_path_factory.mktemp("kills"))


STEPS = 6  # of a part
NUM_MODELS, NUM_PARTS = 5, 3


@needs_fork
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["operations", "moments"])
def test_a_killed_run_goes_on_to_the_same_numbers(after_kills, kind):
    whole = after_kills["whole"]
    assert whole["steps"] == NUM_PARTS * STEPS
    for outcome in after_kills[kind]["outcomes"]:
        assert outcome["digest"] == whole["digest"], outcome
        num_parts = -(-NUM_MODELS // outcome["chunk"])  # killed before there was a plan, a run may choose again
        finished = num_parts if outcome["result"] else outcome["parts"]
        assert outcome["steps"] == (num_parts - finished) * STEPS, outcome  # what was done is not done again
        assert outcome["visible"] == ["truth"], outcome  # the parts are gone
        assert (outcome["again"], outcome["kept"]) == (0, True), outcome
        if outcome["parts"]:
            assert outcome["chunk"] == 2, outcome  # as the run began, whatever the memory budget now


@needs_fork
@pytest.mark.distributed
def test_kills_fell_everywhere(after_kills):
    outcomes, trace = after_kills["operations"]["outcomes"], after_kills["operations"]["trace"]
    assert {outcome["parts"] for outcome in outcomes} == {0, 1, 2, 3}
    assert {outcome["parts"] for outcome in outcomes if outcome["result"]} == {0, 1, 2, 3}  # while parts are deleted
    assert [outcome["killed"] for outcome in outcomes] == [True] * len(outcomes)
    assert outcomes[-1]["k"] == len(trace)
    assert trace.count("rename") == 2 * (1 + NUM_PARTS) + 1  # the plan and the parts come and go, the result comes
    assert len({outcome["parts"] for outcome in after_kills["moments"]["outcomes"]}) > 2


def ask(path=None, **more):
    how = {"queries": points(5, seed=1), "num_subsets": 4, "num_seeds": 1} | more
    if "masks" in how:
        del how["num_subsets"]
    return ask_to_retrain(path=path, **how)


@pytest.fixture
def chunks_trained(monkeypatch):
    """Numbers of models of the chunks that were trained, as they are."""
    sizes, original = [], Together.train
    monkeypatch.setattr(Together, "train", lambda self, *args: (sizes.append(len(args[0])), original(self, *args))[1])
    return sizes


class Interrupted(Exception):
    pass


def interrupted(path, monkeypatch, count):
    """What a run leaves of which the training of a chunk, of one model each, fails after so many."""
    original, places = Together.train, itertools.count()

    def train(self, *args):
        if next(places) >= count:
            raise Interrupted
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Together, "train", train)
        with pytest.raises(Interrupted):
            ask(path, memory_budget=1)


def test_a_result_is_not_computed_twice(tmp_path, chunks_trained):
    first = ask(tmp_path / "truth")
    assert chunks_trained
    chunks_trained.clear()
    second = ask(tmp_path / "truth")
    assert not chunks_trained
    assert first.masks.equal(second.masks)
    assert first.losses_by_seed.equal(second.losses_by_seed)
    assert first.losses_by_seed.equal(ask().losses_by_seed)
    assert [path.name for path in tmp_path.iterdir()] == ["truth"]


OTHER = {
    "epochs": ({"max_epochs": 3}, r"max_epochs \(2 there, 3 now\)"),
    "seed": ({"seed": 1}, "seeds.*masks"),
    "seeds": ({"num_seeds": 2}, "initial_weights, seeds"),
    "training data": ({"train_data": points(seed=7)}, "differs in data"),
    "queries": ({"queries": points(5, seed=7)}, "differs in query_data"),
    "masks": ({"masks": torch.eye(25)}, "differs in masks"),
    "subsets": ({"num_subsets": 3}, "differs in masks"),
    "batch size": ({"batch_size": 8}, r"batch_size \(9 there, 8 now\)"),
    "measure": ({"measure": lambda model, batch: model(batch[0])[:, 0]}, "measure"),
    "weights": ({"model": lambda: Net(nn.Linear(4, 3), sgd)}, "differs in initial_weights"),
    "learning rate": ({"model": lambda: Net(mlp(), lambda m: torch.optim.SGD(m.parameters(), lr=0.1))}, "optimizer"),
    "optimizer": ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, "optimizer"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_work_is_refused_by_the_result_and_by_the_parts(case, tmp_path, monkeypatch):
    more, named = OTHER[case]
    ask(tmp_path / "whole")
    with pytest.raises(ValueError, match=f"whole holds the result of other work, which .*{named}.*Choose another"):
        ask(tmp_path / "whole", **more)
    interrupted(tmp_path / "truth", monkeypatch, 1)
    with pytest.raises(ValueError, match=rf"truth.parts holds the finished parts of .*{named}.*delete the folder"):
        ask(tmp_path / "truth", **more)


def test_other_settings_of_a_model_or_of_an_optimizer_that_only_a_trainer_takes_are_other_work(tmp_path):
    """Dropout rates leave initial weights alone; so does another loss."""
    ask(tmp_path / "truth", model=lambda: Net(mlp().append(nn.Dropout(0.0)), sgd))
    with pytest.raises(ValueError, match="differs in model_code"):
        ask(tmp_path / "truth", model=lambda: Net(mlp().append(nn.Dropout(0.9)), sgd))

    def ask_with(lr):
        optimizer = lambda parameters: torch.optim.RMSprop(parameters, lr=lr)  # noqa: E731
        return ask(tmp_path / "other", optimizer=optimizer, num_subsets=2, max_epochs=1)

    ask_with(0.01)
    assert ask_with(0.01).metadata["one_by_one_because"]
    with pytest.raises(ValueError, match="differs in optimizer"):
        ask_with(0.02)


def test_a_kill_loses_few_models(tmp_path, chunks_trained):
    """With a path, parts are of 16 models where more would train at once."""
    ask(tmp_path / "truth", num_subsets=48)
    assert chunks_trained == [16, 16, 16]
    chunks_trained.clear()
    ask(num_subsets=48)
    assert len(chunks_trained) <= 2


def test_an_interrupted_run_keeps_what_it_has_done(tmp_path, chunks_trained, monkeypatch):
    """And its chunk size, if there is more memory now."""
    whole = ask(memory_budget=1)
    interrupted(tmp_path / "truth", monkeypatch, 2)
    assert {path.name for path in find_records(tmp_path / "truth.parts")} == {"plan", "part=0", "part=1"}
    chunks_trained.clear()
    again = ask(tmp_path / "truth", memory_budget=2**30)
    assert chunks_trained == [1, 1]
    assert again.metadata["chunk_size"] == 1
    assert again.losses_by_seed.equal(whole.losses_by_seed)
    assert not (tmp_path / "truth.parts").exists()


@pytest.mark.parametrize("name", ["plan", "part=0"])
def test_damage_is_refused_with_what_to_do(name, tmp_path, monkeypatch):
    interrupted(tmp_path / "truth", monkeypatch, 2)
    file = next((tmp_path / "truth.parts" / name).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(RecordError, match=rf"(?s){file.name}.*truth.parts/{name}.*Delete this record and write it"):
        ask(tmp_path / "truth")
    if name != "plan":  # the advice helps
        shutil.rmtree(tmp_path / "truth.parts" / name)
        assert ask(tmp_path / "truth").losses_by_seed.equal(ask(memory_budget=1).losses_by_seed)


def test_a_damaged_result_and_something_else_in_the_way_are_refused(tmp_path):
    ask(tmp_path / "truth")
    (tmp_path / "truth" / "record.json").write_text("{}")
    (tmp_path / "file").write_text("a file")
    assert_refused(ask, (r"record\.json", tmp_path / "truth"), ("not a record", tmp_path / "file"), error=RecordError)


def work_in(folder):
    return Work(folder / "work", {"a": 1}, {})


def squares_of(computed):
    """One item a chunk, noted by its number under both seeds."""

    def compute(seed, items, tick):
        computed.append(10 * seed + items.start)
        tick(1)
        return (torch.arange(10) ** 2 + 100 * seed)[items]

    return {"compute": compute, "seeds": [0, 1], "largest": 1}


def test_parts_come_in_order_whatever_is_there_already(tmp_path):
    computed = []
    work_in(tmp_path).run(**squares_of(computed) | {"seeds": [0]}, num_items=2)
    work = work_in(tmp_path)
    values = work.run(**squares_of(computed), num_items=2)
    assert values.tolist() == [[0, 1], [100, 101]]
    assert computed == [0, 1, 10, 11]
    work._remove_parts()
    assert list(tmp_path.iterdir()) == []
    # Items lie along the dimension that the caller names.
    table = torch.arange(24).reshape(2, 4, 3)
    how = {"seeds": [0, 1, 2], "num_items": 4, "largest": 3, "dim": 1}
    values = Work(None, {}, {}).run(lambda seed, items, tick: seed + table[:, items], **how)
    assert values.equal(torch.stack([table, table + 1, table + 2]))
    assert values.is_contiguous()


def test_parts_in_several_threads(tmp_path):
    meeting = threading.Barrier(2, timeout=20)

    def compute(seed, items, tick):
        meeting.wait()
        return torch.arange(4)[items]

    values = work_in(tmp_path).run(compute, seeds=[0], num_items=4, largest=1, num_threads=2)
    assert values.tolist() == [[0, 1, 2, 3]]


def test_a_part_of_another_process_that_vanishes_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "world_size", lambda: 2)
    with pytest.raises(RecordError, match=r"Part 1 has vanished from .*work.parts. Run again"):
        work_in(tmp_path).run(**squares_of([]), num_items=2)


@pytest.mark.parametrize("moment", ["before it computes", "before it keeps"])
def test_another_run_that_finishes_first_leaves_one_result(tmp_path, moment, monkeypatch):
    """As when a launcher starts processes that form no group: each does all the work, on the same path."""
    path = tmp_path / "truth"
    if moment == "before it computes":
        others = [lambda: ask(path, memory_budget=1)]
        original = Together.train

        def train(self, *args):
            if others:
                others.pop()()
            return original(self, *args)

        monkeypatch.setattr(Together, "train", train)
    else:
        original = Work.keep

        def keep(self, result):
            monkeypatch.setattr(Work, "keep", original)
            ask(path, memory_budget=1)
            return original(self, result)

        monkeypatch.setattr(Work, "keep", keep)
    result = ask(path, memory_budget=1)
    assert result.losses_by_seed.equal(ask(memory_budget=1).losses_by_seed)
    assert [left.name for left in tmp_path.iterdir()] == ["truth"]


def test_the_result_of_other_work_that_came_meanwhile_stays(tmp_path, monkeypatch):
    original = Work.keep

    def keep(self, result):
        monkeypatch.setattr(Work, "keep", original)
        ask(seed=1).save(tmp_path / "truth")
        return original(self, result)

    monkeypatch.setattr(Work, "keep", keep)
    ask(tmp_path / "truth")
    assert sorted(left.name for left in tmp_path.iterdir()) == ["truth", "truth-v1"]


def test_other_files_are_left_alone(tmp_path):
    work_in(tmp_path).run(**squares_of([]), num_items=2)
    (tmp_path / "work.parts" / "notes.txt").write_text("mine")
    (tmp_path / "work.parts" / ".part=0.part-1-abc").mkdir()  # of a killed writer
    remove_parts(tmp_path / "work.parts")
    assert [path.name for path in (tmp_path / "work.parts").iterdir()] == ["notes.txt"]


def test_differences():
    one = {"a": 1, "b": (1, 2), "c": {"x": [1]}, "d": "same"}
    assert differences(one, {**one, "b": [1, 2]}, {"m": torch.ones(2)}, {"m": torch.ones(2)}) == ""
    other = {"a": 2, "b": [1, 3], "c": {"x": [2]}, "d": "same", "e": None}
    assert differences(one, {**other, "f": 0}, {}, {}) == "a (1 there, 2 now), b, c, f (None there, 0 now)"
    assert differences({}, {}, {"m": torch.ones(2), "n": torch.ones(1)}, {"m": torch.zeros(2)}) == "m, n"
    assert differences({}, {}, {"m": torch.ones(2)}, {"m": torch.ones(3)}) == "m"


def test_training_that_diverges_leaves_what_was_done(tmp_path):
    """The message is about the subset, not the chunk."""
    x = torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    data, masks = TensorDataset(1e4 * x, x[:, :1]), torch.eye(3, 25)
    how = {"train_data": data, "queries": data, "masks": masks, "model": lambda: nn.Linear(4, 1), "max_epochs": 9}
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1e6)  # noqa: E731
    with pytest.raises(ValueError, match=r"Training on subset 0 with seed 3 gave losses .* for queries .0, 1, 2, 3, 4"):
        ask(tmp_path / "truth", optimizer=optimizer, seed=3, memory_budget=1, **how)
