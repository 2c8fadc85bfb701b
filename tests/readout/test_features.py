"""Features against numpy, and the evaluation pass in them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.model.layers import layer_names
from stride_lightning.readout import features as features_module
from stride_lightning.readout.activations import fold
from stride_lightning.readout.features import FeatureMap, Observation, choose_layers, fit_features, observe
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Regression
from tests.helpers.models import Dicts, DictTask
from tests.helpers.tiny import CPU, examples_of, perceptron, random_tensor

LAYERS = ["0", "2"]
TASK = Classification()
INPUTS = random_tensor(50, 4, seed=0) * torch.tensor([3.0, 1.0, 0.5, 0.1]).double() + 0.4
TARGETS = torch.arange(50) % 3
SETTINGS: dict[str, Any] = {"batch_size": 16, "device": CPU, "show_progress": False}


def model() -> nn.Sequential:
    return perceptron().double()


def fit(
    inputs: Tensor = INPUTS, network: nn.Module | None = None, layers: list[str] = LAYERS, **options: Any
) -> tuple[FeatureMap, Observation]:
    return fit_features(network or model(), TASK, examples_of(inputs, TARGETS), layers, **(SETTINGS | options))


def look(features: FeatureMap, inputs: Tensor = INPUTS, targets: Tensor = TARGETS, **options: Any) -> Observation:
    """A pass in features whose scales are known."""
    return observe(model(), TASK, examples_of(inputs, targets), features, **(SETTINGS | options))


def layer_inputs(inputs: Tensor = INPUTS) -> list[np.ndarray]:
    """What enters the two layers, by numpy."""
    first = model()[0]
    hidden = inputs.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    return [inputs.numpy(), np.maximum(hidden, 0)]


def scaled(*blocks: np.ndarray) -> np.ndarray:
    """``[sqrt(b_1) z_1 / s_1, ..., sqrt(b_L) z_L / s_L, 1]``."""
    count = len(blocks)
    weights = [2 * (count - i) / (count * (count + 1)) for i in range(count)]
    energies = [(block**2).sum(1).mean() for block in blocks]
    parts = [block * np.sqrt(b / e) for block, b, e in zip(blocks, weights, energies, strict=True)]
    return np.concatenate([*parts, np.ones((len(blocks[0]), 1))], 1)


# ---- the map ------------------------------------------------------------------------------------------------


def test_features_are_the_layers_inputs_at_their_scales() -> None:
    features, observed = fit()
    np.testing.assert_allclose(observed.features, scaled(*layer_inputs()), rtol=1e-12)
    expected = [np.sqrt((block**2).sum(1).mean()) for block in layer_inputs()]
    np.testing.assert_allclose(features.scales, expected, rtol=1e-12)
    assert features.scales.dtype == torch.float64
    assert (features.layers, features.widths) == (("0", "2"), (4, 6))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_layer_weights_fall_linearly_and_add_up_to_one(count: int) -> None:
    features = FeatureMap(("",) * count, (1,) * count, torch.full((count,), 2.0).double(), 8)
    weights = (features.factors * 2).square()
    assert float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(weights / weights[-1], torch.arange(count, 0, -1).double())


def test_squared_norms_are_two_on_average_whatever_the_scale_of_the_data() -> None:
    for factor in (1e-3, 1.0, 1e4):
        observed = fit(INPUTS * factor)[1]
        assert float(observed.features.square().sum(1).mean()) == pytest.approx(2)


def test_scales_that_are_known_are_not_measured_again() -> None:
    known = torch.tensor([2.0, 0.5]).double()
    features, observed = fit(scales=known)
    assert features.scales is known
    first, second = layer_inputs()
    expected = np.concatenate([first * np.sqrt(2 / 3) / 2, second * np.sqrt(1 / 3) / 0.5, np.ones((50, 1))], 1)
    np.testing.assert_allclose(observed.features, expected, rtol=1e-12)


def test_observe_reproduces_the_pass_exactly() -> None:
    features, observed = fit()
    again = look(features)
    torch.testing.assert_close(again.features, observed.features, rtol=1e-12, atol=0)
    for name in ("outputs", "encoded", "losses"):
        assert torch.equal(getattr(again, name), getattr(observed, name))
    assert again.fingerprint == observed.fingerprint
    queries = look(features, INPUTS[7:9], TARGETS[7:9])
    torch.testing.assert_close(queries.features, observed.features[7:9], rtol=1e-12, atol=0)
    some = observed.select(slice(10, 13))
    assert len(some) == 3
    for name in ("features", "outputs", "encoded", "losses"):
        assert torch.equal(getattr(some, name), getattr(observed, name)[10:13])


def test_pass_holds_outputs_targets_and_losses() -> None:
    _, observed = fit()
    with torch.no_grad():
        outputs = model()(INPUTS)
    torch.testing.assert_close(observed.outputs, outputs)
    assert torch.equal(observed.encoded, nn.functional.one_hot(TARGETS, 3).double())
    torch.testing.assert_close(observed.losses, nn.functional.cross_entropy(outputs, TARGETS, reduction="none"))
    assert observed.fingerprint["num_examples"] == len(observed) == 50


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_batch_size_changes_only_rounding(batch_size: int) -> None:
    one, other = fit()[1], fit(batch_size=batch_size)[1]
    for name in ("features", "outputs", "losses"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-12, atol=1e-12)
    assert other.fingerprint == one.fingerprint


def test_dead_layers_add_nothing() -> None:
    network = model()
    network[0].bias.data.fill_(-1e6)
    features, observed = fit(network=network)
    assert features.scales[1] == 1
    assert not observed.features[:, 4:-1].any()
    np.testing.assert_allclose(observed.features[:, :4], INPUTS * float(features.factors[0]), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_models_of_any_precision(dtype: torch.dtype) -> None:
    features, observed = fit(INPUTS.float(), perceptron().to(dtype))
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    for value in (observed.features, observed.outputs, observed.encoded, observed.losses):
        assert value.dtype == precision
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(observed.features.double(), fit()[1].features, rtol=tolerance, atol=tolerance)
    again = observe(perceptron().to(dtype), TASK, examples_of(INPUTS.float(), TARGETS), features, **SETTINGS)
    torch.testing.assert_close(again.features, observed.features, rtol=1e-4, atol=1e-5)


def test_targets_of_double_precision_stay_so() -> None:
    """Targets about 2,000 that differ by thousandths lose their differences in single precision."""
    network, targets = nn.Sequential(nn.Linear(4, 1)), 2000 + 1e-3 * INPUTS.sum(1)
    _, observed = fit_features(network, Regression(), examples_of(INPUTS.float(), targets), ["0"], **SETTINGS)
    assert observed.features.dtype == observed.outputs.dtype == torch.float32
    assert torch.equal(observed.encoded[:, 0], targets)


def test_dictionary_batches_and_single_outputs() -> None:
    data = Examples(Dicts(TensorDataset(INPUTS, TARGETS)))
    _, observed = fit_features(model(), DictTask(), data, LAYERS, **SETTINGS)
    torch.testing.assert_close(observed.features, fit()[1].features)
    network = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    _, observed = fit_features(network, Regression(), examples_of(INPUTS, INPUTS.sum(1)), ["0"], **SETTINGS)
    assert observed.outputs.shape == observed.encoded.shape == (50, 1)
    torch.testing.assert_close(observed.encoded[:, 0], INPUTS.sum(1))


def test_predicted_targets_stand_in_for_missing_ones() -> None:
    features, observed = fit()
    unlabelled = examples_of(INPUTS)
    guessed = observe(model(), TASK, unlabelled, features, target="predicted", **SETTINGS)
    assert torch.equal(guessed.encoded.argmax(1), observed.outputs.argmax(1))
    assert (guessed.losses <= observed.losses + 1e-12).all()
    with pytest.raises(ValueError, match=r"The batch has no targets, .* pass target='predicted'"):
        observe(model(), TASK, unlabelled, features, **SETTINGS)
    signs = observe(model(), BinaryClassification(), unlabelled, features, target="predicted", **SETTINGS)
    assert torch.equal(signs.encoded, (signs.outputs > 0).double())


# ---- too many features --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "widths"), [(11, (4, 6)), (10, (4, 5)), (9, (4, 4)), (8, (3, 4)), (3, (1, 1))])
def test_many_features_are_folded_in_each_layer(
    limit: int, widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With more examples than ``MAX_FEATURES``, features with the constant are no more than these."""
    monkeypatch.setattr(features_module, "MAX_FEATURES", limit)
    features, observed = fit(show_progress=True)
    assert features.widths == widths
    first, second = (fold(torch.from_numpy(block), width) for block, width in zip(layer_inputs(), widths, strict=True))
    np.testing.assert_allclose(observed.features, scaled(first.numpy(), second.numpy()), rtol=1e-12)
    torch.testing.assert_close(look(features).features, observed.features, rtol=1e-12, atol=0)
    printed = capsys.readouterr()
    line = f"STRIDE folds 10 features of an example to {sum(widths)}."
    assert (printed.out + printed.err).count(line) == (widths != (4, 6))


def test_few_examples_keep_all_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "MAX_FEATURES", 60)
    wide, network = random_tensor(50, 90, seed=0), nn.Sequential(nn.Linear(90, 3)).double()
    assert fit(wide, network, ["0"])[0].widths == (90,)
    monkeypatch.setattr(features_module, "MAX_FEATURES", 49)
    assert fit(wide, network, ["0"])[0].widths == (48,)


def wide_fit(network: nn.Module, **options: Any) -> tuple[FeatureMap, Observation]:
    return fit(random_tensor(50, 200, seed=0).to(network[0].weight.dtype), network, ["0"], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_beyond_the_budget_are_folded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(200, 3)).to(dtype)
    bytes_each = 50 * dtype.itemsize  # of one feature
    for budget, width in ((201 * bytes_each, 200), (200 * bytes_each, 199), (100 * bytes_each, 99), (1, 63)):
        monkeypatch.setattr(features_module, "MAX_BYTES", budget)
        features, observed = wide_fit(network)
        assert features.widths == (width,)
        assert observed.features.shape == (50, width + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_beyond_the_budget_go_to_a_folder(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = nn.Sequential(nn.Linear(200, 3)).to(dtype)
    expected = wide_fit(network)[1].features
    monkeypatch.setattr(features_module, "MAX_BYTES", 1)
    folder = tmp_path / "cache" / "features"
    features, observed = wide_fit(network, cache_dir=folder, show_progress=True)
    assert features.widths == (200,)
    torch.testing.assert_close(observed.features, expected, rtol=1e-6, atol=1e-9)
    assert is_mapped(observed.features)
    assert not is_mapped(expected)
    assert list(folder.iterdir()) == []  # the file is gone as soon as nobody reads it
    assert "folds" not in "".join(capsys.readouterr())


def is_mapped(values: Tensor) -> bool:
    """Whether the memory of a tensor belongs to a file."""
    address = values.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return name.startswith("/")
    return False


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
    network, tokens = Backwards(), torch.zeros(5, 3, dtype=torch.int64)
    assert layer_names(network) == ["last", "unused", "on_table", "first"]
    assert choose_layers(network, lambda: network(tokens), 5) == ["first", "last"]


class Twice(nn.Module):
    """Calls its first layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(inputs)))


def test_layers_that_run_twice_enter_once() -> None:
    network = Twice().double()
    assert choose_layers(network, lambda: network(INPUTS), 50) == ["shared", "head"]
    observed = fit(network=network, layers=["shared", "head"])[1]
    with torch.no_grad():
        once = network.shared(INPUTS)
        expected = scaled(((INPUTS + once) / 2).numpy(), network.shared(once).numpy())
    np.testing.assert_allclose(observed.features, expected, rtol=1e-12)


def test_at_most_eight_layers_are_evenly_spaced_from_first_to_last() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(13)))

    def choose(*limit: int) -> list[str]:
        return choose_layers(network, lambda: network(torch.ones(3, 2)), 3, *limit)

    assert choose() == ["0", "2", "3", "5", "7", "9", "10", "12"]
    assert choose(4) == ["0", "4", "8", "12"]
    assert choose(13) == [str(i) for i in range(13)]
    assert choose(1) == ["0"]
    for depth in range(9, 60):
        network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))
        chosen = [int(name) for name in choose()]
        assert (len(chosen), chosen[0], chosen[-1]) == (8, 0, depth - 1)
        gaps = {later - earlier for earlier, later in pairwise(chosen)}
        assert max(gaps) - min(gaps) <= 1


def test_choosing_keeps_neither_graph_nor_hooks() -> None:
    network, outputs = perceptron(), []
    choose_layers(network, lambda: outputs.append(network(torch.ones(5, 4))), 5)
    assert not outputs[0].requires_grad
    with pytest.raises(RuntimeError):
        choose_layers(network, lambda: network(torch.ones(5, 3)), 5)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_models_without_layers_are_refused() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    with pytest.raises(ValueError, match="Found no layer of Sequential with a weight matrix"):
        choose_layers(network, lambda: network(torch.ones(5, 3)), 5)


# ---- failures -----------------------------------------------------------------------------------------------


def poisoned(position: int) -> Tensor:
    inputs = INPUTS.clone()
    inputs[position, 2] = torch.nan
    return inputs


@pytest.mark.parametrize("limit", [4096, 8])
@pytest.mark.parametrize("position", [0, 15, 16, 37, 49])
def test_inputs_that_are_not_finite_are_named_by_position(
    position: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "MAX_FEATURES", limit)
    features, inputs, some = fit()[0], poisoned(position), examples_of(poisoned(position), TARGETS)
    some.positions = torch.tensor([3, 8, 11, position])
    for failing in (
        lambda: fit(inputs),
        lambda: look(features, inputs),
        lambda: fit_features(model(), TASK, some, LAYERS, **SETTINGS),
    ):
        with pytest.raises(ValueError, match=f"Example {position} has NaN in its features"):
            failing()


def test_inputs_whose_squares_overflow_are_refused() -> None:
    inputs, network = INPUTS.clone(), nn.Sequential(nn.Linear(4, 3)).double()
    inputs[20, 1] = 1e200
    with pytest.raises(ValueError, match="The input of layer '0' is not finite on the training set"):
        fit(inputs, network, ["0"])


def test_outputs_that_are_not_finite_are_refused() -> None:
    network = model()
    network[2].bias.data[1] = torch.inf
    with pytest.raises(ValueError, match=r"Example 0 has an infinite number in its outputs, .*did training diverge"):
        fit(network=network)


def test_targets_that_are_not_finite_are_refused() -> None:
    targets = INPUTS.sum(1)
    targets[21] = torch.nan
    network = nn.Sequential(nn.Linear(4, 1)).double()
    with pytest.raises(ValueError, match="Example 21 has NaN in its target"):
        fit_features(network, Regression(), examples_of(INPUTS, targets), ["0"], **SETTINGS)


def test_layers_that_do_not_run_are_refused() -> None:
    network = model()
    network.unused = nn.Linear(2, 2)
    network.forward = lambda inputs: network[2](network[1](network[0](inputs)))
    with pytest.raises(ValueError, match="Layer 'unused' did not run in the model's forward pass"):
        fit(network=network, layers=["0", "unused"])


def test_empty_training_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="The training set is empty"):
        fit_features(model(), TASK, examples_of(INPUTS[:0], TARGETS[:0]), LAYERS, **SETTINGS)


class TokensFirst(nn.Module):
    """Puts the tokens before the batch, as sequence-first transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.embed(inputs).expand(2, -1, -1)  # (tokens, B, d)
        return self.head(self.mix(tokens).mean(0))


@pytest.mark.parametrize("layers", [["mix"], ["embed", "mix"]])
def test_layers_whose_rows_are_not_examples_are_refused(layers: list[str]) -> None:
    with pytest.raises(TypeError, match=r"Layer 'mix' .* one row per example"):
        fit(network=TokensFirst().double(), layers=layers)


def test_nothing_is_left_behind_after_an_error() -> None:
    """Also while the error is kept, as a notebook keeps the last one: no hooks, gradients on, compilation on."""
    network = model()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    features, _ = fit()
    for failing in (
        lambda: fit(poisoned(3), network),
        lambda: observe(network, TASK, examples_of(poisoned(3), TARGETS), features, **SETTINGS),
        lambda: observe(network, TASK, examples_of(INPUTS), features, **SETTINGS),
    ):
        with pytest.raises(ValueError, match=r".") as caught:
            failing()
        assert sum(len(module._forward_pre_hooks) for module in network.modules()) == 0
        assert torch.is_grad_enabled()
        with torch.no_grad():
            torch.compile(perceptron(), backend=backend)(torch.ones(2, 4))
        assert len(graphs) == 1
        graphs.clear()
        torch.compiler.reset()
        assert caught.value.__traceback__ is not None


def test_forward_passes_fit_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are smaller where a layer's input is large; features are the same."""
    sizes: list[int] = []
    model = nn.Sequential(nn.Linear(4, 500), nn.ReLU(), nn.Linear(500, 3)).double()
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    data = examples_of(random_tensor(40, 4, seed=0), torch.arange(40) % 3)
    how = {"batch_size": 40, "device": CPU, "show_progress": False}
    _, whole = fit_features(model, Classification(), data, ["0", "2"], **how)
    assert max(sizes) == 40
    sizes.clear()
    monkeypatch.setattr(features_module, "FORWARD_BYTES", 4 * 500 * 8 * 5)  # four times five inputs of the widest layer
    _, parts = fit_features(model, Classification(), data, ["0", "2"], **how)
    assert sizes[1:] == [5] * 8
    torch.testing.assert_close(parts.features, whole.features)
