"""What the tests of the front door share."""

import gc
import os

import pytest

from tests.helpers import learned
from tests.helpers.models import Classifier, build, classification_data, train

os.environ["STRIDE_LIGHTNING_RAISE"] = (
    "1"  # an error in a callback fails the test; processes that tests start inherit it
)


def pytest_collection_finish():
    """Imports and the tests themselves stay to the end: collecting garbage, as callbacks that stop do, skips them."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def guarded(monkeypatch):
    """Callbacks behave as they do for users: an error turns them off."""
    monkeypatch.delenv("STRIDE_LIGHTNING_RAISE")


@pytest.fixture
def few_steps():
    """Learned bases are trained for a moment: their scores need not be good."""
    with learned.few_steps():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A trained classifier with dropout that no trainer is attached to; tests leave it as it was."""
    model = build(Classifier, dropout=0.3)
    train(model, classification_data(), tmp_path_factory.mktemp("run"), max_epochs=8)
    model.trainer = None
    return model
