"""What loggers received, read back from where they keep it."""

import csv
import html
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.results.attribution import Attribution
from stride_lightning.views.loggers import example_table, log_attribution, markdown_table, summarize
from tests.helpers.loggers import WandbLike, read_events

SCORES = torch.tensor([[3.0, -1.0, 0.0, 0.0], [2.0, 1.0, -1.0, 0.0]])
HOSTILE = "a|b\nsecond line <script>alert('x')</script> [click](javascript:x) *bold* `code` \\| &lt; $5"


@pytest.fixture
def attribution():
    images = Examples(TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4)))
    return Attribution(
        SCORES,
        std=torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, 0.75, 0.1, 0.1]]),
        train_indices=torch.tensor([10, 11, 12, 13]),
        train_targets=torch.tensor([0, 1, 2, 3]),
        query_targets=torch.tensor([7, 8]),
        metadata={"method": "stride", "seconds": {"fit": 1.5, "total": 2.5}, "device": "cpu"}
        | {"peak_memory": 4096, "peak_memory_known": True},
        train_info={"text": ["plain", HOSTILE, "c", "d"]},
        query_info={"id": ["q|0", "q1"]},
        queries=images.subset([0, 1]),
        train_data=images,
    )


def logged(attribution, step=0, **options):
    """What a logger of the Weights & Biases kind was given."""
    logger = WandbLike()
    log_attribution(attribution, [logger], step=step, **options)
    return logger.calls


def test_summary_by_hand(attribution):
    assert summarize(attribution, k=1) == pytest.approx(
        {
            # Mean 0.5, mean square (9 + 1 + 4 + 1 + 1) / 8 = 2.
            "stride/score_std": 1.75**0.5,
            "stride/top_share": (3 / 4 + 2 / 4) / 2,
            "stride/positive_fraction": 3 / 8,
            "stride/nonzero_fraction": 5 / 8,
            "stride/mean_uncalibrated_std": 5.45 / 8,
            # |score| > 2 std: 3 > 2 | 2 > 1 and 1 > 0.2, while 1 < 2 and 1 < 1.5.
            "stride/beyond_two_uncalibrated_std": 3 / 8,
            "stride/seconds/fit": 1.5,
            "stride/seconds/total": 2.5,
            "stride/peak_memory": 4096.0,
        }
    )


def test_summary_of_zeros_is_finite_and_without_a_method_has_the_usual_names():
    names = ("score_std", "top_share", "positive_fraction", "nonzero_fraction")
    assert summarize(Attribution(torch.zeros(2, 3)), k=5) == {f"stride/{name}": 0.0 for name in names}


def test_tensorboard_shows_scalars_histograms_text_and_pictures(attribution, tmp_path):
    pytest.importorskip("matplotlib")
    logger = TensorBoardLogger(tmp_path)
    attribution.log(logger, step=7, k=1, max_queries=1)
    events = read_events(logger)
    expected = summarize(attribution, k=1)
    assert set(expected) <= set(events.Tags()["scalars"])
    for tag, value in expected.items():
        (event,) = events.Scalars(tag)
        assert (event.step, event.value) == (7, pytest.approx(value))
    (scores,), (std,) = events.Histograms("stride/scores"), events.Histograms("stride/uncalibrated_std")
    assert (scores.step, scores.histogram_value.num) == (7, 8)
    assert (scores.histogram_value.min, scores.histogram_value.max) == (-1, 3)
    assert std.histogram_value.sum == pytest.approx(5.45)
    (text,) = events.Tensors("stride/top_examples/text_summary")
    assert text.tensor_proto.string_val[0].decode() == markdown_table(attribution, [0], 1)
    (picture,) = events.Images("stride/top_pictures")
    assert (text.step, picture.step) == (7, 7)
    assert picture.width > 300
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    # One event file and no runs below it.
    assert [path for path in (tmp_path / "lightning_logs" / "version_0").rglob("*") if path.is_dir()] == []


def test_hostile_text_stays_text_in_tensorboard_and_long_text_is_cut(attribution):
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    attribution.scores = -attribution.scores  # row 0: position 11 is the only proponent
    markdown = markdown_table(attribution, [0], 2)
    assert "<script>" not in markdown
    assert len(markdown.splitlines()) == 6  # heading, empty line, head, rule, proponent, opponent
    page = plugin_util.markdown_to_safe_html(markdown)
    assert not [tag for tag in ("<script", "<a ", "<code", "<em>") if tag in page]
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL)]
    cells = [[html.unescape(cell) for cell in row] for row in rows if row]
    assert cells == [
        ["proponent", "1", "11", "+1.0 ± 1.0", "1", " ".join(HOSTILE.split())],
        ["opponent", "1", "10", "-3.0 ± 1.0", "0", "plain"],
    ]
    (heading,) = re.findall(r"<h3>(.*?)</h3>", page)
    assert html.unescape(heading) == "Query 0 · target 7 · id q|0"
    attribution = Attribution(torch.ones(1, 1), train_info={"text": ["x" * 10_000]})
    assert len(markdown_table(attribution, [0], 1)) < 400


def test_disagreeing_queries_are_marked_explained_once_and_counted(attribution):
    note = "! the readout disagrees with the model on this query: its scores explain another prediction"
    assert "!" not in markdown_table(attribution, [0, 1], 1)
    attribution.query_info = {"loss": [0.123456, 1.0], "readout loss": [2.0, 1.0], "readout agrees": [False, True]}
    text = markdown_table(attribution, [0, 1], 1)
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [
        "### Query 0 ! · target 7 · loss 0.123 · readout loss 2 · readout agrees False",
        "### Query 1 · target 8 · loss 1 · readout loss 1 · readout agrees True",
    ]
    assert text.endswith(f"\n\n{note}")
    assert text.count("!") == 2
    assert note not in markdown_table(attribution, [1], 1)
    columns, rows = example_table(attribution, [0, 1], 1)
    assert [(row[0], row[columns.index("query_readout agrees")]) for row in rows] == [
        *([(0, "False")] * 2),
        *([(1, "True")] * 2),
    ]
    assert summarize(attribution, 1)["stride/readout_agreement"] == 0.5


def test_the_head_of_the_text_table_says_what_stands_behind_the_scores(attribution):
    assert "| rank | position | score ± uncalibrated std | target |" in markdown_table(attribution, [0], 1)
    attribution.std = None
    assert "| rank | position | score | target |" in markdown_table(attribution, [0], 1)


def test_names_begin_with_the_method(attribution, tmp_path):
    """Several methods side by side: nothing of one is under the name of the other."""
    attribution.metadata["method"] = "further-training"
    renamed = {tag.replace("stride/", "further-training/") for tag in summarize(Attribution(SCORES), k=1)}
    assert renamed < set(summarize(attribution, k=1))
    assert all(tag.startswith("further-training/") for tag in summarize(attribution, k=1))
    assert summarize(attribution, k=1)["further-training/seconds/fit"] == 1.5
    metrics, *others = logged(attribution, step=5, k=1)
    assert metrics[1] == summarize(attribution, k=1)
    assert [call[0] for call in others][:1] == ["further-training/top_examples"]
    assert all(call[0].startswith("further-training/") for call in others)
    board = TensorBoardLogger(tmp_path)
    attribution.log(board, step=7, k=1, max_queries=1)
    tags = read_events(board).Tags()
    assert tags["histograms"] == ["further-training/scores", "further-training/uncalibrated_std"]
    assert tags["tensors"] == ["further-training/top_examples/text_summary"]
    assert all(tag.startswith("further-training/") for tag in tags["scalars"] + tags["images"])


def test_csv_logger_gets_the_scalars(attribution, tmp_path):
    logger = CSVLogger(tmp_path)
    attribution.metadata["step"] = 30
    attribution.log([logger], k=1)
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row.pop("step") == "30"  # where the attributed model stands
    assert {tag: float(value) for tag, value in row.items()} == pytest.approx(summarize(attribution, k=1))


def test_wandb_like_logger_gets_table_and_image(attribution):
    pytest.importorskip("matplotlib")
    (_, *metrics), (*tags, columns, data, step), picture = logged(attribution, step=5, k=1, max_queries=2)
    image_tag, (image,), image_step = picture
    assert metrics == [summarize(attribution, k=1), 5]
    assert (*tags, image_tag) == ("stride/top_examples", "stride/top_pictures")
    assert step == image_step == 5
    assert " ".join(columns) == "query query_target query_id side rank position score uncalibrated_std target text"
    assert data == [
        [0, "7", "q|0", "proponent", 1, 10, 3.0, 1.0, "0", "plain"],
        [0, "7", "q|0", "opponent", 1, 11, -1.0, 1.0, "1", HOSTILE],
        [1, "8", "q1", "proponent", 1, 10, 2.0, 0.5, "0", "plain"],
        [1, "8", "q1", "opponent", 1, 12, -1.0, pytest.approx(0.1), "2", "c"],
    ]
    assert (image.dtype, image.ndim, image.shape[2]) == ("uint8", 3, 3)
    assert image.min() < 100 < image.max()  # drawn


def test_table_columns_match_rows_without_optional_parts():
    columns, rows = example_table(Attribution(SCORES), [0, 1], 5)
    assert columns == ["query", "side", "rank", "position", "score"]
    assert [row[3] for row in rows] == [0, 1, 0, 1, 2]
    assert all(len(row) == len(columns) for row in rows)


def test_max_queries_limits_what_is_shown(attribution):
    assert {row[0] for row in logged(attribution, k=1, max_queries=1)[1][2]} == {0}
    assert [call[0] for call in logged(attribution, k=1, max_queries=0)] == ["metrics"]


def test_flat_images_are_pictures_only_when_told_and_only_with_matplotlib(attribution, monkeypatch):
    pytest.importorskip("matplotlib")
    flat = Examples(TensorDataset(torch.rand(4, 64)))
    attribution.train_data, attribution.queries = flat, flat.subset([0, 1])
    for image_shape, shown in ((None, False), ((8, 8), True)):
        calls = logged(attribution, image_shape=image_shape)
        assert ("stride/top_pictures" in [call[0] for call in calls]) is shown
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert [call[0] for call in logged(attribution, image_shape=(8, 8))] == ["metrics", "stride/top_examples"]


def test_writer_is_flushed_last_and_opens_no_runs(attribution):
    logger = WandbLike()
    logger.experiment = Mock()
    log_attribution(attribution, [logger], step=0)
    called = [name for name, *_ in logger.experiment.method_calls]
    assert called[-1] == "flush"
    assert set(called) <= {"add_histogram", "add_text", "add_figure", "flush"}


def test_loggers_that_show_nothing_do_not_fail(attribution):
    bare = SimpleNamespace(experiment=None, log_metrics=Mock())
    log_attribution(attribution, [DummyLogger(), None, bare], step=0)
    bare.log_metrics.assert_called_once_with(summarize(attribution, k=5), 0)
    attribution.log(None)
    attribution.log([])
