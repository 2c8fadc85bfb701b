"""The basis against numpy, and the evaluation pass in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.model.layers import layer_names
from stride_lightning.steering import basis as basis_module
from stride_lightning.readout.features import Basis, Observation, choose_layers, fit_basis, observe
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
) -> tuple[Basis, Observation]:
    return fit_basis(network or model(), TASK, examples_of(inputs, TARGETS), layers, **(SETTINGS | options))


def look(basis: Basis, inputs: Tensor = INPUTS, targets: Tensor = TARGETS, **options: Any) -> Observation:
    """A pass in a basis that is there."""
    return observe(model(), TASK, examples_of(inputs, targets), basis, **(SETTINGS | options))


def layer_inputs(inputs: Tensor = INPUTS) -> list[np.ndarray]:
    """What enters the two layers, by numpy."""
    first = model()[0]
    hidden = inputs.numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    return [inputs.numpy(), np.maximum(hidden, 0)]


def unit_energy(features: np.ndarray) -> np.ndarray:
    return features / np.sqrt((features**2).sum(1).mean())


def stacked(*blocks: np.ndarray) -> np.ndarray:
    return np.concatenate([*blocks, np.ones((len(blocks[0]), 1))], 1)


def assert_same_kernel(features: Tensor, reference: np.ndarray, tolerance: float = 1e-6) -> None:
    """The same features up to a rotation: all that a ridge can see."""
    kernel = reference @ reference.T
    np.testing.assert_allclose(features @ features.T, kernel, rtol=0, atol=tolerance * np.abs(kernel).max())


def test_features_are_the_layers_inputs_at_unit_energy() -> None:
    basis, observed = fit()
    assert_same_kernel(observed.features, stacked(*map(unit_energy, layer_inputs())))
    # Layers, each of energy one, and the constant.
    torch.testing.assert_close(basis.energies.sum(), torch.tensor(3.0).double(), rtol=1e-5, atol=0)
    expected = [np.sqrt((block**2).sum(1).mean()) for block in layer_inputs()]
    np.testing.assert_allclose(basis.scales, expected, rtol=1e-6)


def test_features_are_uncorrelated_and_sorted() -> None:
    basis, observed = fit()
    moment = observed.features.T @ observed.features / 50
    torch.testing.assert_close(moment, torch.diag(basis.energies), rtol=1e-9, atol=1e-12)
    assert (basis.energies.diff() <= 0).all()
    # Eleven features: four inputs, six hidden units and the constant, less those the training set does not span.
    reference = stacked(*map(unit_energy, layer_inputs()))
    second = np.linalg.eigvalsh(reference.T @ reference / 50)[::-1]
    spanned = second[second > 1e-6 * second.mean()]
    np.testing.assert_allclose(basis.energies, spanned, rtol=1e-5, atol=1e-9)


def test_observe_reproduces_the_pass_exactly() -> None:
    basis, observed = fit()
    again = look(basis)
    torch.testing.assert_close(again.features, observed.features, rtol=1e-12, atol=1e-12)
    for name in ("outputs", "encoded", "losses"):
        assert torch.equal(getattr(again, name), getattr(observed, name))
    assert again.fingerprint == observed.fingerprint
    queries = look(basis, INPUTS[7:9], TARGETS[7:9])
    torch.testing.assert_close(queries.features, observed.features[7:9], rtol=1e-12, atol=1e-12)
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
def test_batch_size_changes_only_rounding(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for budget in (4096, 8):
        monkeypatch.setattr(basis_module, "MAX_FEATURES", budget)
        one, other = fit()[1], fit(batch_size=batch_size)[1]
        assert_same_kernel(other.features, one.features.numpy())
        torch.testing.assert_close(other.outputs, one.outputs)
        torch.testing.assert_close(other.losses, one.losses)
        assert other.fingerprint == one.fingerprint


@pytest.mark.parametrize(("budget", "ranks"), [(8, (3, 4)), (10, (4, 5))])
def test_over_budget_wide_layers_keep_their_leading_components(
    budget: int, ranks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(basis_module, "MAX_FEATURES", budget)
    basis, observed = fit()
    reduced = []
    for block, rank in zip(map(unit_energy, layer_inputs()), ranks, strict=True):
        _, _, directions = np.linalg.svd(block, full_matrices=False)  # uncentred principal components
        reduced.append(block @ directions[:rank].T)
    shapes = [None if part is None else tuple(part.shape) for part in basis.components]
    assert shapes == [(4, 3) if ranks[0] == 3 else None, (6, ranks[1])]
    assert_same_kernel(observed.features, stacked(*reduced))
    moment = observed.features.T @ observed.features / 50
    torch.testing.assert_close(moment, torch.diag(basis.energies), rtol=1e-9, atol=1e-12)
    stored = [f"components.{index}" for index, shape in enumerate(shapes) if shape]
    assert sorted(basis.tensors()) == [*stored, "energies", "rotation", "scales"]
    restored = Basis.from_tensors(LAYERS, basis.tensors())
    assert restored.layers == basis.layers
    torch.testing.assert_close(look(restored).features, observed.features, rtol=1e-12, atol=1e-12)


def test_many_examples_leave_room_for_fewer_features(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, network = random_tensor(50, 90, seed=0), nn.Sequential(nn.Linear(90, 3)).double().eval()
    for limit, shape in ((2**31, None), (4 * 50 * 70, (90, 69)), (1, (90, 63))):
        monkeypatch.setattr(basis_module, "MAX_FEATURE_BYTES", limit)
        (part,) = fit(inputs, network, ["0"])[0].components
        assert getattr(part, "shape", None) == shape


@pytest.mark.parametrize("budget", [4096, 8])
def test_dead_layers_add_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis_module, "MAX_FEATURES", budget)
    network = model()
    network[0].bias.data.fill_(-1e6)
    basis, observed = fit(network=network)
    assert basis.scales[1] == 1
    first = unit_energy(INPUTS.numpy())
    if budget == 8:
        first = first @ np.linalg.svd(first, full_matrices=False)[2][:3].T
    assert_same_kernel(observed.features, stacked(first))
    assert observed.features.shape[1] == first.shape[1] + 1


def test_constant_features_share_one_direction_with_the_constant() -> None:
    network, inputs = nn.Sequential(nn.Linear(4, 3)).double(), INPUTS.clone()
    inputs[:, 1] = 5.0
    basis, observed = fit(inputs, network, ["0"])
    assert observed.features.shape[1] == 4
    assert_same_kernel(observed.features, stacked(unit_energy(inputs.numpy())))
    basis, observed = fit(torch.full((50, 4), 2.0).double(), network, ["0"])
    assert observed.features.shape[1] == 1
    torch.testing.assert_close(basis.energies, torch.tensor([2.0]).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_models_of_any_precision(dtype: torch.dtype) -> None:
    basis, observed = fit(INPUTS.float(), perceptron().to(dtype))
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    for value in (observed.features, observed.outputs, observed.encoded, observed.losses):
        assert value.dtype == precision
    tolerance = {torch.float16: 3e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-5)
    assert_same_kernel(observed.features, fit()[1].features.numpy(), tolerance)
    again = observe(perceptron().to(dtype), TASK, examples_of(INPUTS.float(), TARGETS), basis, **SETTINGS)
    torch.testing.assert_close(again.features, observed.features, rtol=1e-4, atol=1e-5)


def test_dictionary_batches_and_single_outputs() -> None:
    data = Examples(Dicts(TensorDataset(INPUTS, TARGETS)))
    _, observed = fit_basis(model(), DictTask(), data, LAYERS, **SETTINGS)
    assert_same_kernel(observed.features, fit()[1].features.numpy())
    network = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    _, observed = fit_basis(network, Regression(), examples_of(INPUTS, INPUTS.sum(1)), ["0"], **SETTINGS)
    assert observed.outputs.shape == observed.encoded.shape == (50, 1)
    torch.testing.assert_close(observed.encoded[:, 0], INPUTS.sum(1))


def test_predicted_targets_stand_in_for_missing_ones() -> None:
    basis, observed = fit()
    unlabelled = examples_of(INPUTS)
    guessed = observe(model(), TASK, unlabelled, basis, target="predicted", **SETTINGS)
    assert torch.equal(guessed.encoded.argmax(1), observed.outputs.argmax(1))
    assert (guessed.losses <= observed.losses + 1e-12).all()
    with pytest.raises(ValueError, match=r"The batch has no targets, .* pass target='predicted'"):
        observe(model(), TASK, unlabelled, basis, **SETTINGS)
    signs = observe(model(), BinaryClassification(), unlabelled, basis, target="predicted", **SETTINGS)
    assert torch.equal(signs.encoded, (signs.outputs > 0).double())


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


def test_layers_that_run_twice_are_named_once() -> None:
    layer = nn.Linear(4, 4)
    assert choose_layers(layer, lambda: layer(layer(torch.ones(5, 4))), 5) == [""]


def test_beyond_the_limit_layers_are_evenly_spaced() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(13)))

    def choose(*limit: int) -> list[str]:
        return choose_layers(network, lambda: network(torch.ones(3, 2)), 3, *limit)

    assert choose() == ["0", "2", "3", "5", "7", "9", "10", "12"]
    assert choose(4) == ["0", "4", "8", "12"]
    assert choose(13) == [str(i) for i in range(13)]
    assert choose(1) == ["0"]


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


@pytest.mark.parametrize("position", [0, 15, 16, 37, 49])
def test_inputs_that_are_not_finite_are_named_by_position(position: int) -> None:
    basis, inputs, some = fit()[0], poisoned(position), examples_of(poisoned(position), TARGETS)
    some.positions = torch.tensor([3, 8, 11, position])
    for failing in (
        lambda: fit(inputs),
        lambda: look(basis, inputs),
        lambda: fit_basis(model(), TASK, some, LAYERS, **SETTINGS),
    ):
        with pytest.raises(ValueError, match=f"Example {position} has NaN in its features"):
            failing()


def test_inputs_that_are_not_finite_are_refused_over_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis_module, "MAX_FEATURES", 8)
    with pytest.raises(ValueError, match="The input of layer '0' is not finite on the training set"):
        fit(poisoned(20))


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
        fit_basis(network, Regression(), examples_of(INPUTS, targets), ["0"], **SETTINGS)


def test_layers_that_do_not_run_are_refused() -> None:
    network = model()
    network.unused = nn.Linear(2, 2)
    network.forward = lambda inputs: network[2](network[1](network[0](inputs)))
    with pytest.raises(ValueError, match="Layer 'unused' did not run in the model's forward pass"):
        fit(network=network, layers=["0", "unused"])


def test_empty_training_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="The training set is empty"):
        fit_basis(model(), TASK, examples_of(INPUTS[:0], TARGETS[:0]), LAYERS, **SETTINGS)


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

    basis, _ = fit()
    for failing in (
        lambda: fit(poisoned(3), network),
        lambda: observe(network, TASK, examples_of(poisoned(3), TARGETS), basis, **SETTINGS),
        lambda: observe(network, TASK, examples_of(INPUTS), basis, **SETTINGS),
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
