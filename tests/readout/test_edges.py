"""Small, lopsided and degenerate data through the front door: an answer that makes sense, or a refusal by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stride_lightning import attribute
from stride_lightning.results.attribution import Attribution
from stride_lightning.steering.attributor import StrideAttributor
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Regression, Task
from tests.helpers.tiny import perceptron, random_tensor

HOW: dict[str, Any] = {"method": "stride", "show_progress": False}


def inputs(count: int, seed: int = 0, width: int = 4) -> Tensor:
    return random_tensor(count, width, seed=seed, dtype=torch.float32)


def classes(points: Tensor, num_classes: int = 3) -> Tensor:
    """The class of each example is its largest input."""
    return points[:, :num_classes].argmax(1)


def scored(
    points: Tensor,
    targets: Tensor,
    queries: tuple[Tensor, Tensor] | None = None,
    model: nn.Module | None = None,
    task: Task | None = None,
    **options: Any,
) -> Attribution:
    model = model or perceptron(points.shape[1])
    asked = queries or (points, targets)
    return attribute(
        model,
        TensorDataset(*asked),
        train_data=TensorDataset(points, targets),
        task=task or Classification(),
        **(HOW | options),
    )


def check_sensible(attribution: Attribution, count: int, num_queries: int) -> Tensor:
    """Finite, not all alike; leaving an example out hurts itself most often."""
    scores = attribution.scores
    assert scores.shape == (num_queries, count)
    assert scores.isfinite().all()
    assert torch.as_tensor(attribution.std).isfinite().all()
    assert float(scores.abs().max()) > 0
    return scores


@pytest.mark.parametrize("count", [2, 5, 20])
def test_few_examples(count: int) -> None:
    points = inputs(count)
    targets = torch.arange(count) % 2
    scores = check_sensible(scored(points, targets, model=perceptron(4, 2)), count, count)
    # Every example helps itself, and more than it helps those of the other class on average.
    assert (scores.diagonal() > 0).all()
    same = targets[:, None] == targets
    assert float(scores[same].mean()) > 0 > float(scores[~same].mean())


def test_one_example_has_no_subsets_but_explains_itself() -> None:
    with pytest.raises(ValueError, match="A design needs at least 2 training examples, got 1"):
        scored(inputs(1), torch.tensor([1]), recovery="prior")
    scores = check_sensible(scored(inputs(1), torch.tensor([1]), recovery="closed-form"), 1, 1)
    assert float(scores) > 0


@pytest.mark.parametrize("recovery", ["prior", "closed-form"])
def test_one_class_only(recovery: str) -> None:
    """All examples say the same of every query: that class. So they help queries of it and hurt the others."""
    points, queries = inputs(20), inputs(6, seed=1)
    targets = torch.tensor([0, 0, 0, 1, 1, 2])
    attribution = scored(points, torch.zeros(20, dtype=torch.int64), (queries, targets), recovery=recovery)
    scores = check_sensible(attribution, 20, 6)
    assert (scores[:3].sum(1) > 0).all()
    assert (scores[3:].sum(1) < 0).all()
    assert float(scores[:3].abs().max()) < 0.05  # a sure thing, with twenty examples for it


def test_a_class_with_one_example() -> None:
    points = inputs(60)
    targets = classes(points, 2)
    points[7] = torch.tensor([0.0, 0.0, 6.0, 0.0])
    targets[7] = 2
    queries = torch.tensor([[0.0, 0.0, 5.0, 0.0], [2.0, -1.0, 0.0, 0.0]])
    scores = check_sensible(scored(points, targets, (queries, torch.tensor([2, 0]))), 60, 2)
    assert int(scores[0].argmax()) == 7
    assert float(scores[0, 7]) > 4 * float(scores[0].sort().values[-2])
    assert float(scores[1, 7].abs()) < float(scores[0, 7]) / 5


def test_one_percent_of_positives() -> None:
    points = inputs(400)
    targets = torch.zeros(400, dtype=torch.int64)
    positives = [3, 150, 290, 399]
    points[positives] += torch.tensor([3.0, 0.0, 0.0, 0.0])
    targets[positives] = 1
    queries = torch.tensor([[3.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    attribution = scored(points, targets, (queries, torch.tensor([1, 0])), perceptron(4, 1), BinaryClassification())
    scores = check_sensible(attribution, 400, 2)
    assert set(scores[0].topk(4).indices.tolist()) == set(positives)
    assert (scores[1, positives] < 0).all()


def test_a_class_that_only_queries_have() -> None:
    """No example can help it; the nearest ones of other classes are what hurts it."""
    points = inputs(60)
    queries = inputs(5, seed=1)
    attribution = scored(points, classes(points, 2), (queries, torch.full((5,), 2)))
    scores = check_sensible(attribution, 60, 5)
    assert (scores.sum(1) < 0).all()
    assert float((scores < 0).float().mean()) > 0.6
    assert all(loss > 3 for loss in attribution.query_info["readout loss"])


def test_a_thousand_classes() -> None:
    """More classes than examples, most of them without any."""
    points = inputs(200)
    targets = torch.arange(200) * 7 % 1000
    targets[100:] = targets[:100]
    points[100:] = points[:100] + 0.1 * inputs(100, seed=5)
    attribution = scored(points, targets, (points[:4], targets[:4]), perceptron(4, 1000), recovery="closed-form")
    scores = check_sensible(attribution, 200, 4)
    for query in range(4):
        assert set(scores[query].topk(2).indices.tolist()) == {query, query + 100}


@pytest.mark.parametrize("recovery", ["prior", "closed-form"])
def test_duplicates_have_equal_scores(recovery: str) -> None:
    points = inputs(40)
    points[20:] = points[:20]
    targets = classes(points)
    scores = check_sensible(scored(points, targets, recovery=recovery), 40, 40)
    tolerance = 1e-3 * float(scores.abs().max())
    if recovery == "closed-form":
        torch.testing.assert_close(scores[:, :20], scores[:, 20:], rtol=0, atol=tolerance)
    torch.testing.assert_close(scores[:20], scores[20:], rtol=0, atol=tolerance)


@pytest.mark.parametrize("task", [Classification(), BinaryClassification(), Regression()], ids=lambda task: task.name)
@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features(dtype: torch.dtype, value: float, task: Task) -> None:
    """The readout predicts frequencies or the mean; examples with equal targets are all the same."""
    points = torch.full((30, 4), value, dtype=dtype)
    targets = torch.arange(30) % 3
    targets = targets if isinstance(task, Classification) else (targets == 0).to(dtype)
    model = perceptron(4, 3 if isinstance(task, Classification) else 1).to(dtype)
    scores = check_sensible(
        scored(points, targets, (points[:3], targets[:3]), model, task, recovery="closed-form"), 30, 3
    )
    tolerance = 2e-3 * float(scores.abs().max())
    torch.testing.assert_close(scores, scores[:, :3].repeat(1, 10), rtol=0, atol=tolerance)
    assert (scores[:, :3].diagonal() > 0).all()


def test_constant_inputs_among_others_change_little() -> None:
    points = inputs(40)
    targets = classes(points)
    wider = torch.cat([points, torch.ones(40, 1)], 1)
    plain, padded = perceptron(4), perceptron(5)
    with torch.no_grad():
        padded[0].weight[:, :4] = plain[0].weight
        padded[0].weight[:, 4] = 0
        padded[0].bias.copy_(plain[0].bias)
    one = scored(points, targets, model=plain, recovery="closed-form").scores
    other = scored(wider, targets, model=padded, recovery="closed-form").scores
    assert float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) > 0.97


@pytest.mark.parametrize("task", [Classification(), Regression()], ids=lambda task: task.name)
def test_more_features_than_examples(task: Task) -> None:
    points = inputs(20, width=300)
    targets = classes(points) if isinstance(task, Classification) else points[:, 0]
    model = perceptron(300, 3 if isinstance(task, Classification) else 1)
    scores = check_sensible(scored(points, targets, model=model, task=task), 20, 20)
    assert (scores.diagonal() > 0).all()
    others = scores[~torch.eye(20, dtype=torch.bool)]
    assert float(scores.diagonal().mean()) > 3 * float(others.abs().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("task", [Classification(), Regression()], ids=lambda task: task.name)
def test_models_of_other_precisions(task: Task, dtype: torch.dtype) -> None:
    points = inputs(40)
    targets = classes(points) if isinstance(task, Classification) else points[:, 0] * points[:, 1]
    outputs = 3 if isinstance(task, Classification) else 1
    expected = scored(points, targets, model=perceptron(4, outputs), task=task).scores
    given = points.to(dtype) if dtype == torch.float64 else points
    attribution = scored(given, targets, model=perceptron(4, outputs).to(dtype), task=task)
    scores = check_sensible(attribution, 40, 40)
    assert scores.dtype == torch.float32
    tolerance = (0.1 if dtype == torch.bfloat16 else 5e-3) * float(expected.abs().max())
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)


def test_a_leverage_near_one() -> None:
    """An example far from all others determines its own prediction: a large effect on itself, none on the others."""
    points = inputs(40)
    targets = points[:, 0].clone()
    points[5] = torch.tensor([0.0, 0.0, 0.0, 1e4])
    targets[5] = 50.0
    attributor = StrideAttributor(show_progress=False).fit(
        nn.Sequential(nn.Linear(4, 1)), TensorDataset(points, targets), task=Regression()
    )
    effects = attributor.self_influence()
    assert effects.isfinite().all()
    assert (effects >= 0).all()
    assert int(effects.argmax()) == 5
    scores = attributor.attribute(TensorDataset(points, targets)).scores
    assert scores.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("mean", [0.0, 35.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shift_and_scale_of_regression_targets(dtype: torch.dtype, mean: float, scale: float) -> None:
    """Rankings stay; targets that single precision cannot tell apart must come as double, as they do here."""
    points = inputs(40)
    plain = (points.double().sum(1) + 0.5 * random_tensor(40, seed=3)).contiguous()
    model = nn.Sequential(nn.Linear(4, 1)).to(dtype)
    points = points.to(dtype)
    expected = scored(points, plain, model=model, task=Regression(), recovery="closed-form")
    attribution = scored(points, plain * scale + mean, model=model, task=Regression(), recovery="closed-form")
    scores = check_sensible(attribution, 40, 40)
    tolerance = 1e-5 * float(expected.scores.abs().max())
    torch.testing.assert_close(scores / scale**2, expected.scores, rtol=1e-4, atol=tolerance)
    tolerance = 1e-4 * float(torch.as_tensor(expected.std).max())
    torch.testing.assert_close(
        torch.as_tensor(attribution.std) / scale**2, torch.as_tensor(expected.std), rtol=1e-3, atol=tolerance
    )


@pytest.mark.parametrize("recovery", ["prior", "closed-form", "ridge", "lasso"])
def test_batch_size_and_order_change_only_rounding(recovery: str) -> None:
    points = inputs(30)
    targets = classes(points)
    model = perceptron().double()
    points = points.double()
    one = scored(points, targets, model=model, recovery=recovery, batch_size=30).scores
    other = scored(points, targets, model=model, recovery=recovery, batch_size=7).scores
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))
    if recovery == "closed-form":  # the others draw subsets of positions
        order = torch.arange(30).flip(0)
        turned = scored(points[order], targets[order], (points, targets), model, recovery=recovery).scores
        torch.testing.assert_close(turned[:, order], one, rtol=0, atol=1e-5 * float(one.abs().max()))
