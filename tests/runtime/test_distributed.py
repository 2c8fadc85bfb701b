"""Two processes and one: the same record, the same scores."""

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from stride_lightning import StrideCallback, attribute
from stride_lightning.model.weights import rank_zero_state, weight_hash
from stride_lightning.results.attribution import Attribution
from stride_lightning.runtime.distributed import (
    RankError,
    all_equal,
    barrier,
    broadcast_object,
    gather,
    gather_objects,
    leaving_together,
    rank,
    shard,
    total,
    world_size,
)
from stride_lightning.storage.records import find_records, read_record
from tests.helpers.models import Classifier, ConvNet, build, classification_data, loader, make_trainer, picture_data
from tests.helpers.processes import run_two, start
from tests.helpers.texts import LanguageModule, Texts, TinyLM, padded

NUM_SUBSETS = 13  # uneven on two ranks
DATA, QUERIES = classification_data(41), classification_data(5, seed=1)
#: Relative to the largest score. Rounding, everywhere.
TOLERANCE = 1e-4


def ask(model):
    queries = Subset(QUERIES, range(3))
    return attribute(model, queries, train_data=DATA, num_subsets=NUM_SUBSETS, show_progress=False)


def ask_about_texts(folder):
    options = {"train_data": text_loader(11), "show_progress": False, "cache_dir": folder / "activations"}
    return attribute(TinyLM().eval(), text_loader(3, seed=1), **options)


def ask_about_pictures(model):
    pictures = picture_data()
    return attribute(model, Subset(pictures, range(3)), train_data=pictures, num_subsets=6, show_progress=False)


def test_one_process_needs_no_group():
    assert (rank(), world_size(), shard(7)) == (0, 1, slice(0, 7))
    part = torch.arange(3)
    assert gather(part, 3) is part
    assert broadcast_object("a") == "a"
    assert all_equal(object())
    barrier()


@pytest.mark.parametrize(("length", "sizes"), [(7, [3, 2, 2]), (2, [1, 1, 0]), (0, [0, 0, 0])])
def test_shards_cover_everything_once(monkeypatch, length, sizes):
    monkeypatch.setattr("stride_lightning.runtime.distributed.world_size", lambda: 3)
    covered = []
    for number, size in enumerate(sizes):
        monkeypatch.setattr("stride_lightning.runtime.distributed.rank", lambda number=number: number)
        part = range(length)[shard(length)]
        assert len(part) == size
        covered += part
    assert covered == list(range(length))


def fit_and_ask(number, port, folder):
    """What each of the two processes does; rank r leaves its results in ``rank{r}.pt``."""
    start(number, port)
    callback = StrideCallback(
        folder / "records", num_subsets=NUM_SUBSETS, fit_operators=True, statistics_every_n_steps=2, every_n_epochs=1
    )
    model = build(Classifier)
    trainer = make_trainer(folder, callback, strategy="ddp", devices=2)
    trainer.fit(model, loader(DATA, batch_size=8))
    sampler = type(trainer.train_dataloader.sampler).__name__
    results = {"sampler": sampler, "world": world_size(), "records": list(map(str, callback.records))}
    results |= {"state": model.state_dict(), "steps": trainer.global_step}

    fitted = ask(model)
    results["reused"] = fitted.scores
    results["reused operators"] = fitted.metadata["operators"]["from_record"]
    results["recovered"] = fitted.metadata["recovered"]
    results["cached texts"] = ask_about_texts(folder).scores
    if number == 0:  # alone: whoever reads a standard deviation computes it
        results["std"] = fitted.std
    results["saved"] = [str(fitted.save(folder / "scores")) for _ in range(2)]

    # Primitives, for shapes that divide unevenly along any axis.
    whole = torch.arange(15.0).reshape(3, 5)
    parts = whole[:, shard(5)], whole[shard(3)], whole[:1][shard(1)]
    results["gathered"] = [gather(parts[0], 5, dim=1), gather(parts[1], 3), gather(parts[2], 1)]
    results["all equal"] = [all_equal("same"), all_equal(rank())]

    # Ranks that hold different statistics, as BatchNorm does after DDP, and a record on rank 0 only.
    conv = build(ConvNet)
    conv.network[1].running_mean += number
    before = weight_hash(conv)
    assert rank_zero_state(conv) is not None
    attribution = ask_about_pictures(conv)
    assert weight_hash(conv) == before
    results["conv"], results["conv weights"] = attribution.scores, attribution.metadata["weights"]
    barrier()
    torch.save(results, folder / f"rank{number}.pt")


def train_with_batchnorm(number, port, folder):
    """A network whose statistics differ between ranks; in the end one rank does not see the record."""
    start(number, port)
    callback = StrideCallback(folder / "records", num_subsets=6, fit_operators=True)
    model = build(ConvNet)
    trainer = make_trainer(folder, callback, strategy="ddp", devices=2)
    trainer.fit(model, loader(picture_data(), batch_size=8))
    original_hash, recorded = weight_hash(model), ask_about_pictures(model)
    results = {
        "hash": original_hash,
        "recorded": recorded.scores,
        "from record": recorded.metadata["operators"]["from_record"],
    }
    if number == 1:  # as on a node with a disk of its own
        callback.dirpath = folder / "nowhere"
    alone = ask_about_pictures(model)
    results["alone"], results["note"] = alone.scores, alone.metadata["record_note"]
    results["state"] = model.state_dict()
    with pytest.raises(ValueError, match="Query 0 has NaN in its features"):
        attribute(model, [(torch.full((1, 6, 6), torch.nan), 0)], train_data=picture_data(), show_progress=False)
    barrier()
    torch.save(results, folder / f"rank{number}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_two(fit_and_ask, folder)


def close(one, other, rtol):
    torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * other.abs().max().item())


@pytest.mark.distributed
def test_one_record_by_rank_zero(both):
    folder, (first, second) = both
    assert (first["world"], first["sampler"]) == (2, "DistributedSampler")  # Lightning's, read through
    records = [str(path) for path in find_records(folder / "records")]
    assert (first["records"], second["records"]) == (records, [])
    record = read_record(first["records"][-1])
    assert record.info["step"] == first["steps"]
    assert record.tensors("losses")["train"].shape == (41,)
    assert record.tensors("operators")["coefficients"].shape[2] == NUM_SUBSETS
    model = build(Classifier)
    model.load_state_dict(first["state"])
    assert record.info["weights"] == weight_hash(model)


@pytest.mark.distributed
def test_all_ranks_return_the_same_scores_as_one_process(both, tmp_path):
    _, (first, second) = both
    for key in ("reused", "conv", "cached texts"):
        assert first[key].equal(second[key]), key
    assert first["recovered"] == second["recovered"]
    assert first["reused operators"] is second["reused operators"] is True
    assert first["conv weights"] == second["conv weights"]
    model = build(Classifier)
    model.load_state_dict(first["state"])
    close(first["reused"], ask(model).scores, rtol=TOLERANCE)
    close(first["std"], ask(model).std, rtol=1e-3)
    close(first["cached texts"], ask_about_texts(tmp_path).scores, rtol=TOLERANCE)


@pytest.mark.distributed
def test_saved_once_each_time(both):
    folder, (first, second) = both
    assert first["saved"] == second["saved"] == [str(folder / "scores"), str(folder / "scores-v1")]
    assert [path.name for path in find_records(folder)] == ["scores", "scores-v1"]
    assert Attribution.load(folder / "scores").scores.equal(first["reused"])


@pytest.mark.distributed
def test_primitives_and_statistics_of_rank_zero(both):
    _, (first, second) = both
    whole = torch.arange(15.0).reshape(3, 5)
    for results in (first, second):
        assert all(map(torch.equal, results["gathered"], [whole, whole, whole[:1]]))
        assert results["all equal"] == [True, False]
    conv = build(ConvNet)
    assert first["conv weights"] == weight_hash(conv)
    close(first["conv"], ask_about_pictures(conv).scores, rtol=TOLERANCE)


@pytest.mark.distributed
def test_batchnorm_from_training_to_attribution(tmp_path):
    first, second = run_two(train_with_batchnorm, tmp_path)
    assert first["hash"] != second["hash"]  # or this test would show nothing
    (path,) = find_records(tmp_path / "records")
    assert read_record(path).info["weights"] == first["hash"]
    assert first["from record"] is second["from record"] is True
    for key in ("recorded", "alone"):
        assert first[key].equal(second[key])
    close(first["alone"], first["recorded"], rtol=TOLERANCE)
    assert "the ranks have different records" in first["note"]
    model = build(ConvNet)
    model.load_state_dict(first["state"])
    close(first["recorded"], ask_about_pictures(model).scores, rtol=TOLERANCE)


def fit_texts(number, port, folder):
    """A language model under DDP, watched by the callback."""
    start(number, port)
    torch.manual_seed(0)
    callback = StrideCallback(folder / "records", num_subsets=NUM_SUBSETS, fit_operators=True)
    model = LanguageModule()
    trainer = make_trainer(folder, callback, strategy="ddp", devices=2, max_epochs=1)
    trainer.fit(model, DataLoader(Texts(11), 4, collate_fn=padded, shuffle=True))
    attribution = attribute(
        model, text_loader(3, seed=1), train_data=text_loader(11), recovery="prior", show_progress=False
    )
    results = {
        "state": model.state_dict(),
        "scores": attribution.scores,
        "std": attribution.std,
        "note": attribution.metadata["record"],
    }
    torch.save(results, folder / f"rank{number}.pt")


def text_loader(count, seed=0):
    return DataLoader(Texts(count, seed=seed), 4, collate_fn=padded)


@pytest.mark.distributed
def test_a_language_model_from_training_to_attribution(tmp_path):
    first, second = run_two(fit_texts, tmp_path)
    assert first["note"] == second["note"] == str(tmp_path / "records" / "step=2")
    model = LanguageModule()
    model.load_state_dict(first["state"])
    options = {"recovery": "prior", "num_subsets": NUM_SUBSETS, "show_progress": False}
    expected = attribute(model, text_loader(3, seed=1), train_data=text_loader(11), **options)
    for result in (first, second):
        close(result["scores"], expected.scores, TOLERANCE)
        close(result["std"], expected.std, 1e-3)


def leave_together(number, port, folder):
    """Blocks that one rank leaves early, at different moments."""
    start(number, port, group=True)

    def fails(where):
        if number == where:
            raise KeyError(where)

    def between():
        barrier()
        fails(0)
        total(torch.ones(1))

    def caught():
        try:
            fails(1)
            broadcast_object(1)
        except RankError:
            gather(torch.ones(1), 2)

    def nested():
        with leaving_together():
            fails(1)
        barrier()

    blocks = {
        "before": lambda: (fails(1), gather_objects(1)),
        "between": between,
        "at the end": lambda: (barrier(), fails(0)),
        "both": lambda: fails(number),
        "caught": caught,
        "nested": nested,
        "none": lambda: gather_objects(number),
    }

    def outcome_of(block):
        try:
            with leaving_together():
                return block()
        except (KeyError, RankError) as error:
            return f"{type(error).__name__}: {error}"

    outcomes = {name: outcome_of(block) for name, block in blocks.items()}
    torch.save(outcomes, folder / f"rank{number}.pt")


@pytest.mark.distributed
def test_all_ranks_leave_a_block_if_one_fails(tmp_path):
    outcomes = run_two(leave_together, tmp_path)
    for name, failing in {"before": 1, "between": 0, "at the end": 0, "caught": 1, "nested": 1}.items():
        assert outcomes[failing][name] == f"KeyError: {failing}", name
        assert outcomes[1 - failing][name] == f"RankError: Rank {failing} failed: KeyError: {failing}", name
    assert [outcome["both"] for outcome in outcomes] == ["KeyError: 0", "KeyError: 1"]
    assert [outcome["none"] for outcome in outcomes] == [[0, 1], [0, 1]]
