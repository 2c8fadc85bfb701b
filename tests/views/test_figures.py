"""Figures show the right examples, with the right numbers under them, and leave nothing open."""

import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch.utils.data import TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.evaluation import Evaluation, EvaluationRow
from stride_lightning.results.texts import interval_text, score_text
from stride_lightning.views.figures import as_image, plot_grid
from stride_lightning.views.loggers import pixels_of
from stride_lightning.views.ranking import query_facts, rank_examples

SCORES = torch.tensor([[0.5, -0.25, 0.0, 0.012, -0.13], [0.0, 0.0, 3.0, -1.0, 2.0]])
POSITIONS = torch.tensor([10, 11, 12, 13, 14])
LABELS = torch.tensor([0, 1, 2, 3, 4])


def make_attribution(shape=(1, 8, 8), **options):
    """Two queries and five training examples; every pixel of train example i is i / 10, of query j is 0.9 - j / 10."""
    train = Examples(TensorDataset(torch.stack([torch.full(shape, i / 10) for i in range(20)]), torch.arange(20)))
    queries = Examples(TensorDataset(torch.stack([torch.full(shape, 0.9 - j / 10) for j in range(2)]), torch.arange(2)))
    described = {"train_indices": POSITIONS, "train_targets": LABELS, "query_targets": torch.tensor([7, 8])}
    return Attribution(SCORES, queries=queries, train_data=train.subset(range(5)), **(described | options))


def headings(figure):
    return [panel.get_suptitle() for panel in figure.subfigs]


def captions(figure):
    return [[axes.get_title(), *axes.get_xlabel().split("\n")] for axes in figure.axes]


def pixel(axes):
    return float(axes.images[0].get_array().mean())


def test_pictures_stand_in_order_with_their_scores():
    figure = make_attribution().plot(0, k=2)
    # The query, proponents 0 and 3, opponents 1 and 4: every picture has its own brightness.
    assert [round(pixel(axes), 4) for axes in figure.axes] == [0.9, 0.0, 0.3, 0.1, 0.4]
    assert headings(figure) == ["Query", "Proponents (lower its loss)", "Opponents (raise its loss)"]
    assert captions(figure) == [
        ["query 0", "label 7"],
        *(["+0.50", "#10 · label 0"], ["+0.012", "#13 · label 3"]),
        *(["-0.25", "#11 · label 1"], ["-0.13", "#14 · label 4"]),
    ]
    colors = [axes.spines["left"].get_edgecolor()[:3] for axes in figure.axes]
    assert colors[1] == colors[2] != colors[3] == colors[4]
    assert colors[1][1] > colors[1][0]  # green
    assert colors[3][0] > colors[3][1]  # red
    assert all(len(axes.get_xticks()) == len(axes.get_yticks()) == 0 for axes in figure.axes)
    assert captions(make_attribution().plot(-1, k=1))[0] == ["query 1", "label 8"]  # counted from the end


def test_grid_has_one_row_per_query_in_the_given_order():
    figure = plot_grid(make_attribution(), [1, 0], k=3)
    # Zeros are shown on neither side: query 1 has two proponents and one opponent, query 0 two and two.
    assert [round(pixel(axes), 4) for axes in figure.axes] == [0.8, 0.2, 0.4, 0.3, 0.9, 0.0, 0.3, 0.1, 0.4]
    figure.canvas.draw()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert [box.y1 for box in boxes[:4]] == pytest.approx([boxes[0].y1] * 4)
    assert boxes[0].y0 > boxes[4].y1
    # The opponents of both rows begin at the same place.
    assert boxes[3].x0 == pytest.approx(boxes[7].x0)


LONG = ["WWWW MMMM " * 9, "a text that is longer than a picture is wide", "short", "$\\frac$", "W" * 99]


def boxes_of(figure):
    """Where every text of a drawn figure lies, in pixels. Numbers of an axis are left out: some are never drawn."""
    figure.canvas.draw()
    number = re.compile("[\N{MINUS SIGN}\\d.\\s]*")
    texts = [text for text in figure.findobj(Text) if text.get_visible() and not number.fullmatch(text.get_text())]
    return {(i, text.get_text()): text.get_window_extent() for i, text in enumerate(texts)}


def assert_readable(figure):
    """Nothing leaves the figure, texts overlap neither each other nor a picture."""
    texts, (width, height) = boxes_of(figure), figure.canvas.get_width_height()
    outside = [name for name, box in texts.items() if min(box.min) < 0 or box.x1 > width or box.y1 > height]
    assert outside == []
    areas = {f"axes {i}": axes.get_window_extent() for i, axes in enumerate(figure.axes)}
    boxes = list((texts | areas).items())
    assert [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)] == []


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 12), (3,)], ids=["squares", "wide", "bars"])
@pytest.mark.parametrize("queries", [1, 6])
def test_nothing_overlaps_or_leaves_the_figure(shape, queries):
    info = {"train_info": {"text": LONG}, "query_info": {"text": LONG[:2]}, "std": SCORES.abs() / 3}
    attribution = make_attribution(shape, **info)
    for k in (1, 2, 4) if queries == 1 else (1, 4):
        assert_readable(plot_grid(attribution, [0, 1] * (queries // 2) or [0], k))


@pytest.mark.parametrize("ceiling", [0.02, 0.97])
def test_evaluations_with_long_names_are_readable(ceiling):
    names = [f"{number} {text}" for number, text in enumerate(LONG)]
    rows = tuple(EvaluationRow(name, 0.5, 0.4, 0.6, counterfactual={1: 0.1, 1000: 2.0}) for name in names)
    for shown in (rows, rows[:1], tuple(replace(row, counterfactual=None) for row in rows)):
        queries = {row.name: torch.linspace(-0.5, 1, 9) for row in shown}
        assert_readable(Evaluation(shown, ceiling, 10, 2, 9, 0.9, queries).plot())


READOUT = {"loss": [0.123456, 2.0], "readout loss": [0.1, 2.5], "readout agrees": [True, False]}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3,)], ids=["pictures", "bars"])
def test_queries_on_which_the_readout_disagrees_are_marked_and_the_mark_is_explained_once(shape):
    attribution = make_attribution(shape, query_info=READOUT)

    def shown(figure):
        headings = [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")]
        marks = [heading.lower().split(" · ")[0] for heading in headings if heading.lower().startswith("query")]
        return marks, " ".join(figure.get_supxlabel().split())

    note = "! the readout disagrees with the model on this query: its scores explain another prediction"
    assert shown(attribution.plot([1, 0], k=1)) == (["query 1 !", "query 0"], note)
    assert shown(attribution.plot([0], k=1)) == (["query 0"], "")
    assert shown(make_attribution(shape).plot([1], k=1)) == (["query 1"], "")
    for k in (1, 4):
        assert_readable(attribution.plot([0, 1], k))
    # Losses without their names would say nothing, so captions and titles leave them out.
    agreeing = make_attribution(shape, query_info=READOUT | {"readout agrees": [True, True]})
    pixels = [pixels_of(one.plot([0, 1], k=2)) for one in (agreeing, make_attribution(shape))]
    assert np.array_equal(*pixels)


def test_pictures_have_one_size_whatever_their_captions():
    figure = plot_grid(make_attribution(train_info={"text": LONG}), [0, 1], k=5)
    figure.canvas.draw()
    sizes = [axes.get_window_extent().size for axes in figure.axes]
    assert np.allclose(sizes, sizes[0], atol=1)
    assert sizes[0].min() > 110


@pytest.mark.parametrize("shape", [(64,), (8, 8), (3, 8, 8), (8, 8, 3)])
def test_flat_images_need_image_shape_and_others_do_not(shape):
    flat = len(shape) == 1
    figure = make_attribution(shape).plot(0, 1, image_shape=(8, 8) if flat else None)
    assert len(figure.axes) == 3
    assert figure.axes[0].images[0].get_array().shape[:2] == (8, 8)
    if flat:
        assert make_attribution(shape).plot(0, 1).axes[0].patches  # bars
        with pytest.raises(ValueError, match=r"shape \(64,\) cannot be shown with image_shape=\(9, 9\)"):
            make_attribution(shape).plot(0, 1, image_shape=(9, 9))


def test_bars_are_scores_with_error_bars_of_one_std():
    std = torch.tensor([[0.1, 0.05, 0.0, 0.004, 0.02]] * 2)
    info = {"source": ["web", "book", "web", "cost $\\frac$", "code"]}
    figure = make_attribution(shape=(3,), std=std, train_info=info).plot(0, k=2)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.5, 0.012, -0.13, -0.25])
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("#10 · label 0 · web", "#13 · label 3 · cost $\\frac$"),
        *("#14 · label 4 · code", "#11 · label 1 · book"),
    ]
    segments = axes.containers[1][2][0].get_segments()
    expected = [(0.4, 0.6), (0.008, 0.016), (-0.15, -0.11), (-0.3, -0.2)]
    assert np.allclose([(start[0], end[0]) for start, end in segments], expected)
    (right,) = axes.child_axes
    assert [label.get_text() for label in right.get_yticklabels()] == [
        *("+0.50 ± 0.10", "+0.012 ± 0.0040", "-0.13 ± 0.020", "-0.25 ± 0.050"),
    ]
    assert axes.get_xlabel().endswith("; ± and error bars: uncalibrated std")
    assert "std" not in make_attribution(shape=(3,)).plot(0, k=2).axes[0].get_xlabel()
    # The chart's top bar is the strongest proponent.
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


@pytest.mark.parametrize("shape", [(8, 8), (3,)])
def test_dollar_signs_are_no_formulas(shape):
    bad = r"$\frac$"  # matplotlib would raise ValueError
    attribution = make_attribution(shape, train_info={"text": [bad] * 5}, query_info={"text": [bad] * 2})
    attribution.plot(0, 1).canvas.draw()


def test_without_data_there_are_bars_right_of_their_labels_and_an_empty_chart_for_scores_of_zero():
    info = {"text": ["WWWW MMMM " * 9, "short"]}
    figure = plot_grid(Attribution(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), train_info=info), [0, 1])
    assert [len(axes.patches) for axes in figure.axes] == [2, 0]
    assert_readable(figure)


def test_no_pyplot_figure_is_left_open(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    make_attribution().plot(0, 2).savefig(tmp_path / "query.png")
    assert plt.get_fignums() == before
    assert (tmp_path / "query.png").read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'stride-lightning\[plot\]'"):
        make_attribution().plot()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_grid(make_attribution(), [])
    with pytest.raises(IndexError, match="There is no query 2: the 2 queries"):
        make_attribution().plot(2)
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1"):
        make_attribution().plot(0, 0)


def test_as_image_reads_tensors_arrays_and_pil():
    image_module = pytest.importorskip("PIL.Image")
    color = torch.rand(3, 4, 5)
    for example in ((color, 1), {"label": torch.tensor(3), "image": color}):
        assert torch.equal(as_image(example), color.permute(1, 2, 0))
    assert torch.equal(as_image(color[:1]), color[0])
    array = np.array([[0, 51], [102, 255]], dtype=np.uint8)
    expected = torch.tensor([[0.0, 0.2], [0.4, 1.0]])
    for example in (array, torch.from_numpy(array), image_module.fromarray(array)):
        assert torch.allclose(as_image([example]), expected)
    shapes = [tuple(as_image(image_module.new(mode, (5, 4))).shape) for mode in ("RGBA", "P")]
    assert shapes == [(4, 5, 3), (4, 5)]
    # What is not in zero to one is stretched.
    assert torch.equal(as_image(torch.tensor([[-2.0, 0.0], [1.0, 2.0]])), torch.tensor([[0.0, 0.5], [0.75, 1.0]]))
    assert torch.equal(as_image(torch.full((2, 2), 7.0)), torch.zeros(2, 2))  # constant
    unchanged = torch.tensor([[0.25, 0.5], [0.5, 0.5]])
    assert torch.equal(as_image(unchanged), unchanged)
    assert as_image(torch.tensor([[math.nan, 0.5], [0.5, 1.0]]))[0, 0] == 0


@pytest.mark.parametrize(
    "example",
    [torch.rand(64), torch.rand(5, 8, 8), torch.zeros(4, 4, dtype=torch.int64), torch.rand(1, 9), "text", 3, None, ()],
)
def test_as_image_refuses_what_is_no_picture(example):
    assert as_image(example) is None


def test_ranking_keeps_columns_and_positions_apart():
    std = torch.arange(10.0).reshape(2, 5)
    helpful, harmful = rank_examples(make_attribution(std=std, train_info={"id": list("abcde")}), 1, k=5)
    ranked = [(e.column, e.position, e.score, e.std, e.target, e.info) for e in helpful]
    assert ranked == [(2, 12, 3.0, 7.0, "2", ("c",)), (4, 14, 2.0, 9.0, "4", ("e",))]
    assert [(e.column, e.position, e.score) for e in harmful] == [(3, 13, -1.0)]


def test_facts_of_a_readout_have_few_digits_and_those_of_users_all():
    info = READOUT | {"id": [0.123456, 1.0], "prediction": [[0.123456, 1.0, 2.0, 3.0], 3], "readout prediction": [3, 3]}
    attribution = make_attribution(query_info=info)
    assert query_facts(attribution, 0) == {
        **{"target": "7", "loss": "0.123", "readout loss": "0.1", "readout agrees": "True", "id": "0.123456"},
        **{"prediction": "(0.123, 1, 2, ...)", "readout prediction": "3"},
    }
    assert query_facts(attribution, 0, with_readout=False) == {"target": "7", "id": "0.123456"}
    assert query_facts(make_attribution(query_info={"loss": [0.123456, 1.0]}), 0)["loss"] == "0.123456"


WRITTEN = {0.0: "+0.00", 0.0996: "+0.100", -0.00123: "-0.0012", 123.4: "+123", 1e-5: "+1.0e-05", -3e6: "-3.0e+06"}


@pytest.mark.parametrize(("score", "text"), WRITTEN.items())
def test_scores_are_written_with_a_sign(score, text):
    assert score_text(score) == text
    assert interval_text(score, 0.5) == f"{text} ± 0.50"
