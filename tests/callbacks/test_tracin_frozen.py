"""TracInCallback on models of which a part is frozen."""

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from stride_lightning import attribute
from stride_lightning.callbacks.tracin import TracInCallback
from stride_lightning.model.weights import weight_hash
from stride_lightning.storage.frozen import FROZEN_KIND
from stride_lightning.storage.records import find_records, read_info, read_record, write_record
from tests.helpers.adapters import Adapted, Backbone, States, UnfreezeAt, Unfrozen, tracin_by_hand
from tests.helpers.models import build, classification_data, train

DATA = classification_data()
QUERIES = Subset(classification_data(seed=5), range(4))
BASE = ["network.0.base.bias", "network.0.base.weight", "network.2.base.bias", "network.2.base.weight"]
ADAPTER = ["network.0.down.weight", "network.0.up.weight", "network.2.down.weight", "network.2.up.weight"]


def scores(model, record, **options):
    how = {"queries": QUERIES, "train_data": DATA, "method": "tracin", "show_progress": False}
    return attribute(model, record=record, **how, **options).scores


def weights_in(path):
    return sorted(read_record(path).tensors("weights"))


def frozen_in(path):
    return sorted(read_info(path)["frozen"]["digests"])


def frozen_records(folder):
    return [path for path in find_records(folder) if read_info(path)["kind"] == FROZEN_KIND]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model after three epochs, its callback and its states."""
    model, callback, states = build(Adapted), TracInCallback(), States()
    train(model, DATA, tmp_path_factory.mktemp("run"), callback, states, max_epochs=3)
    return model, callback, states


def test_an_adapter_is_recorded_without_its_base(adapted):
    model, callback, states = adapted
    assert [weights_in(path) for path in callback.records] == [ADAPTER] * 3
    assert [frozen_in(path) for path in callback.records] == [BASE] * 3
    infos = [read_info(path) for path in callback.records]
    assert len({info["frozen"]["hash"] for info in infos}) == 1
    assert infos[-1]["weights"] == weight_hash(model)
    expected = tracin_by_hand(model, states, QUERIES, DATA)
    same(scores(model, None), expected)
    # Another process builds the same base and reads the records; its own adapter is another.
    other = build(Adapted, seed=7)
    before = weight_hash(other)
    same(scores(other, callback.dirpath), expected)
    assert weight_hash(other) == before


def test_another_base_is_refused_by_name(adapted):
    _, callback, _ = adapted
    other = build(Adapted, base=1)
    with pytest.raises(ValueError, match=r"the frozen base is another.*Adapted has other values of network\.0\.base"):
        scores(other, callback.dirpath)
    with torch.no_grad():
        same_but_one = build(Adapted)
        same_but_one.network[2].base.bias[1] += 1e-6
    with pytest.raises(ValueError, match=r"has other values of network\.2\.base\.bias \(SHA-256"):
        scores(same_but_one, callback.records[0])
    wider = build(Adapted, width=9)
    with pytest.raises(ValueError, match="do not fit Adapted"):
        scores(wider, callback.dirpath)


def test_statistics_of_a_frozen_backbone_are_recorded(tmp_path):
    model, callback, states = build(Backbone), TracInCallback(), States()
    train(model, DATA, tmp_path, callback, states, max_epochs=2)
    statistics = [f"network.0.1.{name}" for name in ("num_batches_tracked", "running_mean", "running_var")]
    assert weights_in(callback.records[0]) == [*statistics, "network.1.bias", "network.1.weight"]
    one, other = (read_record(path).tensors("weights")[statistics[1]] for path in callback.records)
    assert not one.equal(other)
    same(scores(model, None), tracin_by_hand(model, states, QUERIES, DATA))


@pytest.mark.parametrize("tracin_first", [True, False])
def test_a_backbone_that_is_unfrozen_on_the_way(tmp_path, tracin_first):
    """The earlier records are read with the backbone of then, not with that of the final model."""
    model, callback, states = build(Unfrozen), TracInCallback(), States()
    first = model.network[0][0].weight.detach().clone()
    order = [callback, UnfreezeAt(2)] if tracin_first else [UnfreezeAt(2), callback]
    train(model, DATA, tmp_path, *order, states, max_epochs=4)
    backbone = ["network.0.0.bias", "network.0.0.weight"]
    head = ["network.1.bias", "network.1.weight"]
    assert [weights_in(path) for path in callback.records] == [head, head, backbone + head, backbone + head]
    assert [frozen_in(path) for path in callback.records] == [backbone, backbone, [], []]
    (held,) = frozen_records(callback.dirpath)
    assert weights_in(held) == backbone
    assert read_record(held).tensors("weights")["network.0.0.weight"].equal(first)
    assert not model.network[0][0].weight.equal(first)
    expected = tracin_by_hand(model, states, QUERIES, DATA)
    same(scores(model, None), expected)
    same(scores(build(Unfrozen, seed=3), callback.dirpath), expected)
    # Without the record of the backbone, its values of then are nowhere.
    held.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"step=4: the frozen base is another.*network\.0\.0\.weight"):
        scores(model, None)
    same(scores(build(Unfrozen), callback.records[0]), scores(build(Unfrozen), callback.records[:1]))


def test_old_records_take_the_frozen_past_with_them(tmp_path):
    for last_k, epochs, count in ((2, 3, 1), (2, 4, 0)):
        callback = TracInCallback(tmp_path / str(epochs), save_last_k=last_k)
        train(build(Unfrozen), DATA, tmp_path, callback, UnfreezeAt(2), max_epochs=epochs)
        assert len(frozen_records(callback.dirpath)) == count
        assert len(find_records(callback.dirpath)) == last_k + count


def test_a_backbone_that_trains_from_the_start_needs_no_past(tmp_path):
    callback = TracInCallback()
    train(build(Unfrozen), DATA, tmp_path, callback, UnfreezeAt(0), max_epochs=2)
    assert frozen_records(callback.dirpath) == []
    assert len(weights_in(callback.records[0])) == 4


def test_unfrozen_after_a_resume(tmp_path):
    """A run that is killed after the backbone was unfrozen, and resumed before that, writes its past once."""
    model, states = build(Unfrozen), States()
    trainer = train(model, DATA, tmp_path, TracInCallback(), UnfreezeAt(1), states, max_epochs=1)
    saved = tmp_path / "saved.ckpt"
    trainer.save_checkpoint(saved)
    for _ in range(2):
        callback, later, again = TracInCallback(), States(), build(Unfrozen, seed=9)
        train(again, DATA, tmp_path, callback, UnfreezeAt(1), later, max_epochs=3, ckpt_path=saved)
    assert len(callback.records) == 3
    assert len(frozen_records(callback.dirpath)) == 1
    states.states += later.states
    states.rates += later.rates
    same(scores(again, callback.dirpath), tracin_by_hand(again, states, QUERIES, DATA))


def test_unfrozen_between_two_fits_of_one_run(tmp_path):
    """The second fit is resumed with a model whose backbone trains from the start of it."""

    class Manual(Unfrozen):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    model, states = build(Manual), States()
    model.network[0].requires_grad_(False)
    trainer = train(model, DATA, tmp_path, TracInCallback(), states, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    callback, later = TracInCallback(), States()
    train(model.requires_grad_(True), DATA, tmp_path, callback, later, max_epochs=2, ckpt_path=tmp_path / "saved.ckpt")
    assert [len(frozen_in(path)) for path in callback.records] == [2, 0]
    assert len(frozen_records(callback.dirpath)) == 1
    states.states += later.states
    states.rates += later.rates
    same(scores(model, None), tracin_by_hand(model, states, QUERIES, DATA))


class Teacher(Adapted):
    """Writes into its frozen base through ``.data``, of which no version of a tensor tells."""

    first = 0

    def on_train_epoch_start(self):
        if self.current_epoch >= self.first:
            for value in self.network[0].base.parameters():
                value.data.mul_(0.9)


def test_what_changes_without_gradients_is_recorded(tmp_path):
    model, callback, states = build(Teacher), TracInCallback(), States()
    train(model, DATA, tmp_path, callback, states, max_epochs=2)
    assert [weights_in(path) for path in callback.records] == [sorted([*BASE[:2], *ADAPTER])] * 2
    assert [frozen_in(path) for path in callback.records] == [BASE[2:]] * 2
    same(scores(model, None), tracin_by_hand(model, states, QUERIES, DATA))


def test_a_change_that_no_hook_shows_is_refused_and_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "first", 1)
    model, callback = build(Teacher), TracInCallback()
    train(model, DATA, tmp_path, callback, max_epochs=2)
    assert [frozen_in(path) for path in callback.records] == [BASE, BASE[2:]]
    with pytest.raises(ValueError, match=r"step=4: the frozen base is another.*network\.0\.base\.bias"):
        scores(model, None)


def test_large_buffers_are_recorded_once_they_change(tmp_path):
    class Tables(Adapted):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(2**14 + 1))
            self.register_buffer("counts", torch.zeros(2**14 + 1))
            self.register_buffer("small", torch.zeros(3))

        def on_train_batch_start(self, batch, batch_idx):
            self.counts += 1

    callback = TracInCallback()
    train(build(Tables), DATA, tmp_path, callback, max_epochs=1)
    assert weights_in(callback.records[0]) == ["counts", *ADAPTER, "small"]
    assert frozen_in(callback.records[0]) == [*BASE, "table"]


def test_nothing_is_left_out_where_everything_trains(tmp_path):
    callback = TracInCallback()
    train(build(Unfrozen), DATA, tmp_path, callback, max_epochs=1)
    assert (len(weights_in(callback.records[0])), frozen_in(callback.records[0])) == (4, [])


def test_diverged_weights_are_refused_and_a_frozen_infinity_is_not(tmp_path):
    model = build(Adapted)
    with torch.no_grad():
        model.network[2].base.bias[0] = -torch.inf  # a class that is switched off

    class Safe(nn.Module):
        def forward(self, outputs, targets):
            return nn.functional.cross_entropy(outputs.clamp(min=-50), targets)

    model.loss = Safe()
    callback = TracInCallback()
    train(model, DATA, tmp_path, callback, max_epochs=1)
    assert len(callback.records) == 1


def test_records_of_the_schema_before_say_so(tmp_path, monkeypatch):
    from stride_lightning.storage import records

    monkeypatch.setattr(records, "_SCHEMA", 1)
    write_record(tmp_path, "step=4", {"kind": "tracin", "versions": {"stride_lightning": "0"}}, {"weights": {}})
    monkeypatch.undo()
    with pytest.raises(records.RecordError, match="has schema 1, and this version of stride-lightning reads schema 2"):
        scores(build(Adapted), tmp_path)
