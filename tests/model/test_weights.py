"""Weights: their hash, checkpoints, and models that are borrowed and given back."""

from collections import deque

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import StrideCallback, attribute
from stride_lightning.model.checkpoints import load_checkpoint, resolve_ckpt_path
from stride_lightning.model.layers import in_precision_of
from stride_lightning.model.weights import (
    attached_trainer,
    borrowed,
    rank_zero_state,
    weight_hash,
)
from tests.helpers.models import Classifier, ConvNet, build, hooks_of, make_trainer, train

# ---- hash -----------------------------------------------------------------------------------------------------------


def test_hash_is_of_the_weights_alone():
    model = build(Classifier)
    before = weight_hash(model)
    assert before == weight_hash(build(Classifier))
    model.train()
    model.network[0].weight.requires_grad_(False)
    model.network[0].weight.grad = torch.ones(8, 4)
    assert weight_hash(model) == before
    model.network[0].weight.data = model.network[0].weight.data.T.contiguous().T
    assert weight_hash(model) == before


def test_hash_sees_every_change():
    def changed(change):
        model = build(ConvNet)
        with torch.no_grad():
            change(model)
        return weight_hash(model)

    hashes = [
        changed(lambda model: None),
        changed(lambda model: model.network[0].bias[0].add_(1e-7)),
        changed(lambda model: model.network[1].running_mean.add_(1)),
        changed(lambda model: model.network[1].num_batches_tracked.add_(1)),
        changed(lambda model: model.double()),
        changed(lambda model: model.bfloat16()),
        changed(lambda model: model.add_module("more", nn.Linear(1, 1))),
    ]
    assert len(set(hashes)) == len(hashes)


def test_hash_looks_through_compilation():
    plain, model = build(Classifier), build(Classifier)
    model.network[0] = torch.compile(model.network[0], backend="eager")
    assert weight_hash(model) == weight_hash(plain)
    assert weight_hash(torch.compile(build(Classifier), backend="eager")) == weight_hash(plain)


# ---- borrowing --------------------------------------------------------------------------------------------------


class WithExtraState(nn.Module):
    """State that is no tensor, as torchao's and transformer-engine's layers keep."""

    def __init__(self):
        super().__init__()
        self.layer, self.extra = nn.Linear(2, 2), {"scale": 1}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize("kind", [ConvNet, Classifier, WithExtraState])
def test_borrowed_model_is_given_back(kind):
    model, other = build(kind), build(kind, seed=1)
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    before, identities = weight_hash(model), [id(p) for p in model.parameters()]
    with borrowed(model, other.state_dict(), None) as device:
        assert device == torch.device("cpu")
        assert not any(module.training for module in model.modules())
        assert weight_hash(model) == weight_hash(other)
    assert weight_hash(model) == before
    assert [module.training for module in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == identities


def test_borrowed_model_is_given_back_after_an_exception():
    model = build(ConvNet)
    before = weight_hash(model)

    def fail():
        with borrowed(model, build(ConvNet, seed=1).state_dict(), None):
            model.network[1].running_mean += 5
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert weight_hash(model) == before
    assert all(module.training for module in model.modules())
    assert hooks_of(model) == []


def test_the_models_own_device():
    blank = nn.Linear(2, 2, device="meta")
    with borrowed(blank, None, None) as device:
        assert device.type == "meta"


def test_weights_under_other_names():
    plain, compiled = build(Classifier), build(Classifier, seed=1)
    compiled.network[0] = torch.compile(compiled.network[0], backend="eager")
    assert any("_orig_mod" in name for name in compiled.state_dict())
    with borrowed(plain, compiled.state_dict(), None):
        assert weight_hash(plain) == weight_hash(compiled)
    with borrowed(compiled, plain.state_dict(), None):
        assert weight_hash(plain) == weight_hash(compiled)


def test_weights_that_do_not_fit_are_refused_by_name():
    model = build(Classifier)
    before = weight_hash(model)
    state = model.state_dict()
    cases = {
        r"missing: network\.2\.bias": {name: value for name, value in state.items() if name != "network.2.bias"},
        r"not in the model: ghost": state | {"ghost": torch.ones(1)},
        r"network\.2\.bias is \(4,\), the model has \(3,\)": state | {"network.2.bias": torch.ones(4)},
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=f"do not fit Classifier.*{message}"), borrowed(model, given, None):
            raise AssertionError("nothing may run")
    assert weight_hash(model) == before
    assert model.training


# ---- checkpoints ------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ("code has run",)


def test_a_checkpoint_never_runs_code(tmp_path, capsys):
    torch.save({"state_dict": {}, "payload": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(
        ValueError, match=r"evil\.ckpt holds objects .*: 'payload' \(builtins\.print\)\. .*may run code"
    ):
        load_checkpoint(tmp_path / "evil.ckpt")
    assert "code has run" not in capsys.readouterr().out


def test_a_class_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    torch.save({"state_dict": {}, "payload": Plain()}, tmp_path / "plain.ckpt")
    assert load_checkpoint(tmp_path / "plain.ckpt", weights_only=False)["state_dict"] == {}
    monkeypatch.delattr(f"{__name__}.Plain")
    with pytest.raises(ValueError, match=r"plain\.ckpt holds an object whose class cannot be imported here .*Plain"):
        load_checkpoint(tmp_path / "plain.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=r"'payload' \(tests\.model\.test_weights\.Plain\)"):
        load_checkpoint(tmp_path / "plain.ckpt")


class Plain:
    """Stands for a class of the user's training script."""


def test_checkpoints_that_are_none(tmp_path):
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds a list, expected a dictionary"):
        load_checkpoint(tmp_path / "list.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path)
    for content in (b"", b"not a checkpoint at all", bytes(100)):
        (tmp_path / "noise.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"noise\.ckpt"):
            load_checkpoint(tmp_path / "noise.ckpt")


def test_resolve_ckpt_path(tmp_path):
    model = build(Classifier)
    assert str(resolve_ckpt_path("some/where.ckpt", model)) == "some/where.ckpt"
    for name in ("best", "last"):
        with pytest.raises(ValueError, match=f"ckpt_path='{name}'.*Classifier is not attached"):
            resolve_ckpt_path(name, model)
    model.trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"no best checkpoint. Train with a ModelCheckpoint"):
        resolve_ckpt_path("best", model)


# ---- the rest ---------------------------------------------------------------------------------------------------


def test_attached_trainer(tmp_path):
    model = build(Classifier)
    assert attached_trainer(model) is None
    assert attached_trainer(nn.Linear(1, 1)) is None
    model.trainer = trainer = make_trainer(tmp_path)
    assert attached_trainer(model) is trainer


def test_a_module_that_fabric_set_up_has_no_trainer():
    from lightning.fabric import Fabric

    model = build(Classifier)
    Fabric(accelerator="cpu", devices=1).setup(model)
    assert attached_trainer(model) is None


def test_in_precision_of():
    half, double = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).double()
    value = {"x": [torch.ones(1)], "ids": torch.ones(1, dtype=torch.int64), "name": "a"}
    moved = in_precision_of(half, value)
    assert (moved["x"][0].dtype, moved["ids"].dtype, moved["name"]) == (torch.bfloat16, torch.int64, "a")
    assert in_precision_of(double, (torch.ones(1),))[0].dtype == torch.float64
    assert in_precision_of(nn.ReLU(), torch.ones(1)).dtype == torch.float32


def test_rank_zero_state_is_none_where_ranks_agree():
    assert rank_zero_state(build(ConvNet)) is None


class Counting(L.LightningModule):
    """Counts, measures and logs in its forward pass."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros(()))
        self.largest = torchmetrics.MaxMetric()

    def forward(self, x):
        self.count += 1
        self.largest.update(x.shape[0])
        self.log("size", float(x.shape[0]), on_step=False, on_epoch=True, reduce_fx="max")
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_a_forward_pass_changes_is_put_back(tmp_path):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, 4), torch.arange(48) % 3)

    def trained(*callbacks):
        torch.manual_seed(1)
        model = Counting()
        return model, train(model, DataLoader(data, 16), tmp_path, *callbacks, max_epochs=1)

    plain, without = trained()
    model, trainer = trained(StrideCallback(num_subsets=8, every_n_train_steps=1, statistics_every_n_steps=1))
    assert model.count == plain.count == 3
    assert model.largest.compute() == plain.largest.compute() == 16
    assert trainer.callback_metrics["size"] == without.callback_metrics["size"] == 16
    attribution = attribute(model, data, train_data=data, show_progress=False)
    assert attribution.metadata["record"] is not None
    assert model.count == 3
    assert model.largest.compute() == 16
    assert "log" not in vars(model)


def test_attributes_and_buffers_that_a_forward_pass_replaces_are_put_back():
    class Replacing(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen = self.seen + len(x)
            self.cache = x
            return super().forward(x)

    model = Replacing()
    before, seen = set(vars(model)), model.seen
    with borrowed(model, None, None):
        model(torch.zeros(3, 2))
        assert (model.calls, model.seen.item()) == (1, 3)
    assert set(vars(model)) == before
    assert (model.calls, model.seen.item()) == (0, 0)
    assert model.seen is seen


def test_what_a_forward_pass_changes_in_place_is_put_back():
    """Lists and other containers, also inside each other, arrays and plain tensors: the same objects as before."""

    class Keeping(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.outputs, self.history = [], {"sizes": [1], "last": None}
            self.running, self.counts = torch.ones(2), np.zeros(1)
            self.recent, self.names = deque([1, 2], maxlen=2), {"a"}
            self.loop = [self.names]
            self.loop.append(self.loop)

        def forward(self, x):
            self.outputs.append(x)
            self.history["sizes"].append(len(x))
            self.history["new"] = x
            self.running.mul_(0.5).add_(x.sum(0))
            self.counts += 1
            self.recent.append(3)
            self.names.add("b")
            return super().forward(x)

    model = Keeping()
    held = dict(vars(model))
    with borrowed(model, None, None):
        model(torch.ones(3, 2))
        assert (len(model.outputs), model.counts.item(), list(model.recent)) == (1, 1, [2, 3])
    assert all(vars(model)[name] is value for name, value in held.items())
    assert (model.outputs, model.history) == ([], {"sizes": [1], "last": None})
    assert (model.running.tolist(), model.counts.tolist()) == ([1, 1], [0])
    assert (list(model.recent), model.names, len(model.loop)) == ([1, 2], {"a"}, 2)
