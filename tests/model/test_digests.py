"""Digests: bytes without a copy, and frozen tensors that are hashed once and never stale."""

import ctypes
import hashlib

import pytest
import torch
from torch import nn

from stride_lightning.model import digests
from stride_lightning.model.digests import digest_of, feed, model_digests, raw_bytes
from stride_lightning.model.weights import state_hash, weight_hash
from tests.helpers.adapters import AdapterAlone
from tests.helpers.models import build

LAYOUTS = {
    "plain": torch.arange(6.0).view(2, 3),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "every other": torch.arange(8)[::2],
    "one of many": torch.arange(8)[::8],
    "part": torch.arange(8)[3:5],
    "expanded": torch.ones(1, 2).expand(3, 2),
    "number": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "bfloat16": torch.arange(3).bfloat16(),
    "bool": torch.tensor([True, False]),
    "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "trains": nn.Parameter(torch.ones(3)),
    "channels last": torch.arange(16.0).view(1, 2, 2, 4).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_of_values_in_order(name):
    tensor = LAYOUTS[name]
    values = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
    expected = values.flatten().view(torch.uint8).numpy().tobytes()
    hasher = hashlib.sha256()
    feed(hasher, tensor)
    assert raw_bytes(tensor) == expected
    assert hasher.digest() == hashlib.sha256(expected).digest()


def test_a_contiguous_tensor_is_not_copied_and_can_be_resized():
    class Address:
        def update(self, data):
            self.value = ctypes.addressof(data)

    tensor, hasher = torch.arange(10.0), Address()
    feed(hasher, tensor[2:])
    assert hasher.value == tensor[2:].data_ptr()
    tensor.untyped_storage().resize_(0)  # as FSDP does


@pytest.fixture
def frozen(monkeypatch):
    """A model with a large frozen matrix, and the shapes of the tensors that are hashed from now on."""
    model = nn.Sequential(nn.Linear(256, 128).requires_grad_(False), nn.Linear(128, 2))
    hashed = []
    monkeypatch.setattr(digests, "digest_of", lambda tensor: hashed.append(tuple(tensor.shape)) or digest_of(tensor))
    weight_hash(model)
    assert (128, 256) in hashed
    hashed.clear()
    return model, hashed


def test_what_does_not_train_is_hashed_once(frozen):
    model, hashed = frozen
    before = weight_hash(model)
    assert (128, 256) not in hashed
    assert (2, 128) in hashed
    assert before == state_hash(model.state_dict())
    model.requires_grad_(True)
    assert weight_hash(model) == before
    assert (128, 256) in hashed


@torch.no_grad()
def flip(*places):
    def change(weight):
        weight.data.view(-1)[list(places)] *= -1

    return change


CHANGES = {
    "in place": lambda weight: weight.add_(1e-3),
    "one bit": lambda weight: weight.data.view(torch.int32)[7].bitwise_xor_(1),
    "the last value": lambda weight: weight.data.view(-1)[-1:].mul_(2),
    "data": lambda weight: weight.data.mul_(0.5),
    "sign": lambda weight: weight.data.neg_(),
    "two signs in upper halves": flip(1, 3),
    "two signs in lower halves": flip(0, 2),
    "signs of one word": flip(4, 5),
    "rows": lambda weight: weight.data.copy_(weight.data.roll(1, 0)),
    "neighbours": lambda weight: weight.data.copy_(weight.data.view(128, 128, 2).flip(2).reshape(128, 256)),
    "replaced": lambda weight: setattr(weight, "data", weight.data.clone() + 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_frozen_tensor_that_changes_is_hashed_again(frozen, change):
    model, _ = frozen
    before, version = weight_hash(model), model[0].weight._version
    saved = model[0].weight.detach().clone()
    with torch.no_grad():
        CHANGES[change](model[0].weight)
    assert weight_hash(model) == state_hash(model.state_dict()) != before
    assert change == "in place" or model[0].weight._version == version  # which is why versions are not trusted
    model[0].weight.data.copy_(saved)
    assert weight_hash(model) == before


def test_bytes_that_fill_no_word_count_too():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2**16 + 1, dtype=torch.uint8), requires_grad=False)

    model = Holder()
    before = weight_hash(model)
    model.weight.data[-1] = 1
    assert weight_hash(model) == state_hash(model.state_dict()) != before


def test_order_and_part():
    model = build(AdapterAlone)
    names = ["network.2.base.weight", "network.0.base.bias"]
    part = model_digests(model, names)
    assert list(part) == names[::-1]  # the order of the model
    assert part.items() <= model_digests(model).items()


def test_the_hash_is_of_all_weights_where_checkpoints_hold_a_part():
    model = build(AdapterAlone)
    before = weight_hash(model)
    assert before == state_hash(nn.Module.state_dict(model)) != state_hash(model.state_dict())
    model.network[0].base.bias.data += 1
    assert weight_hash(model) != before
