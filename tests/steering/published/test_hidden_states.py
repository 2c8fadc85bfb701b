import copy

import pytest
import torch

from stride_lightning import CausalLanguageModeling, StrideAttributor
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.steering.published.hidden_states import HiddenStateOperators, block_at
from stride_lightning.steering.subsets import sample_design
from tests.helpers.texts import TinyLM
from tests.steering.language.test_sequences import LAYERS, QUERIES, TRAIN, ask, loader

DESIGN = sample_design(len(TRAIN), 6, 3, seed=0)


def fitted(model, **options):
    operators = HiddenStateOperators(
        model, CausalLanguageModeling(), DESIGN, **({"rank": 2, "max_steps": 20} | options)
    )
    with torch.no_grad():
        operators.fit_operators(resolve_train_data(loader(TRAIN)), torch.device("cpu"), show_progress=False)
    return operators


class Residual(TinyLM):
    """What enters a block is the hidden state itself."""

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return self.head(hidden)


def test_measurements_are_differences_of_losses():
    model = Residual().eval()
    operators = fitted(model)
    assert operators.layer == "blocks.2"
    measured = operators.measure(resolve_queries(loader(QUERIES)), torch.device("cpu"), show_progress=False)
    assert measured.shape == (len(QUERIES), 6)
    for query in range(len(QUERIES)):
        item = QUERIES[query]
        frozen = by_hand(model, item, None, None)
        for subset in range(6):
            steered = by_hand(model, item, operators.basis, operators.operators[subset])
            assert float(measured[query, subset]) == pytest.approx(frozen - steered, abs=1e-5)
    assert float(measured.abs().max()) > 1e-3


@torch.no_grad()
def by_hand(model, item, basis, operator):
    hidden = model.embedding(item["input_ids"][None])
    for number, block in enumerate(model.blocks):
        entering = hidden
        if number == 2 and basis is not None:
            entering = hidden + hidden @ basis @ operator
        hidden = hidden + torch.tanh(block(entering))
    return float(torch.nn.functional.cross_entropy(model.head(hidden)[0, :-1], item["labels"][1:], ignore_index=-100))


def test_training_lowers_the_loss_of_the_subsets():
    model = Residual().eval()
    operators = fitted(model, max_steps=150, stability=0.0, rank=4)
    train = resolve_queries(loader(TRAIN))
    measured = operators.measure(train, torch.device("cpu"), show_progress=False)
    members = DESIGN.dense().T
    inside, outside = (measured * members).sum() / members.sum(), (measured * (1 - members)).sum() / (1 - members).sum()
    assert inside > 0.01
    assert inside > outside


def test_stability_ties_operators_to_the_frozen_model():
    model = Residual().eval()
    free, tied = (fitted(model, max_steps=100, stability=stability).operators.norm() for stability in (0.0, 100.0))
    assert tied < 0.7 * free


def test_the_same_seed_gives_the_same_operators_and_the_model_is_as_it_was():
    model = Residual().eval()
    before = copy.deepcopy(model.state_dict())
    one, same, other = fitted(model), fitted(model), fitted(model, seed=1)
    assert torch.equal(one.operators, same.operators)
    assert not torch.equal(one.operators, other.operators)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(name.startswith("_frozen") for name, _ in one.named_parameters())


def test_the_block_is_five_eighths_deep():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 7, "n_positions": 8, "n_embd": 4, "n_layer": 12, "n_head": 2}
    assert block_at(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)), 5 / 8) == "transformer.h.8"
    with pytest.raises(ValueError, match=r"has no list of blocks .* Name it with `layers="):
        block_at(torch.nn.Linear(2, 2), 5 / 8)


def test_it_attributes():
    model = Residual().eval()
    attribution = ask(model, basis="learned", layers=["blocks.1"], rank=2, num_subsets=6)
    assert attribution.scores.shape == (len(QUERIES), len(TRAIN))
    assert attribution.metadata["sequences"]["steered"] == "blocks.1"
    with pytest.raises(ValueError, match="steers one hidden state: name one layer"):
        ask(model, basis="learned", layers=LAYERS)
    attributor = StrideAttributor(basis="learned", layers=["embedding"], num_subsets=6, show_progress=False)
    with pytest.raises(ValueError, match="is not a hidden state"):
        attributor.fit(model, loader(TRAIN))
    model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Layer 'unused' did not run in the model's forward pass"):
        ask(model, basis="learned", layers=["unused"], num_subsets=6)
