"""Capture of layer inputs against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stride_lightning.model.layers import find_module, layer_names
from stride_lightning.readout import activations
from stride_lightning.readout.activations import capture_inputs, pool
from stride_lightning.readout.features import choose_layers
from tests.helpers.tiny import perceptron, random_tensor


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def inputs_of(model: nn.Module, layers: list[str], *inputs: Tensor) -> dict[str, Tensor]:
    with capture_inputs(model, layers) as captured, torch.no_grad():
        model(*inputs)
    assert hooks_of(model) == 0
    return captured


def single(*shape: int, seed: int = 0) -> Tensor:
    return random_tensor(*shape, seed=seed, dtype=torch.float32)


# ---- pooling ------------------------------------------------------------------------------------------------


POOLED = {  # layer, shape of its input, most pooled features, what comes out
    "vectors": (nn.Linear(4, 2), (5, 4), 1024, lambda x: x),
    "tokens": (nn.Linear(4, 2), (3, 7, 4), 1024, lambda x: sum(x[:, token] for token in range(7)) / 7),
    "small images": (nn.Conv2d(3, 1, 1), (2, 3, 5, 4), 1024, lambda x: x.reshape(2, 60)),
    # 1024 // 64 = 16 features per channel: a 4 x 4 grid of means.
    "large images": (nn.Conv2d(64, 1, 1), (2, 64, 8, 12), 1024, lambda x: x.reshape(2, 64, 4, 2, 4, 3).mean((3, 5))),
    "the longer side": (nn.Conv2d(64, 1, 1), (2, 64, 2, 8), 1024, lambda x: x.reshape(2, 64, 2, 4, 2).mean(4)),
    "sequences before a convolution": (nn.Conv1d(3, 1, 1), (2, 3, 8), 1024, lambda x: x.reshape(2, 24)),
    "long ones": (nn.Conv1d(3, 1, 1), (2, 3, 8), 12, lambda x: x.reshape(2, 3, 4, 2).mean(3)),
    "four axes before any layer": (nn.BatchNorm2d(3), (2, 3, 4, 5), 3, lambda x: x.mean((2, 3))),
    "volumes": (nn.Conv3d(3, 1, 1), (2, 3, 4, 5, 2), 3, lambda x: x.mean((2, 3, 4))),
}


@pytest.mark.parametrize("name", POOLED)
def test_inputs_of_any_shape_are_pooled_to_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape, most, expected = POOLED[name]
    monkeypatch.setattr(activations, "MAX_POOLED_FEATURES", most)
    inputs = single(*shape)
    torch.testing.assert_close(pool(layer, inputs), expected(inputs).flatten(1))


@pytest.mark.parametrize(
    ("channels", "size", "grid"),
    [
        (1, (63, 63), (63, 63)),
        (1, (64, 64), (63, 63)),
        (3, (224, 224), (36, 36)),
        (64, (56, 56), (7, 7)),  # 64 * 7^2 = 3,136 and 64 * 8^2 = 4,096
        (250, (8, 8), (4, 4)),  # exactly 4,000
        (251, (8, 8), (3, 3)),
        (512, (7, 4), (2, 2)),
        (4000, (2, 2), (1, 1)),
        (40, (20, 4), (10, 4)),  # the short side stays as it is
    ],
)
def test_spatial_inputs_keep_the_largest_grid_of_4000_features(
    channels: int, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    inputs = single(2, channels, *size)
    expected = nn.functional.adaptive_avg_pool2d(inputs, grid).flatten(1)
    torch.testing.assert_close(pool(nn.Conv2d(channels, 1, 1), inputs), expected)
    side = max(grid)
    assert channels * side**2 <= 4000
    assert side >= max(size) or channels * (side + 1) ** 2 > 4000


def test_images_of_too_many_channels_are_folded() -> None:
    inputs = single(2, 5000, 3, 3)
    pooled = pool(nn.Conv2d(5000, 1, 1), inputs)
    assert pooled.equal(activations.fold(inputs.mean((2, 3)), 4000))


def test_inputs_of_all_layers_are_captured_in_order() -> None:
    model, inputs = perceptron(), single(5, 4)
    captured = inputs_of(model, ["0", "2"], inputs)
    torch.testing.assert_close(captured["0"], inputs)
    torch.testing.assert_close(captured["2"], (inputs @ model[0].weight.T + model[0].bias).clamp(min=0))
    assert list(captured) == ["0", "2"]


@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_and_attention_inputs_keep_their_rows(batch_first: bool) -> None:
    inputs = single(3, 7, 4)  # (batch, tokens, features)
    given = inputs if batch_first else inputs.transpose(0, 1)
    lstm = nn.LSTM(4, 5, batch_first=batch_first)
    torch.testing.assert_close(inputs_of(lstm, [""], given)[""], inputs.mean(1))
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first).eval()
    torch.testing.assert_close(inputs_of(attention, [""], given, given, given)[""], inputs.mean(1))


def test_wide_inputs_are_folded_and_keep_inner_products() -> None:
    width = activations.MAX_LAYER_FEATURES
    inputs = single(6, 5 * width) + 0.3
    folded = pool(nn.Linear(5 * width, 1), inputs)
    assert folded.shape == (6, width)
    torch.testing.assert_close(folded, pool(nn.Linear(5 * width, 1), inputs), rtol=0, atol=0)
    exact, sketched = inputs @ inputs.T / (5 * width), folded @ folded.T / (5 * width)
    assert (sketched - exact).abs().max() < 5 / width**0.5
    assert pool(nn.Linear(width, 1), inputs[:, :width]).equal(inputs[:, :width])


def test_folding_is_unbiased() -> None:
    """Averaged over many sketches the inner product is the exact one, within its standard error."""
    vectors, width = single(2, 400), 16
    products = []
    for extra in range(300):  # each width seeds its own sketch; zeros change no inner product
        padded = torch.cat([vectors, torch.zeros(2, extra)], 1)
        one, other = activations.fold(padded, width)
        products.append(float(one @ other))
    values = torch.tensor(products)
    exact = float(vectors[0] @ vectors[1])
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 300**0.5
    expected = (float(vectors[0].square().sum() * vectors[1].square().sum()) + exact**2) / width
    assert float(values.var()) == pytest.approx(expected, rel=0.4)


def test_double_stays_double_and_half_becomes_single() -> None:
    for given, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert pool(nn.Linear(3, 1), torch.ones(2, 3, dtype=given)).dtype == expected


# ---- capture ------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Calls one layer three times, the last time by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(input=self.layer(self.layer(inputs)))


def test_layers_that_run_several_times_are_averaged() -> None:
    model, inputs = Shared(), single(5, 4)
    first = model.layer(inputs)
    expected = (inputs + first + model.layer(first)) / 3
    with capture_inputs(model, ["layer"]) as captured, torch.no_grad():
        for _ in range(2):
            captured.clear()  # a new pass starts a new mean
            model(inputs)
            torch.testing.assert_close(captured["layer"], expected)


def test_captured_inputs_keep_no_graph() -> None:
    model = perceptron()
    with capture_inputs(model, ["2"]) as captured:
        model(single(2, 4))
    assert not captured["2"].requires_grad


def test_layers_that_did_not_run_are_missing() -> None:
    model = perceptron()
    with capture_inputs(model, ["0", "2"]) as captured:
        model[0](single(2, 4))
    assert list(captured) == ["0"]


def compiled(how: str) -> tuple[nn.Module, nn.Module]:
    """A model in which something is compiled, and its plain twin."""
    inner, plain = (nn.Sequential(perceptron(), nn.Linear(3, 2)) for _ in range(2))
    plain.load_state_dict(inner.state_dict())
    if how == "assigned":
        inner[0] = torch.compile(inner[0], backend="eager")
    elif how == "in place":
        inner[0].compile(backend="eager")
    elif how == "leaf":
        inner[0][2] = torch.compile(inner[0][2], backend="eager")
    elif how == "whole":
        inner = torch.compile(inner, backend="eager")
    else:
        inner.compile(backend="eager")
    return inner.eval(), plain.eval()


@pytest.mark.parametrize("how", ["assigned", "in place", "leaf", "whole", "whole in place"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "already compiled"])
def test_compiled_modules_are_seen(how: str, warm: bool) -> None:
    torch.compiler.reset()
    model, plain = compiled(how)
    inputs, layers = single(5, 4), ["0.0", "0.2", "1"]
    if warm:
        with torch.no_grad():
            model(inputs)
    assert layer_names(model) == choose_layers(model, lambda: model(inputs), 5) == layers
    captured, expected = inputs_of(model, layers, inputs), inputs_of(plain, layers, inputs)
    assert list(captured) == layers
    torch.testing.assert_close(captured, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), plain(inputs))


def test_compiled_modules_are_found_by_their_plain_name() -> None:
    model, _ = compiled("assigned")
    assert find_module(model, "0.2") is model[0]._orig_mod[2]
    assert find_module(model, "0") is model[0]._orig_mod
    whole, _ = compiled("whole")
    assert find_module(whole, "") is whole._orig_mod
    assert find_module(whole, "0.2") is whole._orig_mod[0][2]


def test_compiled_modules_run_compiled_again_afterwards() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = torch.compile(perceptron(), backend=backend)
    inputs_of(model, ["2"], single(5, 4))
    assert graphs == []
    model(single(5, 4))
    assert len(graphs) == 1


def test_no_hooks_are_left_after_an_exception() -> None:
    model = perceptron()
    with pytest.raises(RuntimeError), capture_inputs(model, ["0", "2"]):
        model(single(5, 3))
    with pytest.raises(ValueError, match="not a submodule"), capture_inputs(model, ["0", "nowhere"]):
        pass
    assert hooks_of(model) == 0


def test_the_user_s_own_hooks_stay() -> None:
    model = perceptron()
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    with capture_inputs(model, ["0"]):
        model(single(5, 4))
    assert hooks_of(model) == 1
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["3", "0.weight", "forward"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is not a submodule of Sequential. Layers with weights: '0', '2'"):
        find_module(perceptron(), name)


@pytest.mark.parametrize(
    ("inputs", "given"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), r"torch.int64 of shape \(3, 2\)"),
        (torch.zeros(2), r".*shape \(2,\)"),
        ("text", "no tensor"),
    ],
)
def test_inputs_without_rows_of_numbers_are_refused(inputs: Tensor | str, given: str) -> None:
    model = nn.Sequential(nn.Identity())
    with (
        capture_inputs(model, ["0"]),
        pytest.raises(TypeError, match=rf"Layer '0' must take a floating-point tensor .* first input is {given}"),
    ):
        model(inputs)
    assert hooks_of(model) == 0
