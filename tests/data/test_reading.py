"""The one loop that reads data: batches in order, names in errors, and what one pass tells."""

from unittest.mock import MagicMock, call

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning.data import reading as reading_module
from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import Reading, count_outputs, encoded_batch, fingerprint_of, survey
from stride_lightning.data.sources import resolve_queries, resolve_train_data
from stride_lightning.runtime.checks import RowError, check_finite
from stride_lightning.tasks.language import CausalLanguageModeling
from stride_lightning.tasks.likelihoods import Classification, Regression
from tests.helpers.tiny import CPU, examples_of, perceptron, random_tensor

INPUTS, TARGETS = random_tensor(20, 4, seed=0), torch.arange(20) % 3
TASK = Classification()
TEXTS = [{"input_ids": torch.arange(4) + i} for i in range(6)]


def reading_of(examples=None, model=None, task=TASK, batch_size=6, **options):
    examples = examples_of(INPUTS, TARGETS) if examples is None else examples
    return Reading(examples, task, model, batch_size=batch_size, device=CPU, **options)


@pytest.mark.parametrize("batch_size", [1, 6, 20, 64])
def test_everything_is_read_once_in_order(batch_size):
    reading = reading_of(batch_size=batch_size)
    rows = list(reading)
    assert [place for part in rows for place in range(20)[part.places]] == list(range(20))
    assert sum(map(len, rows)) == 20
    assert torch.equal(torch.cat([part.targets for part in rows]), TARGETS)
    assert torch.equal(torch.cat([part.batch[0] for part in rows]), INPUTS)
    assert reading.fingerprint == fingerprint_of(examples_of(INPUTS, TARGETS))


@pytest.mark.parametrize("share", [slice(0, 20), slice(3, 11), slice(5, 6), slice(19, 40), slice(7, 7)])
def test_a_share_has_the_places_of_the_whole(share):
    rows = list(reading_of(share=share))
    assert [place for part in rows for place in range(20)[part.places]] == list(range(20)[share])
    assert torch.equal(torch.cat([torch.empty(0, 4), *(part.batch[0] for part in rows)]), INPUTS[share])


def test_inputs_and_targets_have_the_precision_of_the_model():
    model = perceptron().half()
    for inputs, encoded in reading_of(model=model).encoded(3):
        assert inputs.dtype == encoded.dtype == torch.float16
    batch = next(iter(reading_of())).batch
    assert torch.equal(encoded_batch(model, TASK, batch, 3)[1], reading_of(model=model).encoded(3)[0][1])


def test_labels_of_tokens_are_not_rounded():
    ids = torch.tensor([[1, 4099, 4099]])  # 4099 is 4100 in half precision
    examples = Examples([{"input_ids": ids[0]}])
    task = CausalLanguageModeling()
    for dtype, kept in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        ((_, encoded),) = reading_of(examples, nn.Linear(1, 1).to(dtype), task).encoded(5000)
        assert encoded.dtype == kept
        assert encoded[0, 0, 0] == 4099


def test_the_model_may_say_the_targets():
    model = perceptron().double()
    encoded = torch.cat([encoded for _, encoded in reading_of(model=model).encoded(3, "predicted")])
    assert torch.equal(encoded.argmax(1), model(INPUTS).argmax(1))
    with pytest.raises(ValueError, match=r"batch has no targets, so losses .*pass target='predicted' to attribute"):
        reading_of(examples_of(INPUTS), model).encoded(3)


@pytest.mark.parametrize(
    ("description", "show", "shown"), [("Reading", True, True), ("Reading", False, False), ("", True, False)]
)
def test_a_progress_bar_needs_a_description(monkeypatch, description, show, shown):
    bar = MagicMock()
    monkeypatch.setattr(reading_module, "counting", bar)
    list(reading_of(description=description, show_progress=show, share=slice(0, 8)))
    inside = bar.return_value.__enter__.return_value
    assert bar.mock_calls[0] == call(8, description, show=shown)
    assert inside.update.mock_calls == [call(6), call(2)]


# ---- names in errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolve", "name"), [(resolve_train_data, "Training example"), (resolve_queries, "Query"), (Examples, "Example")]
)
@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_a_bad_row_is_named_by_kind_and_position(resolve, name, batch_size):
    ids = torch.ones(20, 3, dtype=torch.long)
    ids[13, 1] = -5
    examples = resolve(TensorDataset(ids))
    with pytest.raises(ValueError, match=f"^{name} 13 has the token id -5, and ids are not negative. Mark padding by"):
        list(reading_of(examples, nn.Linear(1, 1), CausalLanguageModeling(), batch_size))
    examples.positions = torch.tensor([3, 8, 13, 2])
    for share in (None, slice(1, 4), slice(2, 3)):
        with pytest.raises(ValueError, match=f"^{name} 13 has the token id -5"):
            list(reading_of(examples, nn.Linear(1, 1), CausalLanguageModeling(), batch_size, share=share))


def test_targets_that_cannot_be_encoded_are_named():
    texts = Examples([*TEXTS[:4], {"input_ids": torch.tensor([1, 2, 3, 99])}, *TEXTS[4:]])
    for read in (
        lambda: reading_of(texts, nn.Linear(1, 1), CausalLanguageModeling(), 3).encoded(50),
        lambda: survey(texts, CausalLanguageModeling(), nn.Linear(1, 1), 50),
    ):
        with pytest.raises(ValueError, match=r"^Example 4 has the label 99; the model predicts 0\.\.49"):
            read()


def test_what_is_not_finite_is_named():
    values = torch.ones(4, 2, 3)
    check_finite(values, "loss")
    check_finite(values[:0], "loss")
    values[2, 1, 0] = -torch.inf
    with pytest.raises(RowError, match="Row 2 of the batch has an infinite number in its loss, which must be finite"):
        check_finite(values, "loss")
    values[1, 0, 2] = torch.nan
    queries = resolve_queries(TensorDataset(INPUTS))
    queries.positions = torch.tensor([9, 4, 17, 3])
    message = r"^Query 4 has NaN in its outputs, which must be finite: .*did training diverge\?\)\. Likewise 17\.$"
    for start, expected in ((0, message), (1, "^Query 17 has NaN")):
        with pytest.raises(ValueError, match=expected), queries.naming(start):
            check_finite(values, "outputs")
    with pytest.raises(ValueError, match=r"^Query 3 has NaN"), queries.naming(0):
        check_finite(values[1:2], "outputs", row=3)
    everything = examples_of(INPUTS)
    with pytest.raises(ValueError, match=r" Likewise 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10 more\.$"), everything.naming(0):
        check_finite(torch.full((20,), torch.nan), "loss")


# ---- one pass without a model -----------------------------------------------------------------------------------


def test_survey_of_numbers_and_of_vectors():
    surveyed = survey(examples_of(INPUTS, TARGETS), TASK)
    assert torch.equal(surveyed.targets, TARGETS)
    assert torch.equal(surveyed.kinds, TARGETS)
    assert surveyed.num_tokens is None
    for targets in ((), (INPUTS,)):
        surveyed = survey(examples_of(INPUTS, *targets), Regression())
        assert surveyed.targets is surveyed.kinds is None


def test_survey_of_texts():
    ids = [[1, 2, 3, 4], [1, 2, -100, -100], [-100, 2, 3, 4]]
    weights = torch.tensor([[1.0, 1, 2, 1], [1, 0.5, 1, 1], [1, 1, 0, 1]])
    pairs = zip(torch.tensor(ids), weights, strict=True)
    texts = [{"input_ids": torch.arange(1, 5), "labels": labels, "loss_weights": weight} for labels, weight in pairs]
    surveyed = survey(Examples(texts), CausalLanguageModeling())
    assert surveyed.targets is None
    assert surveyed.kinds.tolist() == [4.0, 0.5, 2.0]
    assert surveyed.num_tokens.tolist() == [3, 1, 2]
    assert surveyed.longest == 4


def test_outputs_are_counted():
    assert count_outputs(perceptron(num_outputs=5), TASK, (torch.zeros(2, 4), None)) == 5
    assert count_outputs(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), Regression(), (torch.zeros(2, 4), None)) == 1
    with pytest.raises(TypeError, match="outputs must be a tensor of shape"):
        count_outputs(nn.Unflatten(1, (2, 2)), TASK, (torch.zeros(2, 4), None))
