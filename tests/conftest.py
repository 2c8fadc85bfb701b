"""What the tests of the front door share."""

import pytest

from tests.helpers.models import Classifier, build, classification_data, train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A trained classifier with dropout that no trainer is attached to; tests leave it as it was."""
    model = build(Classifier, dropout=0.3)
    train(model, classification_data(), tmp_path_factory.mktemp("run"), max_epochs=8)
    model.trainer = None
    return model
