"""Attribution of models with adapters, from checkpoints that hold the adapter alone."""

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from stride_lightning import FurtherTrainingCallback, StrideCallback, attribute, further_train
from stride_lightning.callbacks.tracin import TracInCallback
from stride_lightning.model.weights import weight_hash
from tests.helpers.adapters import AdapterAlone, States, tracin_by_hand
from tests.helpers.models import Classifier, build, classification_data, loader, train

DATA = classification_data()
LOADER = loader(DATA)
QUERIES = Subset(classification_data(seed=5), range(4))


class Run:
    """A fit of an adapter, and the checkpoint of its end."""

    def __init__(self, folder):
        self.model, self.states, self.tracin = build(AdapterAlone), States(), TracInCallback()
        self.further = FurtherTrainingCallback(QUERIES, left_out=[0, 1], num_seeds=1)
        callbacks = [self.tracin, StrideCallback(num_subsets=8), self.further, self.states]
        trainer = train(self.model, DATA, folder, *callbacks, max_epochs=2)
        self.path = folder / "adapter.ckpt"
        trainer.save_checkpoint(self.path)
        self.model.trainer = None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


def attributed(model, method, **options):
    how = {"queries": QUERIES, "train_data": LOADER, "method": method, "show_progress": False}
    return attribute(model, **how, **options)


def another(seed=7, **options):
    """The model as another process builds it: the same base, other adapters."""
    return build(AdapterAlone, seed=seed, **options)


def test_the_checkpoint_holds_the_adapter_alone(run):
    state = torch.load(run.path, weights_only=True)["state_dict"]
    assert len(state) == 4
    with pytest.warns(UserWarning, match="not in the checkpoint: .*base"):  # Lightning's own word for it
        loaded = AdapterAlone.load_from_checkpoint(run.path)
    assert weight_hash(loaded) == weight_hash(run.model)


@pytest.mark.parametrize("method", ["grad-dot", "ekfac", "trak", "tracin", "stride"])
def test_scores_from_the_checkpoint_are_those_of_the_model(run, method):
    model = another()
    before = weight_hash(model)
    options = {"record": run.tracin.dirpath} if method == "tracin" else {}
    in_place = attributed(run.model, method, **options)
    from_file = attributed(model, method, ckpt_path=run.path, **({} if method == "tracin" else options))
    assert from_file.metadata["weights"] == weight_hash(run.model)
    assert from_file.metadata["frozen"].startswith("4 frozen tensors (network.0.base.bias, network.0.base.weight, ...)")
    assert in_place.metadata["frozen"] is None
    scores = from_file.scores
    assert scores.isfinite().all()
    assert scores.std() > 0
    torch.testing.assert_close(scores, in_place.scores, rtol=1e-4, atol=1e-7)
    assert weight_hash(model) == before


def test_gradients_are_taken_in_what_trains(run):
    last = States()
    last.states, last.rates = run.states.states[-1:], [dict.fromkeys(run.states.rates[-1], 1.0)]
    expected = tracin_by_hand(run.model, last, QUERIES, DATA)
    torch.testing.assert_close(attributed(run.model, "grad-dot").scores, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        attributed(another(), "tracin", ckpt_path=run.path).scores,
        tracin_by_hand(run.model, run.states, QUERIES, DATA),
        rtol=1e-4,
        atol=1e-6,
    )


def test_tracin_of_checkpoints_of_the_adapter_alone(run):
    last = States()
    last.states, last.rates = run.states.states[-1:], run.states.rates[-1:]
    scores = attributed(another(), "tracin", record=run.path).scores
    torch.testing.assert_close(scores, tracin_by_hand(run.model, last, QUERIES, DATA), rtol=1e-4, atol=1e-6)


def test_the_record_of_another_base_is_not_used(run):
    with pytest.raises(ValueError, match="the frozen base is another"):
        attributed(another(base=1), "tracin", ckpt_path=run.path)
    with pytest.warns(UserWarning, match="is of other weights than those that are attributed"):
        attribution = attributed(another(base=1), "stride", ckpt_path=run.path)
    assert "none of these weights was found" in attribution.metadata["record_note"]


def test_weights_that_train_must_be_in_the_checkpoint(run, tmp_path):
    content = torch.load(run.path, weights_only=False)
    del content["state_dict"]["network.2.up.weight"]
    torch.save(content, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match=r"missing: network\.2\.up\.weight"):
        attributed(another(), "grad-dot", ckpt_path=tmp_path / "less.ckpt")
    free = another()
    free.requires_grad_(True)
    with pytest.raises(ValueError, match=r"missing: network\.0\.base\.bias.*requires_grad"):
        attributed(free, "grad-dot", ckpt_path=run.path)


def test_further_training_goes_on_from_the_adapter(run, capsys):
    options = {"train_data": LOADER, "left_out": [0, 1], "num_seeds": 1}
    result = further_train(another(), QUERIES, ckpt_path=run.path, **options, show_progress=True)
    assert "4 frozen tensors (network.0.base.bias, network.0.base.weight, ...) are not in" in capsys.readouterr().err
    torch.testing.assert_close(result.effects(), run.further.result.effects(), rtol=1e-4, atol=1e-6)
    recorded = attributed(another(), "further-training", ckpt_path=run.path)
    torch.testing.assert_close(recorded.scores, run.further.result.attribution().scores)


def test_a_base_that_the_checkpoint_holds_counts(run, tmp_path):
    """A checkpoint of everything loads everything, whatever is frozen."""
    torch.save({"state_dict": nn.Module.state_dict(run.model)}, tmp_path / "whole.ckpt")
    attribution = attributed(another(base=1), "grad-dot", ckpt_path=tmp_path / "whole.ckpt")
    assert attribution.metadata["frozen"] is None
    assert attribution.metadata["weights"] == weight_hash(run.model)


def test_a_model_that_is_frozen_where_training_was_not(tmp_path):
    model = build(Classifier)
    trainer = train(model, classification_data(), tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other, how = build(Classifier, seed=1), {"train_data": classification_data(), "method": "grad-dot"}
    how |= {"ckpt_path": tmp_path / "run.ckpt", "show_progress": False}
    attribute(other, classification_data(5), **how)
    other.network[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="has trained 4 parameters, and 2 of Classifier require gradients now"):
        attribute(other, classification_data(5), **how)
