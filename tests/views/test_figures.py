"""Figures show the right examples, with the right numbers under them, and leave nothing open."""

import math
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.texts import interval_text, score_text
from stride_lightning.views.figures import as_image, plot_grid
from stride_lightning.views.ranking import rank_examples

SCORES = torch.tensor([[0.5, -0.25, 0.0, 0.012, -0.13], [0.0, 0.0, 3.0, -1.0, 2.0]])
POSITIONS = torch.tensor([10, 11, 12, 13, 14])
LABELS = torch.tensor([0, 1, 2, 3, 4])


def make_attribution(shape=(1, 8, 8), **options):
    """Two queries and five training examples; every pixel of train example i is i / 10, of query j is 0.9 - j / 10."""
    train = Examples(TensorDataset(torch.stack([torch.full(shape, i / 10) for i in range(20)]), torch.arange(20)))
    queries = Examples(TensorDataset(torch.stack([torch.full(shape, 0.9 - j / 10) for j in range(2)]), torch.arange(2)))
    given = {"train_indices": POSITIONS, "train_targets": LABELS, "query_targets": torch.tensor([7, 8])}
    return Attribution(SCORES, queries=queries, train_data=train.subset(range(5)), **(given | options))


def texts(figure):
    return [text.get_text() for text in figure.texts if text.get_text()]


def pixel(axes):
    return float(axes.images[0].get_array().mean())


def test_pictures_stand_in_order_with_their_scores():
    figure = make_attribution().plot(0, k=2)
    # The query, proponents 0 and 3, opponents 1 and 4: every picture has its own brightness.
    assert [round(pixel(axes), 4) for axes in figure.axes] == [0.9, 0.0, 0.3, 0.1, 0.4]
    assert texts(figure) == [
        *("Query", "Proponents", "lower its loss", "Opponents", "raise its loss"),
        *("query 0", "label 7", "+0.50", "#10 · label 0", "+0.012", "#13 · label 3"),
        *("-0.25", "#11 · label 1", "-0.13", "#14 · label 4"),
    ]
    colors = [axes.spines["left"].get_edgecolor()[:3] for axes in figure.axes]
    assert colors[1] == colors[2] != colors[3] == colors[4]
    assert colors[1][1] > colors[1][0]  # green
    assert colors[3][0] > colors[3][1]  # red
    assert all(len(axes.get_xticks()) == len(axes.get_yticks()) == 0 for axes in figure.axes)
    assert texts(make_attribution().plot(-1, k=1))[3:5] == ["query 1", "label 8"]  # counted from the end


def test_grid_has_one_row_per_query_in_the_order_asked_for():
    figure = plot_grid(make_attribution(), [1, 0], k=3)
    # Zeros are shown on neither side: query 1 has two proponents and one opponent, query 0 two and two.
    assert [round(pixel(axes), 4) for axes in figure.axes] == [0.8, 0.2, 0.4, 0.3, 0.9, 0.0, 0.3, 0.1, 0.4]
    tops = [axes.get_position().y1 for axes in figure.axes]
    assert len({round(top, 6) for top in tops[:4]}) == 1
    assert tops[0] > tops[4]
    # The opponents of both rows begin at the same place.
    assert figure.axes[3].get_position().x0 == pytest.approx(figure.axes[7].get_position().x0)


def test_nothing_overlaps_or_leaves_the_figure():
    figure = plot_grid(make_attribution(train_info={"text": ["WWW a longer text than fits"] * 5}), [0, 1], k=2)
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    boxes = [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    boxes += [axes.get_window_extent(renderer) for axes in figure.axes]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert overlaps == []


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
    assert [text.get_text() for text in axes.texts] == [
        *("+0.50 ± 0.10", "+0.012 ± 0.0040", "-0.13 ± 0.020", "-0.25 ± 0.050"),
    ]
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    chart = axes.get_window_extent(renderer)
    assert all(chart.x0 <= text.get_window_extent(renderer).x0 for text in axes.texts)
    assert all(chart.x1 >= text.get_window_extent(renderer).x1 for text in axes.texts)
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
    renderer = figure.canvas.get_renderer()
    figure.canvas.draw()
    assert all(label.get_window_extent(renderer).x0 >= 0 for label in figure.axes[0].get_yticklabels())


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
    with pytest.raises(IndexError, match="Query 2 of 2"):
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
    kept = torch.tensor([[0.25, 0.5], [0.5, 0.5]])
    assert torch.equal(as_image(kept), kept)
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


WRITTEN = {0.0: "+0.00", 0.0996: "+0.100", -0.00123: "-0.0012", 123.4: "+123", 1e-5: "+1.0e-05", -3e6: "-3.0e+06"}


@pytest.mark.parametrize(("score", "text"), WRITTEN.items())
def test_scores_are_written_with_a_sign(score, text):
    assert score_text(score) == text
    assert interval_text(score, 0.5) == f"{text} ± 0.50"
