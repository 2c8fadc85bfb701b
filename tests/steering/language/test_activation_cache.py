import copy
from threading import local

import pytest
import torch

from tests.helpers.texts import Texts, TinyLM
from tests.steering.language.test_sequences import TRAIN, ask


class Counted(TinyLM):
    """Counts the training sequences it runs over, and can stop as if it was killed."""

    def __init__(self):
        super().__init__()
        self.count = local()  # what a module holds is put back, but not this
        self.count.rows, self.count.limit = 0, 10**9

    def forward(self, input_ids, attention_mask=None):
        if self.count.rows >= self.count.limit:
            raise KeyboardInterrupt
        self.count.rows += len(input_ids)
        return super().forward(input_ids, attention_mask)


@pytest.fixture
def filled(tmp_path):
    """A model whose activations are in the folder."""
    model = TinyLM().eval()
    ask(model, batch_size=2, cache_dir=tmp_path)
    return model


def rows_of(model, **options):
    model.count.rows = 0
    scores = ask(model, batch_size=2, **options).scores
    return scores, model.count.rows


def test_the_model_runs_over_cached_sequences_once(tmp_path):
    model = Counted().eval()
    expected, without = rows_of(model)
    first, filling = rows_of(model, cache_dir=tmp_path)
    again, reading = rows_of(model, cache_dir=tmp_path)
    assert torch.allclose(first, expected, atol=1e-6)
    assert torch.allclose(first, again, atol=1e-6)
    assert without - filling == len(TRAIN)  # one pass of two is read from disk
    assert filling - reading == len(TRAIN)


def test_its_size_is_known_beforehand(tmp_path):
    attribution = ask(TinyLM().eval(), cache_dir=tmp_path)
    files = [file.stat().st_size for file in tmp_path.rglob("*.f32")]
    tokens = attribution.metadata["sequences"]["num_tokens"]
    assert sum(files) == attribution.metadata["sequences"]["cache_bytes"] == 4 * tokens * (13 + 7 + 1)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    model = Counted().eval()
    expected, _ = rows_of(model)
    model.count.rows = 0
    model.count.limit = 12
    with pytest.raises(KeyboardInterrupt):
        ask(model, batch_size=2, cache_dir=tmp_path)
    model.count.limit = 10**9
    _, complete = rows_of(model, cache_dir=tmp_path / "other")
    scores, rest = rows_of(model, cache_dir=tmp_path)
    assert torch.allclose(scores, expected, atol=1e-6)
    assert 0 < complete - rest < len(TRAIN)


def test_activations_of_something_else_are_refused(tmp_path, filled):
    other = copy.deepcopy(filled)
    with torch.no_grad():
        other.head.weight.add_(1)
    with pytest.raises(ValueError, match="holds activations of another model or data set: weights differ"):
        ask(other, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="data differ"):
        ask(filled, train=Texts(13, seed=5), cache_dir=tmp_path)
    with pytest.raises(ValueError, match="layers differ"):
        ask(filled, layers=["blocks.1"], cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["features", "downhill", "weights"])
def test_a_damaged_file_is_refused(tmp_path, filled, name):
    (file,) = tmp_path.rglob(f"{name}.f32")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"are damaged .* Delete the folder"):
        ask(filled, cache_dir=tmp_path)
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="missing or has another size"):
        ask(filled, cache_dir=tmp_path)


def test_a_damaged_list_of_parts_is_refused(tmp_path, filled):
    (file,) = tmp_path.rglob("progress.jsonl")
    whole = file.read_text().splitlines(keepends=True)
    for lines in (["{"], whole[:1] + whole[2:], [*whole[:2], "nonsense\n", *whole[3:]]):
        file.write_text("".join(lines))
        with pytest.raises(ValueError, match=r"progress.jsonl is damaged"):
            ask(filled, cache_dir=tmp_path)


def test_a_line_that_was_not_finished_is_a_part_that_was_not_written(tmp_path):
    model = Counted().eval()
    expected, complete = rows_of(model, cache_dir=tmp_path)
    (file,) = tmp_path.rglob("progress.jsonl")
    file.write_text(file.read_text()[:-9])
    again, more = rows_of(model, cache_dir=tmp_path)
    assert torch.allclose(again, expected, atol=1e-6)
    _, reading = rows_of(model, cache_dir=tmp_path)
    assert reading < more < complete


def test_a_folder_of_something_else_is_kept(tmp_path):
    mine = tmp_path / f"sequences-0-{len(TRAIN)}" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("do not touch")
    with pytest.raises(ValueError, match="holds other files"):
        ask(TinyLM().eval(), cache_dir=tmp_path)
    assert mine.read_text() == "do not touch"


def test_operators_read_it_too(tmp_path):
    model = TinyLM().eval()
    options = {"recovery": "prior", "num_subsets": 8}
    assert torch.allclose(ask(model, cache_dir=tmp_path, **options).scores, ask(model, **options).scores, atol=1e-5)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"file/sequences-0-\d+ for activations cannot be made .*`cache_dir=`"):
        ask(TinyLM().eval(), cache_dir=tmp_path / "file")
