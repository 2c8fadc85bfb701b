"""Detection of mislabelled examples against scikit-learn."""

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from stride_lightning.metrics import MislabelDetection, mislabel_detection
from tests.helpers.refusals import assert_refused
from tests.helpers.tiny import random_tensor

REFERENCES = {"auroc": roc_auc_score, "average_precision": average_precision_score}
every_metric = pytest.mark.parametrize("metric", REFERENCES)


def planted(ties: bool = False) -> tuple[Tensor, Tensor]:
    """Suspicion (200,) and which of the 200 are mislabelled, a tenth or so."""
    mislabelled = random_tensor(200, seed=0) > 1.2
    suspicion = random_tensor(200, seed=1) + mislabelled
    return (suspicion.round() if ties else suspicion), mislabelled


@every_metric
@pytest.mark.parametrize("ties", [False, True])
def test_equals_scikit_learn(metric: str, ties: bool) -> None:
    suspicion, mislabelled = planted(ties)
    assert ties == (len(suspicion.unique()) < 200)
    expected = REFERENCES[metric](mislabelled.numpy(), suspicion.numpy())
    assert mislabel_detection(suspicion, mislabelled, metric).item() == pytest.approx(expected, abs=1e-6)


@every_metric
@pytest.mark.parametrize("change", [lambda x: 1e300 * x, lambda x: x + 1e4, lambda x: 1e-300 * x, lambda x: x.exp()])
def test_only_the_order_counts(metric: str, change) -> None:
    """Where torchmetrics alone would take a sigmoid, which ties everything beyond 40."""
    suspicion, mislabelled = planted()
    expected = mislabel_detection(suspicion, mislabelled, metric)
    assert mislabel_detection(change(suspicion), mislabelled, metric) == expected
    detection = MislabelDetection(metric)
    detection.update(change(suspicion), mislabelled)
    assert detection.compute() == expected


@every_metric
def test_scores_that_harm_all_queries_are_suspicious(metric: str) -> None:
    scores, mislabelled = random_tensor(6, 200, seed=3), planted()[1]
    expected = mislabel_detection(-scores.mean(0), mislabelled, metric)
    assert mislabel_detection(scores, mislabelled, metric) == expected
    harmful = scores - 100 * mislabelled
    assert mislabel_detection(harmful, mislabelled.long(), metric) == 1


def test_chance_opposite_and_batches_that_lack_either_kind() -> None:
    suspicion, mislabelled = planted()
    assert mislabel_detection(torch.zeros(200), mislabelled) == 0.5
    assert mislabel_detection(torch.zeros(200), mislabelled, "average_precision") == mislabelled.float().mean()
    forward, backward = (mislabel_detection(sign * suspicion, mislabelled) for sign in (1, -1))
    torch.testing.assert_close(forward + backward, torch.tensor(1.0))
    detection = MislabelDetection()
    detection.update(suspicion[mislabelled], mislabelled[mislabelled])
    detection.update(suspicion[~mislabelled], mislabelled[~mislabelled])
    torch.testing.assert_close(detection.compute(), forward)


def test_what_does_not_fit_is_refused() -> None:
    suspicion, mislabelled = planted()
    other_values = torch.cat([mislabelled[1:].long(), torch.tensor([3])])
    broken = suspicion.clone()
    broken[[3, 8]] = torch.tensor([torch.nan, torch.inf], dtype=torch.float64)
    broken_scores = torch.stack([suspicion, broken])
    shape, flags = r"`suspicion` of shape \(num_train,\), or scores", r"`mislabelled` of shape \(200,\), one flag"
    for refused in (mislabel_detection, MislabelDetection().update):
        assert_refused(
            refused,
            *((shape, wrong, mislabelled) for wrong in (suspicion[:0], suspicion[None, None], torch.tensor(1.0))),
            *((rf"{flags} .* got \(199,\)", form, mislabelled[1:]) for form in (suspicion, suspicion[None])),
            (r"`mislabelled` to hold booleans .*, got 1 other values\. Compare first", suspicion, other_values),
            (r"finite `suspicion`, got 2 of 200 values .* in examples 3, 8:", broken, mislabelled),
            (r"finite `suspicion`, got 2 of 400 values .* in queries 1:", broken_scores, mislabelled),
        )
        no_tensor = "Expected `suspicion` to be a torch.Tensor, got list"
        assert_refused(refused, (no_tensor, suspicion.tolist(), mislabelled), error=TypeError)
    for refused in (mislabel_detection, MislabelDetection()):
        assert_refused(
            refused,
            ("mislabelled and correct examples, got 200 mislabelled of 200", suspicion, torch.ones(200).bool()),
            ("got 0 mislabelled of 200", suspicion, torch.zeros(200)),
        )
    known = "`metric` must be 'auroc' or 'average_precision', got 'f1'"
    assert_refused(mislabel_detection, (known, suspicion, mislabelled, "f1"))
    assert_refused(MislabelDetection, (known, "f1"))
