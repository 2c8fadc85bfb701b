"""effect(): the readout refit without groups, against refits by another optimiser on the remaining examples alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from stride_lightning import StrideAttributor
from stride_lightning.data.sources import resolve_queries
from stride_lightning.readout.readout import GROUP_VARIANCE
from stride_lightning.tasks.likelihoods import BinaryClassification, Classification, Regression, Task
from tests.helpers.refusals import assert_refused
from tests.helpers.texts import Texts, TinyLM, padded
from tests.helpers.tiny import TASKS, every_task, perceptron, random_targets, random_tensor

NUM_TRAIN, GROUPS = 30, [[3], [0, 7, 21, 4], list(range(15))]
QUIET = {"show_progress": False}


def data_of(task: Task, size: int, seed: int) -> TensorDataset:
    return TensorDataset(random_tensor(size, 4, seed=seed), random_targets(task, size, 3, seed + 100))


def fitted(task: Task, **options: Any) -> StrideAttributor:
    model = perceptron().double()
    return StrideAttributor(**QUIET).fit(model, data_of(task, NUM_TRAIN, 0), task, **options)


def losses_after(attributor: StrideAttributor, queries: TensorDataset, places: list[int] | None = None) -> Tensor:
    """Of the queries under the readout for groups, trained by L-BFGS on some of its examples only."""
    task, readout = attributor.task, attributor.fitted.readout
    problem, points = readout.problem, readout.points(attributor.fitted._read(resolve_queries(queries), "label")[0])
    chosen = slice(None) if places is None else places
    features, encoded = problem.features[chosen], problem.encoded[chosen]
    # The prior of single examples in logits is 3; that of a regression is the same for groups.
    wider = 1.0 if isinstance(task, Regression) else 3.0 / GROUP_VARIANCE
    precision = wider * problem.precision
    if isinstance(task, Regression):
        precision[-1] = 0  # of the constant
    coefficients = torch.zeros(problem.shape, dtype=torch.float64, requires_grad=True)
    search = {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-12, "tolerance_change": 1e-15}
    optimizer = torch.optim.LBFGS([coefficients], max_iter=3000, history_size=50, **search)

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(problem.offset + features @ coefficients, encoded).sum()
        loss = loss + 0.5 * (precision * coefficients.square()).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    outputs = problem.offset + points.features @ coefficients.detach()
    return task.loss(outputs, points.encoded)


@every_task
def test_equals_refits_on_the_remaining_examples(task: Task) -> None:
    attributor, queries = fitted(task), data_of(task, 6, 1)
    effects = attributor.effect(queries, GROUPS)
    assert (effects.shape, effects.dtype) == ((6, 3), torch.float32)
    before = losses_after(attributor, queries)
    for group, column in zip(GROUPS, effects.T, strict=True):
        remaining = [place for place in range(NUM_TRAIN) if place not in group]
        expected = losses_after(attributor, queries, remaining) - before
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(column.double(), expected, rtol=1e-4, atol=1e-5)


@every_task
def test_removing_an_example_hurts_itself(task: Task) -> None:
    attributor = fitted(task)
    effects = attributor.effect(data_of(task, NUM_TRAIN, 0), torch.eye(NUM_TRAIN) == 1)
    assert (effects.diagonal() > 0).all()
    assert effects.diagonal().mean() > 5 * effects.abs().mean()


def test_a_single_example_is_near_its_score_and_a_group_near_the_sum() -> None:
    task = Classification()
    attributor, queries = fitted(task), data_of(task, 6, 1)
    scores = attributor.attribute(queries).scores
    single = attributor.effect(queries, [[place] for place in range(NUM_TRAIN)])
    assert torch.corrcoef(torch.stack([scores.flatten(), single.flatten()]))[0, 1] > 0.9
    summed = torch.stack([scores[:, group].sum(1) for group in GROUPS], 1)
    effects = attributor.effect(queries, GROUPS)
    assert torch.corrcoef(torch.stack([summed.flatten(), effects.flatten()]))[0, 1] > 0.8


def test_no_group_and_an_empty_group_change_nothing() -> None:
    attributor, queries = fitted(Classification()), data_of(Classification(), 6, 1)
    assert attributor.effect(queries, []).shape == (6, 0)
    assert attributor.effect(queries, [[]]).abs().max() < 1e-6


def test_groups_are_positions_masks_or_tensors_of_either() -> None:
    attributor, queries = fitted(Classification()), data_of(Classification(), 6, 1)
    expected = attributor.effect(queries, GROUPS)
    masks = torch.zeros(3, NUM_TRAIN, dtype=torch.bool)
    for mask, group in zip(masks, GROUPS, strict=True):
        mask[group] = True
    for same in (
        masks,
        masks.numpy(),
        masks.tolist(),
        [torch.tensor(group) for group in GROUPS],
        [np.array(group) for group in GROUPS],
        (range(3, 4), [4, 0, 21, 7], {*range(15)}),
    ):
        torch.testing.assert_close(attributor.effect(queries, same), expected, rtol=1e-5, atol=1e-7)
    pairs = torch.tensor([[1, 2], [3, 4]])
    torch.testing.assert_close(attributor.effect(queries, pairs), attributor.effect(queries, [[1, 2], [3, 4]]))


def test_positions_are_those_of_the_training_dataset() -> None:
    """Groups name positions of the dataset; columns of masks are examples in the order of the scores."""
    task = Classification()
    whole, chosen = data_of(task, NUM_TRAIN, 0), [25, 3, 11, 8, 0, 29, 17, 14, 5, 20, 2, 28]
    queries, model = data_of(task, 6, 1), perceptron().double()
    by_subset = StrideAttributor(**QUIET).fit(model, Subset(whole, chosen), task)
    by_indices = StrideAttributor(**QUIET).fit(model, whole, task, train_indices=chosen)
    expected = by_subset.effect(queries, [[1, 2], [5]])
    assert by_indices.attribute(queries).train_indices.tolist() == chosen
    torch.testing.assert_close(by_indices.effect(queries, [[3, 11], [29]]), expected, rtol=1e-4, atol=1e-6)
    masks = torch.zeros(2, len(chosen), dtype=torch.bool)
    masks[0, [1, 2]] = masks[1, 5] = True
    torch.testing.assert_close(by_indices.effect(queries, masks), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"Group 0 names \[1, 4\], which are no positions of training examples"):
        by_indices.effect(queries, [[1, 3, 4]])


def test_the_target_may_be_what_the_network_predicts() -> None:
    task = Classification()
    attributor, queries = fitted(task), data_of(task, 6, 1)
    predicted = attributor.model(queries.tensors[0]).argmax(1)
    expected = attributor.effect(TensorDataset(queries.tensors[0], predicted), GROUPS)
    assert torch.equal(attributor.effect(queries, GROUPS, target="predicted"), expected)
    assert not torch.equal(attributor.effect(queries, GROUPS), expected)


@pytest.mark.parametrize("options", [{"recovery": "closed-form"}, {"recovery": "lasso", "penalty": 0.1}], ids=str)
def test_recovery_has_no_part_in_it(options: dict[str, Any]) -> None:
    task, queries = Classification(), data_of(Classification(), 6, 1)
    other = StrideAttributor(**options, **QUIET).fit(perceptron().double(), data_of(task, NUM_TRAIN, 0), task)
    torch.testing.assert_close(other.effect(queries, GROUPS), fitted(task).effect(queries, GROUPS))


def test_what_is_no_group_is_refused() -> None:
    attributor, queries = fitted(Classification()), data_of(Classification(), 6, 1)

    def effect(groups: Any, action: Any = "remove", target: Any = "label") -> Tensor:
        return attributor.effect(queries, groups, action=action, target=target)

    members = "Each group must be the positions of its members"
    assert_refused(
        effect,
        (r"Group 0 names \[30\], which are no positions of training examples", [[0, 30]]),
        (r"Group 1 names \[-1\], which are no positions", [[0], [-1, 2]]),
        (r"Each group must be the positions of its members.*group 0 is \[0.5\]", [[0.5]]),
        ("`groups` must be a list of groups, each a list of positions; got 0", 0),
        ("Group 1 names a position more than once. If it is a mask of 0 and 1, make it bool", [[3], [0, 1, 0]]),
        (r"Groups \[1\] are all of the training data, so nothing is left to train on", [[0], range(30)]),
        (r"Groups \[0, 1\] are all of the training data", torch.ones(2, 30) == 1),
        (r"must have shape \(num_groups, 30\).*group 0 has 29 values", torch.ones(2, 29) == 1),
        (rf"{members}, or bool with one value for each training example; group 0 is tensor", torch.ones(30) == 1),
        (rf"{members}.*group 0 is 0\. For a single group, pass a list that holds it", [0, 1, 2]),
        (rf"{members}.*group 0 is \['zero'\]", [["zero"]]),
        (rf"{members}.*group 0 is \[\[0, 1\]\]", [[[0, 1]]]),
        ("`action` must be 'remove', got 'double'", [[0]], "double"),
        ("`target` must be 'label' or 'predicted', got 'other'", [[0]], "remove", "other"),
    )


def test_texts_are_refused_by_name() -> None:
    def loader(count: int) -> Any:
        return DataLoader(Texts(count), 4, collate_fn=padded)

    attributor = StrideAttributor(**QUIET).fit(TinyLM().eval(), loader(9))
    with pytest.raises(ValueError, match=r"texts have none.*Attribution\.sum_by\(\), or retrain with retrain_without"):
        attributor.effect(loader(3), [[0]])


def test_before_fit_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"Call fit\(model, train_data\) before effect\(queries, groups\)"):
        StrideAttributor().effect(data_of(Classification(), 6, 1), [[0]])


def test_a_network_with_several_labels_for_an_example() -> None:
    assert isinstance(TASKS["binary"], BinaryClassification)  # of three labels each, above
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    task, data = BinaryClassification(), TensorDataset(random_tensor(20, 4, seed=0), torch.arange(20) % 2)
    effects = StrideAttributor(**QUIET).fit(model, data, task).effect(data, [[0, 2], [1, 3]])
    # Members of a group lose more than others of their class gain.
    assert effects[[0, 2], 0].min() > 0
    assert effects[[1, 3], 1].min() > 0
