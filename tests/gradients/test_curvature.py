"""Another damping after the fit, and a curvature of your own."""

import pytest

from stride_lightning.gradients.curvature import Curvature
from stride_lightning.gradients.presets import InfluenceAttributor
from stride_lightning.model.blocks import Block, Gradients
from tests.helpers.gradient_models import EXACT, attributed, close_scores, fitted, mlp, points_for


@pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("method", [method for method in EXACT if not method.startswith("grad-")])
def test_another_damping_after_the_fit(method):
    data, model = points_for(), mlp()
    attributor = fitted(model, data, method, **EXACT[method])
    before = attributor.attribute(data).scores
    attributor.damping = 60.0
    attribution = attributor.attribute(data)
    close_scores(attribution.scores, attributed(model, data, method, damping=60.0).scores)
    assert (attribution.scores - before).abs().max() > 1e-3 * before.abs().max()
    assert attribution.metadata["options"]["damping"] == 60.0
    with pytest.raises(ValueError, match="`damping` must be"):
        attributor.damping = -1
    assert attributor.damping == 60.0


class Halved(Curvature):
    """Half of the damped identity, to see what a curvature is given."""

    def fit(self, train):
        self.mean_eigenvalue = 2.0
        self.seen = [(places, gradients.num_examples) for places, gradients in train.gradients()]

    def solve(self, gradients):
        return Gradients({name: Block(b.dense() / (2 + self.absolute_damping)) for name, b in gradients.items()})


class HalvedAttributor(InfluenceAttributor):
    default_damping, curvature_class = 1.0, Halved


HalvedAttributor.method = "halved for a test"  # after the class was made, so that it is not registered


def test_a_curvature_of_your_own():
    data = points_for()
    attributor = HalvedAttributor(damping=3.0, batch_size=6, show_progress=False).fit(mlp(), data)
    attribution = attributor.attribute(data)
    close_scores(attribution.scores, attributed(mlp(), data, "grad-dot").scores / 8 / 14)
    assert attributor._fitted[0].curvature.seen == [(slice(0, 6), 6), (slice(6, 12), 6), (slice(12, 14), 2)]
    assert attribution.metadata["curvature"] == [{"mean_eigenvalue": 2.0, "damping": 6.0}]
