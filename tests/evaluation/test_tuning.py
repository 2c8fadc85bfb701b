"""What tune_damping() refuses."""

import pytest

from stride_lightning import tune_damping
from tests.helpers.models import Classifier, build, classification_data

DATA = classification_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampings": []}, "`dampings` is empty: give at least one number"),
        ({"method": "grad-dot"}, r"method='grad-dot' has no damping\. Methods that have one: .*ekfac"),
    ],
)
def test_what_cannot_be_tuned(options, message):
    with pytest.raises(ValueError, match=message):
        tune_damping(build(Classifier), DATA, train_data=DATA, truth=None, show_progress=False, **options)
