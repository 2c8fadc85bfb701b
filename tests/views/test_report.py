"""The report page: what it holds, and that texts from the data stay texts."""

import base64
import hashlib
import io
import os
import re
import sys
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from stride_lightning.data.examples import Examples
from stride_lightning.results.attribution import Attribution
from stride_lightning.results.top_attribution import TopAttribution
from stride_lightning.views.report.pictures import Pictures, png
from tests.helpers.reports import HOSTILE, POSITIONS, SCORES, TARGETS, Page, images, make_attribution


def test_page_holds_each_query_with_its_proponents_and_opponents(tmp_path):
    std = torch.full_like(SCORES, 0.1)
    info = {"train_info": {"source": list("abcde")}, "query_info": {"id": ["x", "y", "z"]}}
    metadata = {"method": "stride", "unit": "nats of query loss", "seconds": {"total": 12.34}}
    path = make_attribution(std=std, metadata=metadata, **info).report(tmp_path / "report.html", k=2)
    page = Page(path)
    first, second, third = page.data["queries"]
    names = [example["name"] for example in page.data["examples"]]
    shown = [[(names[index], score, std) for index, score, std, _ in side] for side in first["ranked"]]
    assert shown == [[("10", 0.5, 0.1), ("13", 0.012, 0.1)], [("11", -0.25, 0.1), ("14", -0.13, 0.1)]]
    assert first["ranked"][0][0][3] == "+0.50 ± 0.10"
    assert (first["target"], first["facts"]) == ("7", [["id", "x"]])
    assert [names[index] for index, *_ in second["ranked"][0]] == ["12", "14"]
    assert third["ranked"] == [[], []]
    assert page.data["examples"][0] == {
        **{"name": "10", "target": "0", "facts": [["source", "a"]], "texts": [], "picture": None},
    }
    assert page.held["title"] == "Training-data attribution · stride · 3 queries, 5 training examples"
    facts = "<dd>12.3 s</dd>", "<dd>2 strongest of each side</dd>"
    for phrase in (*facts, "nats of query loss", "Positive scores are", "± and whiskers: one uncalibrated std"):
        assert phrase in page.text
    assert "whiskers:" not in Page(make_attribution().report(tmp_path / "plain")).text


def test_disagreeing_queries_are_marked_and_the_mark_is_explained_once(tmp_path):
    info = {"id": [0.123456, 1, 2], "loss": [0.123456, 2.0, 3.0], "readout loss": [0.1, 2.5, 3.0]}
    info |= {"readout agrees": [True, False, True]}
    attribution = make_attribution(query_info=info)
    page = Page(attribution.report(tmp_path / "page"))
    assert [query["disagrees"] for query in page.data["queries"]] == [False, True, False]
    assert page.data["queries"][0]["facts"] == [
        *(["id", "0.123456"], ["loss", "0.123"], ["readout loss", "0.1"], ["readout agrees", "True"]),
    ]
    assert page.data["readout"] == ["loss", "readout loss", "readout agrees"]
    assert "<dt>Readout</dt><dd>agrees with the model on 2 of 3 queries</dd>" in page.text
    note = "<p>! the readout disagrees with the model on this query: its scores explain another prediction</p>"
    assert page.text.count(note) == 1
    assert note not in attribution.report(tmp_path / "page", queries=[0, 2]).read_text("utf-8")
    plain = Page(make_attribution().report(tmp_path / "plain"))
    assert "readout" not in plain.text.replace("data.readout", "").replace('"readout":[]', "")
    assert (plain.data["std"], plain.data["readout"]) == (None, [])


def test_queries_can_be_chosen(tmp_path):
    attribution = make_attribution()
    for queries, names in ((1, ["1"]), (torch.tensor([-1, 0, 2]), ["2", "0"])):
        page = Page(attribution.report(tmp_path / "a", queries=queries))
        assert [query["name"] for query in page.data["queries"]] == names
    assert "<dd>1 of 3</dd>" in attribution.report(tmp_path / "a", queries=1).read_text("utf-8")
    with pytest.raises(ValueError, match="nothing to report"):
        attribution.report(tmp_path / "none", queries=[])
    with pytest.raises(IndexError, match="There is no query 3: the 3 queries"):
        attribution.report(tmp_path / "none", queries=3)
    with pytest.raises(ValueError, match="`k` must be an integer of at least 1"):
        attribution.report(tmp_path / "none", k=0)
    assert not list(tmp_path.glob("*none*"))


def test_unsigned_scores_have_one_side_and_no_direction(tmp_path):
    metadata = {"method": "information-loss", "unit": "nats, unsigned"}
    page = Page(make_attribution(metadata=metadata).report(tmp_path / "report.html"))
    assert [len(query["ranked"]) for query in page.data["queries"]] == [1, 1, 1]
    assert page.data["queries"][1]["ranked"][0][0][3] == "3.0"
    assert not re.search("help|harm|opponent|proponent|lowers|raises", page.text, re.IGNORECASE)


def test_what_keeps_only_the_strongest_or_was_saved_gives_the_same_page(tmp_path):
    whole = make_attribution(train_info={"text": list("abcde")})
    described = {"train_indices": POSITIONS, "train_info": whole.train_info, **TARGETS}
    top = TopAttribution(whole.top_columns(2), 5, **described)
    saved = Attribution.load(top.save(tmp_path / "saved"))
    pages = [attribution.report(tmp_path / "page", k=2).read_text("utf-8") for attribution in (whole, top, saved)]
    assert pages[0] == pages[1] == pages[2]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scores_of_any_size_are_written(tmp_path, scale):
    page = Page(Attribution(torch.tensor([[2.0, -1.0]]) * scale).report(tmp_path / "page"))
    assert page.data["queries"][0]["ranked"][0][0][1] == pytest.approx(2 * scale)


@pytest.mark.parametrize("bad", HOSTILE)
def test_texts_from_the_data_stay_texts(tmp_path, bad):
    info = {"train_info": {bad: [bad] * 5, "text": [bad] * 5}, "query_info": {bad: [bad] * 3}}
    options = {"train_text": [bad] * 5, "title": bad}
    page = Page(make_attribution(metadata={"method": bad, "unit": bad}, **info).report(tmp_path / "page", **options))
    plain = Page(make_attribution().report(tmp_path / "plain"))
    assert page.tags == plain.tags
    assert all(page.held[tag] == plain.held[tag] for tag in ("style", "script"))
    assert page.data["examples"][0]["texts"] == [["", bad, len(bad)], ["text", bad, len(bad)]]
    assert page.data["queries"][0]["facts"] == [[bad, bad]]
    assert page.text.count("<!--") == 0


def test_page_loads_nothing_and_runs_only_its_own_script(tmp_path):
    page = Page(make_attribution().report(tmp_path / "page"))
    links = [value for name, value in page.attributes if name in ("src", "href", "action", "srcset")]
    assert links == ["data:,"]
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp|innerHTML|insertAdjacentHTML|eval\(", page.text)
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    hashed = [hashlib.sha256(page.held[tag].encode()).digest() for tag in ("style", "script")]
    allowed = "style-src 'sha256-{}'; script-src 'sha256-{}'".format(*(base64.b64encode(h).decode() for h in hashed))
    assert policy == f"default-src 'none'; img-src data:; {allowed}; base-uri 'none'; form-action 'none'"


def first_texts(path):
    data = Page(path).data
    return data["queries"][0]["texts"], {example["name"]: example["texts"] for example in data["examples"]}


def test_texts_come_from_functions_lists_and_columns(tmp_path):
    decode = Mock(side_effect="text {}".format)
    attribution = make_attribution(query_info={"body": ["short"] * 3})
    query, train = first_texts(attribution.report(tmp_path / "a", queries=0, k=1, train_text=decode, query_text="body"))
    assert decode.mock_calls == [
        call(10),
        call(11),
    ]  # once each, by position in the dataset
    assert query == [["body", "short", 5]]
    assert train == {"10": [["", "text 10", 7]], "11": [["", "text 11", 7]]}
    _, train = first_texts(attribution.report(tmp_path / "a", queries=0, k=1, train_text=list("vwxyz")))
    assert train == {"10": [["", "v", 1]], "11": [["", "w", 1]]}
    with pytest.raises(ValueError, match="`train_text` has 2 texts, expected 5"):
        attribution.report(tmp_path / "a", train_text=["a", "b"])
    with pytest.raises(ValueError, match=r"`query_text` names no column of query_info \['body'\]: 'bodies'"):
        attribution.report(tmp_path / "a", query_text="bodies")


def test_texts_come_from_the_data(tmp_path):
    train = Examples([(f"training text {i}", 0) for i in range(20)]).subset(range(10, 15))
    queries = Examples([{"question": f"why {i}", "label": i} for i in range(3)])
    attribution = make_attribution(train_data=train, queries=queries)
    query, shown = first_texts(attribution.report(tmp_path / "a", queries=0, k=1))
    assert query == [["question", "why 0", 5]]
    assert shown["10"] == [["", "training text 10", 16]]
    # Long texts are cut, and long facts are texts.
    info = {"note": ["short", "x" * 5000, *"cde"], "two": ["a", "b\nc", *"cde"], "one": list("abcde")}
    data = Page(make_attribution(train_info=info).report(tmp_path / "a", queries=0, k=1)).data
    assert [fact for fact, _ in data["examples"][1]["facts"]] == ["one"]
    assert data["examples"][1]["texts"] == [["note", "x" * 2000, 5000], ["two", "b\nc", 3]]


def test_every_picture_is_embedded_once(tmp_path):
    train = Examples(TensorDataset(images(20), torch.arange(20))).subset(range(10, 15))
    queries = Examples(TensorDataset(images(3, offset=0.01), torch.arange(3)))
    attribution = Attribution(torch.rand(3, 5) + 0.1, train_data=train, queries=queries, train_indices=POSITIONS)
    path = attribution.report(tmp_path / "page")
    page = Page(path)
    assert len(page.data["pictures"]) == len(set(page.data["pictures"])) == page.text.count("data:image/png") == 8
    assert [query["picture"] for query in page.data["queries"]] == [0, 1, 2]
    assert len({example["picture"] for example in page.data["examples"]}) == 5
    assert path.stat().st_size < 60_000
    flat = Examples(TensorDataset(images(5).flatten(1)))
    attribution = Attribution(torch.rand(1, 5), train_data=flat)
    assert Page(attribution.report(tmp_path / "page")).data["pictures"] == []
    assert len(Page(attribution.report(tmp_path / "page", image_shape=(8, 8))).data["pictures"]) == 5
    with pytest.raises(ValueError, match="cannot be shown with image_shape"):
        attribution.report(tmp_path / "page", image_shape=(9, 9))


def pixels_in(file):
    with Image.open(io.BytesIO(file)) as picture:
        return torch.from_numpy(np.array(picture)).long()


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 2)])
def test_png_holds_every_pixel(shape):
    image = torch.rand(shape)
    assert torch.equal(pixels_in(png(image)), (image * 255).round().long())


def test_large_pictures_are_averaged_down():
    image = torch.rand(512, 256)
    blocks = 255 * image.unfold(0, 4, 4).unfold(1, 4, 4).mean((2, 3))
    assert (pixels_in(png(image)) - blocks).abs().max() <= 2  # rounded twice
    assert pixels_in(png(torch.rand(1000, 2, 3))).shape == (128, 1, 3)
    noise = Pictures()
    noise.add(torch.rand(2000, 1000, 3))
    assert len(noise.uris()[0]) < 40_000


def test_a_report_needs_pillow_for_pictures_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    make_attribution(train_info={"text": list("abcde")}).report(tmp_path / "texts")
    pictures = make_attribution(train_data=Examples(TensorDataset(images(5))))
    with pytest.raises(ModuleNotFoundError, match=r"report\(\) needs Pillow .* pip install 'stride-lightning\[plot\]'"):
        pictures.report(tmp_path / "pictures")
    assert os.listdir(tmp_path) == ["texts.html"]


def test_reading_leaves_the_random_state_alone(tmp_path):
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.rand(1, 8, 8)

    attribution = Attribution(torch.rand(1, 5), train_data=Examples(Augmented()))
    before = torch.get_rng_state()
    pages = {attribution.report(tmp_path / "page").read_bytes() for _ in range(2)}
    assert len(pages) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_path_is_completed_and_its_folders_are_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = make_attribution().report("~/some/where/report")
    assert path == tmp_path / "some" / "where" / "report.html"
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert os.listdir(path.parent) == ["report.html"]
    with pytest.raises(IsADirectoryError, match="is a folder: name the file to write"):
        make_attribution().report(tmp_path)
    monkeypatch.setattr("stride_lightning.results.scores.rank", lambda: 1)
    assert make_attribution().report(tmp_path / "report") == tmp_path / "report.html"
    assert not (tmp_path / "report.html").exists()  # only the first process writes


def test_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = make_attribution().report(tmp_path / "report.html")
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_attribution().report(path, title="another")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.html"]
    monkeypatch.undo()
    assert b"another" in make_attribution().report(path, title="another").read_bytes()
