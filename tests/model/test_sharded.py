"""Modules that torch has sharded, made plain for a while: in a group of one process, which shards like one of many."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from stride_lightning import attribute
from stride_lightning.model.sharded import is_sharded, whole
from stride_lightning.model.weights import weight_hash
from tests.helpers.models import classification_data

DATA = classification_data(20)


class Net(nn.Module):
    """Tied layers, a buffer, a frozen parameter and a second way forward."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.again = self.first
        self.first.bias.requires_grad_(False)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x):
        return self.last(self.again(self.first(x * self.scale).relu()))

    def predict(self, x):
        return self(x).argmax(1)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def with_fsdp2(net, mesh):
    fully_shard(net.first, mesh=mesh)
    fully_shard(net, mesh=mesh)
    register_fsdp_forward_method(net, "predict")


def with_checkpoints(net, mesh):
    net.last = checkpoint_wrapper(net.last)
    fully_shard(net, mesh=mesh)


def kinds_of(model):
    return [(name, type(value)) for name, value in (*model.named_modules(), *model.named_parameters())]


@pytest.mark.parametrize("shard", [with_fsdp2, with_checkpoints])
def test_a_sharded_module_is_plain_inside_and_as_before_afterwards(mesh, shard):
    torch.manual_seed(0)
    plain = Net()
    net = copy.deepcopy(plain)
    shard(net, mesh)
    net(DATA.tensors[0])  # leaves whole parameters in their places
    with whole(net):
        pass
    before, parameters = kinds_of(net), dict(net.named_parameters())
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules()]
    assert is_sharded(net)
    with whole(net):
        assert not is_sharded(net)
        assert kinds_of(net) == kinds_of(plain)
        assert weight_hash(net) == weight_hash(plain)
        assert [value.requires_grad for value in net.parameters()] == [v.requires_grad for v in plain.parameters()]
        assert net.again is net.first
        copied = copy.deepcopy(net)
        assert copied(DATA.tensors[0]).equal(plain(DATA.tensors[0]))
        assert copied.predict(DATA.tensors[0]).equal(plain.predict(DATA.tensors[0]))
        with torch.no_grad():
            net.last.weight.zero_()
    with pytest.raises(KeyError, match="out of luck"), whole(net):
        raise KeyError("out of luck")
    assert kinds_of(net) == before
    assert all(value is parameters[name] for name, value in net.named_parameters())
    assert isinstance(net, FSDPModule)
    assert all(isinstance(value, DTensor) for value in net.parameters())
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules()] == hooks
    assert net(DATA.tensors[0]).equal(plain(DATA.tensors[0]))


def test_a_sharded_module_is_attributed_like_a_plain_one(mesh):
    torch.manual_seed(0)
    plain = Net()
    net = copy.deepcopy(plain)
    with_fsdp2(net, mesh)
    how = {"train_data": DATA, "method": "grad-dot", "show_progress": False}
    assert attribute(net, DATA, **how).scores.equal(attribute(plain, DATA, **how).scores)
