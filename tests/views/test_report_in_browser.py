"""The report page in a browser: clicks, keys, sorting and searching, and that it asks the network for nothing."""

import pytest
import torch
from torch.utils.data import TensorDataset

from stride_lightning.data.examples import Examples
from tests.helpers.browser import CHROMIUM, Browser
from tests.helpers.reports import HOSTILE, images, make_attribution

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (chromium, chromium-browser, google-chrome)")


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture
def opened(browser, tmp_path):
    """The page of three queries, open; afterwards nothing went wrong in it and it asked for nothing but itself."""
    std = torch.tensor([[0.2, 0.05, 0.0, 0.004, 0.01]] * 3)
    texts = [HOSTILE[0], "A River runs", HOSTILE[1], "line\n" * 30, HOSTILE[2]]
    train = Examples(TensorDataset(images(20), torch.arange(20))).subset(range(10, 15))
    info = {"train_info": {"text": texts, HOSTILE[1]: HOSTILE}, "query_info": {"id": ["Straße", "y", HOSTILE[0]]}}
    attribution = make_attribution(std=std, train_data=train, **info)
    path = attribution.report(tmp_path / "report.html", title=HOSTILE[1], k=2)
    browser.requests.clear()
    browser.open(path)
    yield browser
    assert browser.problems == []
    assert set(browser.requests) == {path.as_uri()}


def positions(browser, side):
    return [text.split()[0] for text in browser.texts(f".side:nth-child({side}) .pin")]


def test_a_click_shows_a_query_and_its_address_shows_it_again(opened):
    assert opened.texts("h1") == [HOSTILE[1]]
    assert opened.texts("nav b") == ["Query 0", "Query 1", "Query 2"]
    assert opened.texts("main h2") == ["Query 0"]
    assert (positions(opened, 1), positions(opened, 2)) == (["#10", "#13"], ["#11", "#14"])
    assert opened.texts(".score") == ["+0.50 ± 0.20", "+0.012 ± 0.0040", "-0.25 ± 0.050", "-0.13 ± 0.0100"]
    widths = "Promise.all([...document.images].map((image) => image.decode().then(() => image.naturalWidth)))"
    assert opened.evaluate(widths) == [8] * 4
    opened.click('nav a[data-query="1"]')
    opened.wait_for("main h2", ["Query 1"])
    assert opened.texts("nav [aria-current] b") == ["Query 1"]
    assert opened.evaluate("location.hash") == "#query-1"
    opened.reload()
    assert opened.texts("main h2") == ["Query 1"]
    opened.evaluate("location.hash = '#query-2'")
    opened.wait_for("main h2", ["Query 2"])


def test_bars_are_scores_on_one_scale_with_whiskers_and_long_texts_open_and_close(opened):
    # The scale goes from 0 to 0.5 + 0.2; nothing reaches below zero.
    widths = opened.evaluate("[...document.querySelectorAll('.fill')].map((e) => parseFloat(e.style.width))")
    assert widths == pytest.approx([100 * s / 0.7 for s in (0.5, 0.012, 0.25, 0.13)], rel=1e-4)
    whisker = "[...document.querySelectorAll('.whisker')].map((e) => [e.style.left, e.style.width].map(parseFloat))"
    assert opened.evaluate(whisker)[0] == pytest.approx([30 / 0.7, 40 / 0.7], rel=1e-4)
    assert len(opened.texts(".more")) == 1
    height = "document.querySelector('[data-example=\"13\"] .body').clientHeight"
    closed = opened.evaluate(height)
    opened.click(".more")
    assert opened.texts(".more") == ["less"]
    assert opened.evaluate(height) > 5 * closed
    opened.click(".more")
    assert opened.evaluate(height) == closed


def test_examples_and_queries_can_be_sorted(opened):
    opened.click('[data-sort="score"]')  # again: the other way round
    assert positions(opened, 1) == ["#13", "#10"]
    opened.click('[data-sort="position"]')
    assert (positions(opened, 1), positions(opened, 2)) == (["#10", "#13"], ["#11", "#14"])
    opened.click('[data-sort="position"]')
    assert (positions(opened, 1), positions(opened, 2)) == (["#13", "#10"], ["#14", "#11"])
    opened.click('[data-sort="std"]')
    assert (positions(opened, 1), positions(opened, 2)) == (["#10", "#13"], ["#11", "#14"])
    opened.choose("#order", "strongest score")
    assert opened.texts("nav b") == ["Query 1", "Query 0", "Query 2"]
    opened.choose("#order", "target")  # 7, 8, 10: by number
    assert opened.texts("nav b") == ["Query 0", "Query 2", "Query 1"]


def test_search_filters_queries_and_examples(opened):
    opened.click("#search")
    opened.write("rIVER")
    assert opened.texts("#status") == ["0 queries and 1 example"]
    assert opened.texts("nav b") == ["Query 0"]
    assert (positions(opened, 1), positions(opened, 2)) == ([], ["#11"])
    assert opened.texts("main mark") == ["River"]
    opened.write(" nowhere")
    assert opened.texts("nav b") == []
    assert opened.texts("main .empty")[0].startswith("Nothing matches “river nowhere”.")
    opened.click("main .empty button")
    assert opened.texts("#status") == ["3 queries"]
    assert opened.texts("main h2") == ["Query 0"]
    opened.click("#search")
    opened.write("<SCRIPT>alert(1)")
    assert opened.texts("nav b") == ["Query 0", "Query 2"]  # by an example, and by a fact of its own
    opened.press("Escape")
    assert len(opened.texts("nav b")) == 3
    opened.write("STRAßE")
    assert opened.texts("#status") == ["1 query and 0 examples"]
    # All examples of a query that matches itself.
    assert (positions(opened, 1), positions(opened, 2)) == (["#10", "#13"], ["#11", "#14"])


def test_disagreeing_queries_are_marked_in_the_list_and_in_their_heading(browser, tmp_path):
    std = torch.full((3, 5), 0.1)
    info = {"id": ["x", "y", "z"], "loss": [0.5, 1.5, 2.5], "readout loss": [0.5, 1.0, 2.5]}
    info |= {"readout agrees": [True, False, True]}
    browser.open(make_attribution(query_info=info, std=std).report(tmp_path / "report.html"))
    assert browser.texts("nav b") == ["Query 0", "Query 1 !", "Query 2"]
    assert browser.texts("nav .about") == ["target 7 · x", "target 10 · y", "target 8 · z"]
    browser.click('nav a[data-query="1"]')
    browser.wait_for("main h2", ["Query 1 !"])
    assert browser.texts(".shown .facts span")[2:] == ["loss1.5", "readout loss1", "readout agreesFalse"]
    assert [name.split(" ")[0] for name in browser.texts(".sort button")] == ["score", "position", "uncalibrated"]
    assert browser.problems == []


def test_keys_move_from_query_to_query(opened):
    opened.press("ArrowRight")
    assert opened.texts("main h2") == ["Query 1"]
    opened.press("j")
    opened.press("ArrowRight")  # there are no more
    assert opened.texts("main h2") == ["Query 2"]
    assert opened.texts(".side .empty") == [f"No training example {verb} this query." for verb in ("helps", "harms")]
    opened.press("k")
    opened.press("ArrowLeft")
    assert opened.evaluate("location.hash") == "#query-0"
    opened.press("/")
    opened.press("ArrowDown")
    assert opened.texts("main h2") == ["Query 1"]
    assert opened.evaluate("document.activeElement.id") == "search"


def test_a_click_on_an_example_says_where_else_it_appears(opened):
    opened.click('[data-example="13"] .pin')
    assert opened.texts(".card.pinned .elsewhere a") == ["query 1 -1.0 ± 0.0040"]
    assert opened.texts("nav a.linked b") == ["Query 0", "Query 1"]
    assert opened.evaluate("location.hash") == "#query-0/example-13"
    assert opened.evaluate("document.activeElement.className") == "pin"
    opened.click(".elsewhere a")
    opened.wait_for("main h2", ["Query 1"])
    assert opened.texts(".card.pinned .pin") == ["#13 in 2 queries"]
    opened.press("Escape")
    assert opened.texts(".card.pinned .pin") == []
    opened.click('[data-example="12"] img')
    assert opened.texts(".card.pinned .elsewhere") == ["Shown for this query only."]


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_is_wider_than_the_window(opened, width):
    opened.resize(width, 800, dark=width == 390)
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    assert opened.texts("main h2") == ["Query 0"]
    opened.resize(1280, 900)
