"""self_influence(): the diagonal of the attribution of the training data to themselves."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import stride_lightning.attributor as module
from stride_lightning import Attribution, Attributor, GroundTruth, StrideAttributor, attribute
from stride_lightning.attribute import self_influence
from stride_lightning.metrics import mislabel_detection
from stride_lightning.retraining.attributors import FurtherTrainingAttributor
from tests.helpers.models import Classifier, build, classification_data, train

DATA = classification_data()
FEW = {"num_subsets": 16, "show_progress": False}


class Product(Attributor):
    """The score of example i for query j is the product of their first features, plus a constant; counts calls."""

    shift = 1.0

    def __init__(self, **options):
        super().__init__(**options)
        self.batches = []

    def fit_model(self, model, device, record, checkpoint):
        pass

    def score_queries(self, model, queries, device, target):
        assert (target, model.training) == ("label", False)
        assert not torch.is_grad_enabled()
        self.batches.append(len(queries))
        scored = self.scored_examples()
        rows, columns = (torch.stack([data[i][0][0] for i in range(len(data))]) for data in (queries, scored))
        return Attribution((rows[:, None] * columns + self.shift).double())


Product.method = "product for a test"  # after the class was made, so that it is not registered


class Few(Product):
    """Scores some of the examples, in an order of its own."""

    places = (50, 3, 17, 4)

    def scored_examples(self):
        return self.train_data.subset(self.places)


# ---- which numbers ----------------------------------------------------------------------------------------------


def test_parts_and_order_by_hand(model, monkeypatch):
    squares = DATA.tensors[0][:, 0].square() + Product.shift
    attributor = Product(batch_size=25, show_progress=False)
    attributor.fit(model, DATA)
    influence = attributor.self_influence()
    torch.testing.assert_close(influence, squares)
    assert influence.dtype == torch.float32
    assert attributor.batches == [25, 25, 10]
    some = attributor.fit(model, DATA, train_indices=[9, 2, 30]).self_influence()
    torch.testing.assert_close(some, squares[[9, 2, 30]])
    monkeypatch.setattr(Product, "asks_at_once", True)  # a method whose queries share work is asked once
    attributor.fit(model, DATA).self_influence()
    assert attributor.batches[-1] == 60


@pytest.mark.parametrize("batch_size", [60, 8])
def test_a_method_that_scores_some_examples_gives_those(model, batch_size):
    attributor = Few(batch_size=batch_size, show_progress=False).fit(model, DATA)
    influence = attributor.self_influence()
    columns = attributor.attribute(Subset(DATA, [0])).train_indices
    assert columns.tolist() == list(Few.places)
    torch.testing.assert_close(influence, DATA.tensors[0][columns, 0].square() + Product.shift)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    attributor.fit(model, DATA, train_indices=order)
    columns = order[list(Few.places)]
    torch.testing.assert_close(attributor.self_influence(), DATA.tensors[0][columns, 0].square() + Product.shift)


def test_a_method_may_know_better(model):
    class Known(Product):
        def score_training_data(self, model, device):
            return torch.arange(len(self.train_data), device=device).double()

    influence = Known().fit(model, DATA).self_influence()
    assert influence.tolist() == list(range(60))
    assert influence.dtype == torch.float32


def test_further_training_without_some():
    model, data = build(Classifier), classification_data(40)
    options = {"num_seeds": 1, "left_out": [31, 2, 17, 9], "train_batch_size": 10, "show_progress": False}
    influence = self_influence(model, train_data=data, method="further-training", batch_size=64, **options)
    attribution = attribute(model, data, train_data=data, method="further-training", **options)
    torch.testing.assert_close(influence, attribution.scores[attribution.train_indices].diagonal())
    assert (influence > 0).float().mean() > 0.7  # training on an example helps it
    in_parts = FurtherTrainingAttributor(batch_size=16, **options).fit(model, data).self_influence()
    torch.testing.assert_close(in_parts, influence, rtol=1e-3, atol=1e-6)


def test_truth_of_other_queries_is_refused(model):
    truth = GroundTruth(
        torch.rand(20, 60, generator=torch.Generator().manual_seed(0)) < 0.5,
        torch.rand(1, 20, 6, generator=torch.Generator().manual_seed(1)),
        [0],
        {"query_data": {"num_examples": 6, "content": "a" * 64}},
    )
    with pytest.raises(ValueError, match="`queries`"):
        self_influence(model, train_data=DATA, method="retraining", truth=truth, recovery="ridge", show_progress=False)


def test_wrong_labels_are_found(tmp_path):
    """The usual use."""
    x = torch.randn(120, 4, generator=torch.Generator().manual_seed(3))
    wrong = torch.arange(120) % 10 == 0
    data = TensorDataset(x, ((x[:, 0] + x[:, 1] > 0) ^ wrong).long())
    model = build(Classifier, num_classes=2)
    train(model, data, tmp_path, max_epochs=15)
    influence = self_influence(model, train_data=data, num_subsets=200, show_progress=False)
    assert mislabel_detection(influence, wrong) > 0.85


# ---- the front door and the model -------------------------------------------------------------------------------


def test_function_and_method_agree(model, tmp_path):
    other = build(Classifier, seed=1, dropout=0.3)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    plain = copy.deepcopy(other)
    arguments = {"train_data": DataLoader(DATA, 7, shuffle=True), "train_indices": range(0, 60, 2), "seed": 3}
    arguments |= {"ckpt_path": tmp_path / "other.pt", "device": "cpu", "layers": ["network.0"]}
    influence = self_influence(model, **arguments, **FEW)
    by_hand = StrideAttributor(seed=3, layers=["network.0"], **FEW).fit(plain, DATA, train_indices=range(0, 60, 2))
    assert influence.equal(by_hand.self_influence())
    assert influence.equal(by_hand.self_influence())  # asked again


@pytest.mark.parametrize("show", [True, False])
def test_progress(model, monkeypatch, show):
    seen = []

    def track(items, description, *, show):
        seen.append((description, len(items), show))
        return iter(items)

    monkeypatch.setattr(module, "track", track)
    Product(batch_size=20, show_progress=show).fit(model, DATA).self_influence()
    assert seen == [("Self-influence", 3, show)]
