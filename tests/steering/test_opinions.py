"""Whose answer scores explain: losses and predictions of network and readout, side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from stride_lightning import Attribution, StrideAttributor
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Regression, Task
from tests.helpers.tiny import every_task, perceptron, random_targets, random_tensor

COLUMNS = ["loss", "readout loss", "prediction", "readout prediction", "readout agrees"]
OUTPUTS = {"softmax": 3, "multi-label": 3, "binary": 1, "Gaussian": 1, "two Gaussians": 2}
TASKS: dict[str, Task] = {
    "softmax": Classification(),
    "multi-label": BinaryClassification(),
    "binary": BinaryClassification(),
    "Gaussian": Regression(noise_std=0.7),
    "two Gaussians": Regression(),
}


def asked(task: Task, num_outputs: int = 3, target: str = "label") -> tuple[StrideAttributor, TensorDataset, Any]:
    """A network that was not trained on these data: a readout often disagrees with it."""
    train, queries = (
        TensorDataset(random_tensor(size, 4, seed=seed), random_targets(task, size, num_outputs, seed + 100))
        for size, seed in ((40, 0), (25, 1))
    )
    attributor = StrideAttributor(recovery="closed-form", show_progress=False)
    attributor.fit(perceptron(num_outputs=num_outputs).double(), train, task)
    return attributor, queries, attributor.attribute(queries, target=target)


def readout_outputs(attributor: StrideAttributor, queries: TensorDataset) -> Tensor:
    """By hand: coefficients on the features ``[x, hidden, 1]`` at their scales."""
    model, fitted = attributor.model, attributor.fitted
    assert model is not None
    x, factors = queries.tensors[0], fitted.features.factors
    hidden = torch.relu(model[0](x)).detach()
    features = torch.cat([factors[0] * x, factors[1] * hidden, torch.ones(len(x), 1)], 1)
    readout = fitted.readout
    coefficients = readout.coordinates.outward(readout.coefficients)
    if readout.coordinates.centre is not None:
        moved = features[:, :-1] - readout.coordinates.centre
        return moved @ coefficients[:-1] + coefficients[-1] + readout.shift
    return features @ coefficients + readout.problem.offset


@pytest.mark.parametrize("name", TASKS)
def test_columns_are_those_of_network_and_readout(name: str) -> None:
    task = TASKS[name]
    attributor, queries, attribution = asked(task, OUTPUTS[name])
    info, (x, targets) = attribution.query_info, queries.tensors
    assert list(info) == COLUMNS
    network, readout = attributor.model(x).detach(), readout_outputs(attributor, queries)
    encoded = task.encode(targets, OUTPUTS[name]).double()
    torch.testing.assert_close(torch.tensor(info["loss"]).double(), task.loss(network, encoded), rtol=1e-5, atol=1e-5)
    losses = torch.tensor(info["readout loss"]).double()
    torch.testing.assert_close(losses, task.loss(readout, encoded), rtol=1e-5, atol=1e-5)
    for column, outputs in (("prediction", network), ("readout prediction", readout)):
        expected = predicted(task, outputs)
        expected = expected[:, 0] if expected.ndim == 2 and expected.shape[1] == 1 else expected
        torch.testing.assert_close(torch.tensor(info[column]).to(expected), expected, rtol=1e-5, atol=1e-5)
    assert info["readout agrees"] == agreement(task, attributor, network, readout).tolist()
    assert 0 < sum(info["readout agrees"]) < 25  # both are there


def predicted(task: Task, outputs: Tensor) -> Tensor:
    if isinstance(task, Classification):
        return outputs.argmax(1)
    return (outputs > 0).long() if isinstance(task, BinaryClassification) else outputs


def agreement(task: Task, attributor: StrideAttributor, network: Tensor, readout: Tensor) -> Tensor:
    """All outputs are predicted alike, or are within a standard deviation of the noise."""
    if isinstance(task, Regression):
        noise = torch.tensor(attributor.metadata["readout"]["noise_variance"])
        return ((network - readout).abs() <= noise.sqrt()).all(1)
    return (predicted(task, network) == predicted(task, readout)).reshape(len(network), -1).all(1)


@every_task
def test_agreement_is_counted_everywhere(task: Task) -> None:
    _, _, attribution = asked(task)
    agree = attribution.query_info["readout agrees"]
    assert attribution.metadata["agreement"] == {"agree": sum(agree), "queries": 25}
    assert f"readout agrees with the model on {sum(agree)} of 25 queries" in repr(attribution)
    assert list(attribution.disagreeing) == [query for query, agrees in enumerate(agree) if not agrees]


def test_it_survives_saving(tmp_path: Any) -> None:
    _, _, attribution = asked(Classification())
    again = Attribution.load(attribution.save(tmp_path / "scores"))
    assert again.query_info == attribution.query_info
    assert again.metadata["agreement"] == attribution.metadata["agreement"]


@pytest.mark.parametrize("name", ["softmax", "multi-label", "binary"])
def test_the_predicted_target_is_the_network_s(name: str) -> None:
    task = TASKS[name]
    attributor, queries, attribution = asked(task, OUTPUTS[name], target="predicted")
    network = attributor.model(queries.tensors[0]).detach()
    labelled = attributor.attribute(TensorDataset(queries.tensors[0], predicted(task, network)))
    assert torch.equal(attribution.scores, labelled.scores)
    assert attribution.query_info == labelled.query_info
    # The network is sure of it; the readout says what it says.
    encoded = task.encode(predicted(task, network), OUTPUTS[name]).double()
    expected = task.loss(readout_outputs(attributor, queries), encoded)
    losses = torch.tensor(attribution.query_info["readout loss"]).double()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_a_regression_has_no_predicted_target() -> None:
    with pytest.raises(ValueError, match="target='predicted' says nothing for a regression"):
        asked(Regression(), target="predicted")


def test_texts_have_no_readout_to_compare() -> None:
    from tests.helpers.texts import TinyLM
    from tests.steering.language.test_sequences import ask

    attribution = ask(TinyLM().eval())
    assert attribution.query_info == {}
    assert "agreement" not in attribution.metadata
    assert "readout" not in repr(attribution)


def test_a_constant_output_is_agreed_on() -> None:
    """Targets that never change have no noise; rounding is no disagreement."""
    x = random_tensor(40, 4, seed=0).float()
    targets = torch.stack([x.sum(1), torch.full((40,), 3.0)], 1)
    model = torch.nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.ones(4), torch.zeros(4)]))
        model.bias.copy_(torch.tensor([0.0, 3.0]))
    data = TensorDataset(x, targets)
    attribution = StrideAttributor(show_progress=False).fit(model, data, Regression()).attribute(data)
    assert sum(attribution.query_info["readout agrees"]) > 15  # one standard deviation of the other output


def test_operators_on_the_network_have_no_other_opinion() -> None:
    train = TensorDataset(random_tensor(40, 4, seed=0), random_targets(Classification(), 40, 3, 1))
    attributor = StrideAttributor(basis="learned", num_subsets=8, recovery="ridge", penalty=1.0, show_progress=False)
    attribution = attributor.fit(perceptron().double(), train, Classification()).attribute(train)
    assert attribution.query_info == {}
    assert "readout" not in repr(attribution)
