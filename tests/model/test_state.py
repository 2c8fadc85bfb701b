"""Whether weights fit a model, and what may be missing because it is frozen."""

import pytest
import torch
from torch import nn

from stride_lightning.model.state import check_fits, frozen_names, left_to
from stride_lightning.model.weights import borrowed, weight_hash
from tests.helpers.adapters import Adapted, AdapterAlone, Backbone
from tests.helpers.models import ConvNet, build

BASE = {f"network.{place}.base.{name}" for place in (0, 2) for name in ("bias", "weight")}


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def test_frozen_names():
    assert frozen_names(build(Adapted)) == BASE
    statistics = {f"network.0.1.{name}" for name in ("num_batches_tracked", "running_mean", "running_var")}
    backbone = {f"network.0.{place}.{name}" for place in (0, 1) for name in ("bias", "weight")}
    assert frozen_names(build(Backbone)) == backbone | statistics
    assert frozen_names(build(ConvNet)) == set()
    # A buffer of a module without parameters belongs to those around it.
    inner = nn.BatchNorm1d(2, affine=False)
    assert frozen_names(nn.Sequential(nn.Linear(2, 2), inner)) == set()
    frozen = nn.Sequential(nn.Sequential(nn.Linear(2, 2), inner).requires_grad_(False), nn.Linear(2, 1))
    assert "0.1.running_mean" in frozen_names(frozen)
    assert frozen_names(inner) == set()


def test_frozen_weights_may_be_missing_and_others_not():
    model = build(Adapted)
    state = model.state_dict()
    assert check_fits(model, without(state, *BASE)).keys() == state.keys() - BASE
    assert left_to(model, without(state, *BASE)) == sorted(BASE)
    with pytest.raises(ValueError, match=r"missing: network\.0\.down\.weight\)"):
        check_fits(model, without(state, "network.0.down.weight", *BASE))
    # A model built in another process, where nothing says that the base was frozen.
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"missing: network\.0\.base\.bias.*may be missing if requires_grad is False"):
        check_fits(model, without(state, *BASE))
    convolutions = build(ConvNet)
    with pytest.raises(ValueError, match=r"missing: network\.1\.running_var"):
        check_fits(convolutions, without(convolutions.state_dict(), "network.1.running_var"))


def test_only_the_given_weights_are_touched():
    model, other = build(Adapted), build(Adapted, seed=1)
    bases = [module.base for module in (model.network[0], model.network[2])]
    versions = [value._version for base in bases for value in base.parameters()]
    before = weight_hash(model)
    with borrowed(model, without(other.state_dict(), *BASE), None):
        assert weight_hash(model) == weight_hash(other)
    assert weight_hash(model) == before
    assert [value._version for base in bases for value in base.parameters()] == versions


def test_any_part_where_the_caller_says_so():
    model = build(Adapted)
    before = weight_hash(model)
    with borrowed(model, {"network.0.base.bias": torch.zeros(8)}, None, whole=False):
        assert not model.network[0].base.bias.any()
    assert weight_hash(model) == before
    with (
        pytest.raises(ValueError, match="not in the model: ghost"),
        borrowed(model, {"ghost": torch.zeros(8)}, None, whole=False),
    ):
        raise AssertionError("nothing may run")


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_model_whose_state_leaves_its_base_out(is_whole):
    model, other = build(AdapterAlone), build(AdapterAlone, seed=1)
    state = nn.Module.state_dict(other) if is_whole else other.state_dict()
    assert len(state) == (8 if is_whole else 4)
    before = weight_hash(model)
    with borrowed(model, state, None):
        assert weight_hash(model) == weight_hash(other)
    assert weight_hash(model) == before


def test_a_state_with_names_of_its_own():
    class Exported(nn.Linear):
        def state_dict(self, *args, **kwargs):
            return {f"layer.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

        def load_state_dict(self, state, strict=True):
            return super().load_state_dict(
                {name.removeprefix("layer."): value for name, value in state.items()}, strict
            )

    model, other = Exported(2, 1), Exported(2, 1)
    with borrowed(model, other.state_dict(), None):
        assert weight_hash(model) == weight_hash(other)
    with pytest.raises(ValueError, match=r"missing: layer\.bias"):
        check_fits(model, without(other.state_dict(), "layer.bias"))
