"""What further training gives: means, errors, a folder on disk, and runs that go on where they were killed."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from stride_lightning import FurtherTraining, further_train
from stride_lightning.retraining import further_training as module
from stride_lightning.retraining.leaving_out import LeavingOut
from stride_lightning.storage import parts as parts_module
from tests.retraining.cases import Net, mlp, points, sgd, threads
from tests.retraining.further import SPREAD

SEEDS, EPOCHS, LEFT_OUT, QUERIES = [3, 4, 5], [1, 2], [7, 0, 20, 3], 5
SETTINGS = {"epochs": EPOCHS, "left_out": LEFT_OUT, "num_seeds": 3, "seed": 3, "show_progress": False}


@pytest.fixture
def result():
    values = torch.randn(3, 2, 4, QUERIES, generator=torch.Generator().manual_seed(0))
    return FurtherTraining(values, torch.tensor(LEFT_OUT), EPOCHS, SEEDS, {"weights": "w", "optimizer": "SGD"})


def make_model(seed=0, lr=0.2):
    torch.manual_seed(seed)
    return Net(mlp(), lambda m: torch.optim.SGD(m.parameters(), lr=lr))


def run(model=None, data=None, queries=None, **more):
    data = DataLoader(points() if data is None else data, 9, shuffle=True)
    queries = points(QUERIES, seed=1) if queries is None else queries
    return further_train(make_model() if model is None else model, queries, train_data=data, **(SETTINGS | more))


# ---- what is read from it ---------------------------------------------------------------------------------------


def test_effects_are_means_over_seeds_with_their_standard_error(result):
    values = result.effects_by_seed.double().numpy()  # (S, T, m, q)
    for number, epoch in enumerate(EPOCHS):
        at = values[:, number].transpose(0, 2, 1)
        np.testing.assert_allclose(result.effects(epoch), at.mean(0), rtol=1e-6)
        np.testing.assert_allclose(result.std_error(epoch), at.std(0, ddof=1) / 3**0.5, rtol=1e-6)
    assert result.effects().shape == (QUERIES, 4)
    assert result.effects().dtype == result.std_error().dtype == torch.float32
    assert result.effects().equal(result.effects(2))
    assert result.std_error().equal(result.std_error(2))
    assert not result.effects(1).equal(result.effects(2))
    with pytest.raises(ValueError, match=r"one of \[1, 2\], after which .* got 3"):
        result.effects(3)
    assert repr(result) == "FurtherTraining(4 examples left out, 5 queries, 3 seeds, after 1, 2 epochs)"


def test_one_seed_has_no_standard_error(result):
    one = FurtherTraining(result.effects_by_seed[:1], result.left_out, EPOCHS, [3])
    assert one.std_error() is None
    assert one.attribution().std is None


def test_attribution(result):
    attribution = result.attribution(1)
    assert attribution.scores.equal(result.effects(1))
    assert attribution.std.equal(result.std_error(1))
    assert attribution.train_indices.tolist() == LEFT_OUT
    assert attribution.metadata["method"] == "further-training"
    assert attribution.metadata["weights"] == "w"
    best = result.effects()[0].argmax().item()
    assert result.attribution().top(1).proponents[0].item() == LEFT_OUT[best]


def test_shapes_that_do_not_fit_and_values_that_are_not_finite(result):
    values = result.effects_by_seed
    for wrong in (values[0], values[:2], values[:, :1], values[:, :, :3]):
        with pytest.raises(ValueError, match=r"Effects must have shape \(3, 2, 4, 'q'\)"):
            FurtherTraining(wrong, result.left_out, EPOCHS, SEEDS)
    values[1, 1, 2, 4] = torch.inf
    with pytest.raises(
        ValueError, match=r"example 20 gave .* query 4, after 2 epoch\(s\) with seed 4\. Lower the lear"
    ):
        FurtherTraining(values, result.left_out, EPOCHS, SEEDS)


# ---- a folder on disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(result, tmp_path, dtype):
    result.effects_by_seed = result.effects_by_seed.to(dtype) + 1e-12
    path = result.save(tmp_path / "effects")
    loaded = FurtherTraining.load(path)
    assert path == tmp_path / "effects"
    assert loaded.effects_by_seed.equal(result.effects_by_seed)
    assert loaded.left_out.equal(result.left_out)
    assert (loaded.epochs, loaded.seeds, loaded.metadata) == (EPOCHS, SEEDS, result.metadata)
    assert result.save(tmp_path / "effects") == tmp_path / "effects-v1"


# ---- path= ------------------------------------------------------------------------------------------------------


def count_work(monkeypatch, stop_after=None):
    """Every call that trains, and an exception after some of them."""
    calls, original = [], LeavingOut.effects

    def effects(self, *args):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(args)
        return original(self, *args)

    monkeypatch.setattr(LeavingOut, "effects", effects)
    return calls


def test_the_result_is_written_and_found_again(tmp_path, monkeypatch):
    first = run(path=tmp_path / "effects")
    assert [path.name for path in tmp_path.iterdir()] == ["effects"]
    assert first.metadata["seconds"]["total"] > 0
    assert first.metadata["versions"]["torch"] == torch.__version__
    calls = count_work(monkeypatch)
    again = run(path=tmp_path / "effects")
    assert calls == []
    assert again.effects_by_seed.equal(first.effects_by_seed)
    assert again.metadata == first.metadata
    monkeypatch.undo()
    assert run().effects_by_seed.equal(first.effects_by_seed)


OTHERS = {
    "epochs": {"epochs": [1, 3]},
    "seeds": {"num_seeds": 2},
    "left_out": {"left_out": [7, 0, 20, 4]},
    "weights": {"model": make_model(seed=1)},
    "optimizer": {"model": make_model(lr=0.1)},
    "batch_size": {"batch_size": 5},
    "query_data": {"queries": points(QUERIES, seed=2)},
    "data": {"data": points(seed=2)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("finished", [True, False])
def test_other_work_is_refused_by_what_differs(tmp_path, monkeypatch, name, finished):
    path = tmp_path / "effects"
    if finished:
        run(path=path)
    else:
        count_work(monkeypatch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            run(path=path, memory_budget=1)
        monkeypatch.undo()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match=rf"of other work, which differs in {name}( \(|\.).*[Cc]hoose another path, or"
    ):
        run(path=path, **OTHERS[name])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("budget", [1, 2**40])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, budget):
    """Twelve chunks of one example for each of three seeds; the second run may have more memory."""
    calls = count_work(monkeypatch, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        run(path=tmp_path / "effects", memory_budget=1)
    assert [path.name for path in tmp_path.iterdir()] == ["effects.parts"]
    monkeypatch.undo()
    calls = count_work(monkeypatch)
    result = run(path=tmp_path / "effects", memory_budget=budget)
    assert len(calls) == 12 - 5
    assert [path.name for path in tmp_path.iterdir()] == ["effects"]
    monkeypatch.undo()
    torch.testing.assert_close(result.effects_by_seed, run().effects_by_seed, rtol=1e-4, atol=1e-6)
    assert FurtherTraining.load(tmp_path / "effects").effects_by_seed.equal(result.effects_by_seed)


@pytest.mark.parametrize(("num", "parts"), [(60, 3 * 4), (600, 3 * 6)])
def test_a_run_that_is_stored_is_cut_finer(tmp_path, monkeypatch, num, parts):
    """Into sixteen parts about, of no fewer than sixteen models."""
    monkeypatch.setattr(module, "NUM_LEFT_OUT", num)
    with threads(1):
        how = {"data": points(num), "left_out": None, "memory_budget": 2**40, "epochs": 1}
        calls = count_work(monkeypatch)
        result = run(path=tmp_path / "effects", **how)
        assert len(calls) == parts
        assert max(len(args[0]) for args in calls) == max(16, -(-3 * num // 16))
        calls.clear()
        whole = run(**how)
        assert len(calls) == 3
    torch.testing.assert_close(result.effects_by_seed, whole.effects_by_seed, rtol=1e-3, atol=1e-6)


def test_metadata_say_how():
    metadata = run().metadata
    known = {"shuffle": True, "batch_size": 9, "task": "Classification()", "one_by_one_because": None}
    assert {name: metadata[name] for name in known} == known
    assert metadata["data"]["num_examples"] == 25
    assert metadata["query_data"]["num_examples"] == QUERIES
    assert metadata["optimizer"].startswith("SGD")


def test_a_progress_bar_counts_models_and_epochs(monkeypatch):
    seen = []

    @contextmanager
    def bar(total, *_):
        seen.append(total)
        yield SimpleNamespace(update=seen.append)

    monkeypatch.setattr(parts_module, "counting", bar)
    for more in ({}, {"memory_budget": 1}, {"model": Net(mlp(), sgd, SPREAD)}):
        seen.clear()
        run(**more)
        assert seen[0] == sum(seen[1:])
        assert len(seen) > 3
