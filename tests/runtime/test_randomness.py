"""Random generators that are put back."""

import random
import types
import warnings
from functools import partial

import numpy as np
import torch

from stride_lightning.runtime.randomness import preserved_random_state


def drawn(owner):
    """A number of every generator, global or held."""
    numbers = [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002
    return [*numbers, *(draw() for draw in owner.draws)]


class Collate:
    """Draws in a method, as a ``collate_fn`` may."""

    def __init__(self):
        self.rng = random.Random(4)

    def __call__(self):
        return self.rng.random()

    def method(self):
        return self.rng.random()


def test_generators_that_owners_hold_are_put_back():
    generator, rng, old, plain = torch.Generator(), np.random.default_rng(0), np.random.RandomState(0), random.Random(0)
    inner = types.SimpleNamespace(deep=({"generators": [generator, rng]},), library=np, itself=None)
    inner.itself = inner
    owner = types.SimpleNamespace(inner=inner, old=old, collate=partial(plain.random), method=Collate().method)
    owner.draws = [partial(torch.rand, (), generator=generator), rng.random, old.rand, plain.random, owner.method]
    with preserved_random_state(owner):
        expected = drawn(owner)
    assert drawn(owner) == expected


def test_what_is_reached_through_something_else_and_data_are_left_alone():
    far, among_data = random.Random(1), random.Random(2)
    beyond = types.SimpleNamespace(rng=far)
    owner = types.SimpleNamespace(trainer=beyond, data=[among_data] * 1001)
    before = far.getstate(), among_data.getstate()
    with preserved_random_state(owner, beyond=beyond):
        far.random(), among_data.random()
    assert far.getstate() != before[0]
    assert among_data.getstate() != before[1]


def test_several_devices_are_no_reason_to_warn(monkeypatch):
    """torch warns unless it is told which devices; and where CUDA has not begun, it does not begin."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with preserved_random_state():
            pass
    assert caught == []
