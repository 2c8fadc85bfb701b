"""Per-example gradients of every kind of layer against ordinary gradients of one example after the other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from stride_lightning import Classification
from stride_lightning.gradients.planned import TaskOutputs
from stride_lightning.model.capture import Outputs, chosen_parameters
from stride_lightning.model.plan import plan_capture
from tests.helpers.gradient_models import (
    GPT2,
    Adapter,
    Attention,
    DictModel,
    Recurrent,
    SameWeight,
    Scaled,
    TiedHead,
    Transformer,
    Twice,
    check_same_condition,
    condition_of,
    mlp,
    seeded,
    tokens,
)
from tests.helpers.tiny import random_tensor

NUM = 5


def points(size=6):
    return random_tensor(NUM, size, seed=1)


def pictures(*shape):
    return random_tensor(NUM, 2, *shape, seed=1)


def conv(*shape, after, out_channels=3, kind=None, **options):
    """A convolution of 2 channels of some shape, with a head on what is left of them."""
    kind = kind or {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape)]

    def make():
        layer = kind(2, out_channels, **options)
        return nn.Sequential(layer, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(after, 3))

    return make, pictures(*shape)


def norms():
    normed = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.GroupNorm(2, 4)
    return nn.Sequential(*normed, nn.Flatten(), nn.Linear(16, 3))


def frozen_in_part():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3))


FACTORS, VECTORIZED, ONE_BY_ONE = "factors", "vectorized", "one by one"
#: Model and inputs.
CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)), points()),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)), points()),
    "the model is a layer": (lambda: nn.Linear(6, 3), points()),
    "conv1d": conv(9, after=16, out_channels=4, kernel_size=3, stride=2, dilation=2, padding=1),
    "conv1d no bias": conv(5, after=9, kernel_size=3, bias=False),
    "conv2d": conv(5, 4, after=27, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
    "conv3d": conv(3, 2, 3, after=12, kernel_size=2),
    "same": conv(6, after=18, kernel_size=4, padding="same", dilation=1),
    "valid": conv(6, after=9, kernel_size=4, padding="valid"),
    "circular": conv(4, 4, after=48, kernel_size=3, padding=(1, 1), padding_mode="circular"),
    "reflect": conv(4, 5, after=84, kernel_size=3, padding=(1, 2), stride=1, padding_mode="reflect"),
    "grouped": conv(5, after=12, out_channels=4, kernel_size=3, groups=2),
    "transposed": conv(4, after=15, kind=nn.ConvTranspose1d, kernel_size=2),
    "norms": (norms, pictures(3, 3)),
    "layer norms": (
        lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.RMSNorm(4), nn.PReLU(), nn.Linear(4, 3)),
        points(),
    ),
    "places": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Flatten()),
        random_tensor(NUM, 3, 4, seed=1),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)),
        tokens(NUM, 3, size=3),
    ),
    "tied head": (TiedHead, tokens(NUM, 4)),
    "twice": (Twice, points()),
    "same weight": (SameWeight, points()),
    "attention": (Attention, random_tensor(NUM, 3, 4, seed=1)),
    "transformer": (Transformer, tokens(NUM, 3)),
    "gpt2": (GPT2, tokens(NUM, 3, size=7)),
    "lstm": (Recurrent, random_tensor(NUM, 3, 4, seed=1)),
    "weight norm": (weight_normed, points()),
    "adapter": (Adapter, points()),
    "frozen in part": (frozen_in_part, points()),
    "raw parameters": (Scaled, points()),
    "one output": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)), points()),
    "dictionary": (DictModel, {"words": tokens(NUM, 3), "numbers": points()}),
}


def both(*layers, names=("weight", "bias")):
    return [f"{layer}.{name}" for layer in layers for name in names]


IN_AND_OUT = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
#: Blocks that are not read by factors, but vectorised; those of the LSTM one by one.
OTHER_WAYS = {
    "grouped": both("0"),
    "transposed": both("0"),
    "norms": both("1", "3"),
    "layer norms": [*both("0"), "2.weight", "3.weight"],
    "tied head": both("norm"),
    "twice": both("unused"),
    "same weight": ["one.bias", "two.bias"],
    "attention": both("attention", names=IN_AND_OUT),
    "transformer": ["positions", *both("layer.self_attn", names=IN_AND_OUT), *both("layer.norm1", "layer.norm2")],
    "gpt2": both("model.transformer.h.0.ln_1", "model.transformer.h.0.ln_2", "model.transformer.ln_f"),
    "lstm": both("recurrent", names=["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]),
    "weight norm": ["0.bias", *(f"0.parametrizations.weight.original{i}" for i in range(2))],
    "frozen in part": ["2.bias"],
    "raw parameters": ["scale", "shift"],
}


def cut(inputs, rows):
    return pytree.tree_map(lambda leaf: leaf[rows], inputs)


def planned(model, inputs, **options):
    outputs = TaskOutputs(model, Classification())
    return plan_capture(outputs, [cut(inputs, slice(i, i + 1)) for i in range(2)], **options)


def gradients_by_hand(capture, inputs, directions):
    """By name, one example after the other."""
    by_name = {name: [] for name in capture.parameters}
    for i, direction in enumerate(directions):
        with torch.enable_grad():
            outputs = capture.outputs(cut(inputs, slice(i, i + 1)))
            given = torch.autograd.grad(outputs, [*capture.parameters.values()], direction[None], allow_unused=True)
        for (name, parameter), gradient in zip(capture.parameters.items(), given, strict=True):
            by_name[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {name: torch.stack(gradients) for name, gradients in by_name.items()}


def gradients_of_sums(capture, inputs):
    """Gradients of the sum of each example's outputs."""
    with capture.watch() as backward:
        outputs = backward.run(inputs, len(inputs))
        return backward.gradients(torch.ones_like(outputs))


def check_one(capture, inputs, name):
    """The gradient in one parameter that has a block of its name, against single examples."""
    with torch.no_grad():
        directions = torch.ones_like(capture.outputs(inputs))
    expected = gradients_by_hand(capture, inputs, directions)[name]
    gradient = capture.layouts[name].split(gradients_of_sums(capture, inputs)[name].dense())[name]
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop because")  # torch's, of weight_norm under vmap
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's, of a copy that it makes
@pytest.mark.parametrize("name", CASES)
def test_every_layer(name):
    make, inputs = CASES[name]
    model, way = seeded(make), ONE_BY_ONE if name == "lstm" else VECTORIZED
    before = condition_of(model)
    capture = planned(model, inputs)
    with capture.watch() as backward:
        outputs = backward.run(inputs, NUM)
        directions = random_tensor(*outputs.shape, seed=2)
        backward.gradients(random_tensor(*outputs.shape, seed=3), last=False)
        gradients = backward.gradients(directions)
    assert not outputs.requires_grad

    expected = gradients_by_hand(capture, inputs, directions)
    assert set(expected) == {plain for plain, p in model.named_parameters() if p.requires_grad}
    by_name = {}
    for block, layout in capture.layouts.items():
        vectors = gradients[block].dense()
        parts = layout.split(vectors)
        assert torch.equal(layout.join(parts), vectors)
        assert layout.num_parameters == gradients[block].size
        assert not by_name.keys() & parts.keys()
        by_name |= parts
    torch.testing.assert_close(by_name, {key: expected[key] for key in by_name}, rtol=1e-9, atol=1e-12)
    assert by_name.keys() == expected.keys()
    together = torch.cat([expected[key].reshape(NUM, -1) for key in expected], 1)
    torch.testing.assert_close(gradients.inner(gradients), together @ together.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients.squared_norms(), together.square().sum(1), rtol=1e-9, atol=1e-12)

    # A block that falls back to a slower way in silence would pass everything above.
    ways = {block: layout.way for block, layout in capture.layouts.items() if layout.way != FACTORS}
    assert ways == dict.fromkeys(OTHER_WAYS.get(name, ()), way)
    assert capture.described()["num_parameters"] == together.shape[1]
    check_same_condition(before, model)


@pytest.mark.parametrize("shape", [(NUM, 6), (NUM, 3, 6)], ids=["vectors", "places"])
def test_operations_in_place_after_a_layer_keep_it_fast(shape):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Flatten()))
    capture = planned(model, random_tensor(*shape, seed=1))
    assert capture.described()["blocks"] == {FACTORS: 2}


class Gated(nn.Module):
    """Hands its layer a tensor that is the same for all examples."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(NUM))

        def forward(self, x, factors):
            return x * self.weight * factors

    def __init__(self):
        super().__init__()
        self.gate, self.out = self.Gate(), nn.Linear(NUM, 3)
        self.register_buffer("factors", torch.arange(1.0, NUM + 1))

    def forward(self, x):
        return self.out(self.gate(x, self.factors))


@pytest.mark.parametrize("num", [2, NUM, 7])
def test_a_tensor_as_long_as_the_batch_is_not_taken_for_a_batch(num):
    inputs = random_tensor(7, NUM, seed=0)
    check_one(planned(seeded(Gated), inputs), inputs[:num], "gate.weight")


def test_places_first():
    """A layer that sees ``(places, B, d)``: its rows are not those of one example after another."""

    class PlacesFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))

    for places in (2, 4, 3):
        inputs = random_tensor(NUM, places, 4, seed=1)
        check_one(planned(seeded(PlacesFirst), inputs), inputs, "inner.weight")


def test_a_batch_of_one_and_another_length():
    make, inputs = CASES["tied head"]
    capture = planned(seeded(make), inputs)
    for changed in (inputs[:1], inputs[:, :3], tokens(9, 4, seed=8)):
        check_one(capture, changed, "embedding.weight")


def test_hooks_go_when_something_fails():
    model = mlp()
    capture = planned(model, random_tensor(NUM, 4, seed=0))
    before = condition_of(model)
    with pytest.raises(RuntimeError, match="stop"), capture.watch():  # noqa: PT012 - what is raised must leave the block
        assert condition_of(model)["hooks"] != before["hooks"]
        raise RuntimeError("stop")
    check_same_condition(before, model)


def test_weights_may_be_exchanged():
    model, inputs = mlp(), random_tensor(NUM, 4, seed=0)
    capture = planned(model, inputs)
    model.load_state_dict(mlp(seed=3).state_dict())
    check_one(capture, inputs, "0.weight")


@pytest.mark.parametrize("rates", [{"0.weight": 0.3, "0.bias": 0.3}, {"0.weight": 0.3, "0.bias": 0.7}])
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: _conv1d_of_transformers(4, 3)])
def test_times_rates(make, rates):
    model, inputs = seeded(lambda: nn.Sequential(make())), random_tensor(NUM, 4, seed=0)
    capture = planned(model, inputs)
    layout, block = capture.layouts["0.weight"], gradients_of_sums(capture, inputs)["0.weight"]
    actual = layout.split(layout.times(block, rates).dense())
    expected = {name: value * rates[name] for name, value in layout.split(block.dense()).items()}
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-12)


def _conv1d_of_transformers(num_inputs, num_outputs):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(num_outputs, num_inputs)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (["2"], ["2.weight", "2.bias"]),
        (["2", "0"], ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ],
)
def test_chosen_layers(layers, expected):
    assert list(chosen_parameters(mlp(), layers)) == expected
    capture = planned(mlp(), random_tensor(NUM, 4, seed=0), layers=layers)
    assert [name for layout in capture.layouts.values() for name in layout.parameters] == expected


def test_bytes_of_an_example():
    """Twice its activations that the backward pass needs, and its factors; weights are not among them."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x = random_tensor(4, 5, seed=0).float()
    capture = plan_capture(Outputs(model), [x[i : i + 1] for i in range(4)])
    saved, factors = 5 + 7, (5 + 1 + 7) + (7 + 1 + 3)
    assert capture.effort(x, 4).num_bytes == 2 * 4 * (saved + factors)


def test_bytes_of_an_example_of_a_model_that_allows_no_hooks():
    """Models that use torch.func in forward cannot be watched while they run: their factors are counted alone."""

    class Inner(nn.Linear):
        def forward(self, x):
            return torch.vmap(super().forward)(x)

    x = random_tensor(4, 5, seed=0).float()
    capture = plan_capture(Outputs(Inner(5, 3)), [x[i : i + 1] for i in range(4)])
    assert capture.effort(x, 4).num_bytes >= 2 * 4 * 3


def test_what_is_slow_is_said():
    make, inputs = CASES["lstm"]
    message = planned(seeded(make), inputs).warning
    assert "recurrent.weight_ih_l0" in message
    assert "layers=[" in message
    assert planned(mlp(), random_tensor(NUM, 4, seed=0)).warning == ""


# ---- refusals ---------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 30)

    def forward(self, x):
        return F.dropout(self.linear(x), training=True)


def batch_statistics():
    """Of one example alone there are none."""
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))


def statistics_over_places():
    layers = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2, track_running_stats=False)
    return nn.Sequential(nn.Unflatten(1, (2, 3)), *layers, nn.Flatten(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("make", "named", "cure"),
    [
        (Noisy, "linear.weight", "no random numbers"),
        (batch_statistics, "0.weight|BatchNorm", "without running statistics"),
        (statistics_over_places, "1.weight|BatchNorm", "without running statistics"),
    ],
)
def test_examples_that_influence_each_other_or_chance(make, named, cure):
    model = seeded(make)
    before = condition_of(model)
    with pytest.raises(ValueError, match=named) as caught:
        planned(model, torch.cat([points(), points() + 1]))
    assert cure in str(caught.value)
    assert "layers=[" in str(caught.value)
    after = condition_of(model)
    assert (after["hooks"], after["gradients"]) == (before["hooks"], True)


@pytest.mark.parametrize("outputs", [torch.zeros(5), torch.zeros(4, 3), (torch.zeros(5, 3),), None])
def test_outputs_of_another_form_are_refused(outputs):
    module = Outputs(nn.Linear(3, 3))
    module.check(torch.zeros(5, 3), 5)
    with pytest.raises(
        TypeError, match=r"Expected outputs of shape \(5, C\) from Linear, got (shape \(|tuple|None).*\. Pass"
    ):
        module.check(outputs, 5)


def test_wrong_layers():
    model, inputs = mlp(), random_tensor(NUM, 4, seed=0)
    with pytest.raises(TypeError, match=r"write layers=\['2'\]"):
        planned(model, inputs, layers="2")
    with pytest.raises(ValueError, match=r"'7' is not a submodule of Sequential.*'0', '2'"):
        planned(model, inputs, layers=["7"])
    with pytest.raises(ValueError, match=r"^No parameter of '1' is trainable.*layers="):
        planned(model, inputs, layers=["1"])
    with pytest.raises(ValueError, match="`layers` is empty: name at least one module"):
        planned(model, inputs, layers=[])
    with pytest.raises(ValueError, match=r"^No parameter of Sequential is trainable.*requires_grad=True"):
        planned(model.requires_grad_(False), inputs)


def test_outputs_that_depend_on_nothing_trainable():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3).requires_grad_(False), nn.Linear(6, 3)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"unused|depend"):
        planned(seeded(Elsewhere), points())
