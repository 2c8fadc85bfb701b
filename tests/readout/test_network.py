"""A readout of a network, from data sets on both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stride_lightning.readout.features import fit_features
from stride_lightning.readout.network import NetworkReadout, default_layers
from stride_lightning.readout.readout import Readout
from stride_lightning.tasks.likelihoods import Classification
from tests.helpers.tiny import CPU, examples_of, perceptron, random_tensor

HOW: dict[str, Any] = {"batch_size": 8, "device": CPU, "show_progress": False}
INPUTS = random_tensor(30, 4, seed=0)
TARGETS = INPUTS[:, :3].argmax(1)
TASK = Classification()


def fitted(**options: Any) -> NetworkReadout:
    return NetworkReadout.fit(perceptron().double(), TASK, examples_of(INPUTS, TARGETS), **(HOW | options))


def test_it_is_the_readout_of_the_default_layers() -> None:
    network = fitted()
    assert network.features.layers == ("0", "2")
    _, observed = fit_features(perceptron().double(), TASK, examples_of(INPUTS, TARGETS), ["0", "2"], **HOW)
    expected = Readout.fit(observed, TASK)
    torch.testing.assert_close(network.readout.coefficients, expected.coefficients)
    torch.testing.assert_close(network.train_outputs, expected.outputs(expected.problem.features))


def test_queries_that_are_training_examples_have_their_outputs() -> None:
    network = fitted()
    queries = examples_of(INPUTS[3:9], TARGETS[3:9])
    torch.testing.assert_close(network.outputs_of(queries), network.train_outputs[3:9])
    observed, points = network.observe(queries)
    assert len(observed) == len(points) == 6
    assert points.encoded.argmax(1).equal(TARGETS[3:9])
    torch.testing.assert_close(
        network.readout.losses(points), network.readout.losses(network.readout.training_points)[3:9]
    )


def test_predicted_targets_are_the_network_s() -> None:
    network, inputs = fitted(), random_tensor(50, 4, seed=7)
    _, points = network.observe(examples_of(inputs), "predicted")
    with torch.no_grad():
        predicted = perceptron().double()(inputs).argmax(1)
    assert points.encoded.argmax(1).equal(predicted)
    assert not network.outputs_of(examples_of(inputs), "predicted").argmax(1).equal(predicted)


def test_queries_need_no_training_examples() -> None:
    network, queries = fitted(), examples_of(INPUTS[3:9], TARGETS[3:9])
    light = network.without_training()
    assert len(light.readout.problem) == 0
    assert torch.equal(light.outputs_of(queries), network.outputs_of(queries))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_of_models_in_other_precisions(dtype: torch.dtype) -> None:
    assert default_layers(perceptron().to(dtype), TASK, INPUTS.float(), 30) == ["0", "2"]


def test_models_without_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="Found no layer of Sequential with a weight matrix"):
        NetworkReadout.fit(nn.Sequential(nn.ReLU()), TASK, examples_of(INPUTS, TARGETS), **HOW)
