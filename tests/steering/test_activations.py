"""Capture of layer inputs against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stride_lightning.model.layers import find_module, layer_names
from stride_lightning.steering import activations
from stride_lightning.steering.activations import capture_inputs, choose_layers, pool
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


def test_vectors_are_taken_as_they_are() -> None:
    model, inputs = perceptron(), single(5, 4)
    captured = inputs_of(model, ["0", "2"], inputs)
    torch.testing.assert_close(captured["0"], inputs)
    torch.testing.assert_close(captured["2"], (inputs @ model[0].weight.T + model[0].bias).clamp(min=0))
    assert list(captured) == ["0", "2"]


def test_tokens_are_averaged() -> None:
    inputs = single(3, 7, 4)
    expected = torch.stack([sum(inputs[b, t] for t in range(7)) / 7 for b in range(3)])
    torch.testing.assert_close(inputs_of(nn.Linear(4, 2), [""], inputs)[""], expected)


def test_small_images_are_kept_whole() -> None:
    inputs = single(2, 3, 5, 4)
    torch.testing.assert_close(pool(nn.Conv2d(3, 1, 1), inputs), inputs.reshape(2, 60))


def test_large_images_are_pooled_to_a_grid() -> None:
    """1024 // 64 = 16 features per channel: a 4 x 4 grid of means."""
    inputs = single(2, 64, 8, 12)
    expected = torch.stack(
        [
            torch.stack(
                [inputs[:, c, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((1, 2)) for i in range(4) for j in range(4)]
            )
            for c in range(64)
        ]
    )  # (channels, cells, B)
    torch.testing.assert_close(pool(nn.Conv2d(64, 1, 1), inputs), expected.permute(2, 0, 1).reshape(2, 1024))


def test_only_the_longer_side_is_pooled() -> None:
    inputs = single(2, 64, 2, 8)
    expected = inputs.reshape(2, 64, 2, 4, 2).mean(4).reshape(2, 512)
    torch.testing.assert_close(pool(nn.Conv2d(64, 1, 1), inputs), expected)


def test_sequences_before_a_convolution_are_pooled_along_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = single(2, 3, 8)
    torch.testing.assert_close(pool(nn.Conv1d(3, 1, 1), inputs), inputs.reshape(2, 24))
    monkeypatch.setattr(activations, "MAX_POOLED_FEATURES", 12)
    torch.testing.assert_close(pool(nn.Conv1d(3, 1, 1), inputs), inputs.reshape(2, 3, 4, 2).mean(3).reshape(2, 12))


def test_four_axes_are_channels_first_before_any_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "MAX_POOLED_FEATURES", 3)
    inputs = single(2, 3, 4, 5)
    torch.testing.assert_close(pool(nn.BatchNorm2d(3), inputs), inputs.mean((2, 3)))
    volume = single(2, 3, 4, 5, 2)
    torch.testing.assert_close(pool(nn.Conv3d(3, 1, 1), volume), volume.mean((2, 3, 4)))


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
    exact, kept = inputs @ inputs.T / (5 * width), folded @ folded.T / (5 * width)
    assert (kept - exact).abs().max() < 5 / width**0.5
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
    assert pool(nn.Linear(3, 1), torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64
    assert pool(nn.Linear(3, 1), torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.float32


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
    with capture_inputs(perceptron(), ["2"]) as captured:
        perceptron()(single(2, 4))
    model = perceptron()
    with capture_inputs(model, ["2"]) as captured:
        model(single(2, 4))
    assert not captured["2"].requires_grad


def test_layers_that_did_not_run_are_missing() -> None:
    model = perceptron()
    model.unused = nn.Linear(2, 2)
    with capture_inputs(model, ["0", "unused"]) as captured:
        model[0](single(2, 4))
    assert list(captured) == ["0"]


def compiled(how: str) -> tuple[nn.Module, nn.Module]:
    """A model in which something is compiled, and its plain twin."""
    model, plain = perceptron(), perceptron()
    inner, plain = (nn.Sequential(network, nn.Linear(3, 2)) for network in (model, plain))
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
    assert layer_names(model) == layers
    assert choose_layers(model, lambda: model(inputs), 5) == layers
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
    with pytest.raises(RuntimeError):
        choose_layers(model, lambda: model(single(5, 3)), 5)
    assert hooks_of(model) == 0


def test_the_user_s_own_hooks_stay() -> None:
    model = perceptron()
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    with capture_inputs(model, ["0"]):
        model(single(5, 4))
    assert hooks_of(model) == 1
    assert len(seen) == 1


def test_unknown_names_are_refused() -> None:
    for name in ("3", "0.weight", "forward"):
        with pytest.raises(
            ValueError, match=rf"'{name}' is not a submodule of Sequential. Layers with weights: '0', '2'"
        ):
            find_module(perceptron(), name)


@pytest.mark.parametrize(
    ("inputs", "came"),
    [(torch.zeros(3, 2, dtype=torch.int64), r"torch.int64 of shape \(3, 2\)"), (torch.zeros(2), r"shape \(2,\)")],
)
def test_inputs_without_rows_of_numbers_are_refused(inputs: Tensor, came: str) -> None:
    model = nn.Sequential(nn.Identity())
    with (
        capture_inputs(model, ["0"]),
        pytest.raises(TypeError, match=rf"Layer '0' must take a floating-point tensor .* first input is .*{came}"),
    ):
        model(inputs)
    with capture_inputs(model, ["0"]), pytest.raises(TypeError, match="its first input is no tensor"):
        model("text")
    assert hooks_of(model) == 0


# ---- choosing layers ----------------------------------------------------------------------------------------


class Backwards(nn.Module):
    """Runs its layers in another order than it defines them; has lookups, norms, an unused layer and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(9, 4)
        self.bag = nn.EmbeddingBag(9, 4)
        self.on_table = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(9, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.on_table(self.table)  # not one row per example
        hidden = self.embedding(tokens).mean(1) + self.bag(tokens) + table.mean(0)
        return self.last(self.norm(self.first(hidden)))


def test_layers_come_in_the_order_they_run() -> None:
    model, tokens = Backwards(), torch.zeros(5, 3, dtype=torch.int64)
    assert layer_names(model) == ["last", "unused", "on_table", "first"]
    assert choose_layers(model, lambda: model(tokens), 5) == ["first", "last"]
    assert hooks_of(model) == 0


def test_layers_that_run_twice_are_named_once() -> None:
    model = Shared()
    assert choose_layers(model, lambda: model(single(5, 4)), 5) == ["layer"]


def test_beyond_the_limit_layers_are_evenly_spaced() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(13)))

    def choose(*limit: int) -> list[str]:
        return choose_layers(model, lambda: model(single(3, 2)), 3, *limit)

    assert choose() == ["0", "2", "3", "5", "7", "9", "10", "12"]
    assert choose(4) == ["0", "4", "8", "12"]
    assert choose(13) == [str(i) for i in range(13)]
    assert choose(1) == ["0"]


def test_choosing_keeps_no_graph() -> None:
    model, outputs = perceptron(), []
    choose_layers(model, lambda: outputs.append(model(single(5, 4))), 5)
    assert not outputs[0].requires_grad


def test_models_without_layers_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    with pytest.raises(ValueError, match="Found no layer of Sequential with a weight matrix"):
        choose_layers(model, lambda: model(single(5, 3)), 5)
