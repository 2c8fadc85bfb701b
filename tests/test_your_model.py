"""The Python of docs/your_model.md runs as it stands, and prints what the page says."""

import contextlib
import io
import re

import pytest
import torch

from tests.helpers.readme import README, YOUR_MODEL, snippets

SHARED, *SNIPPETS = snippets(YOUR_MODEL)


def ids_of(snippet):
    return re.sub(r"\W+", "-", snippet.heading).lower()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=ids_of)
def test_snippet_prints_what_the_page_says(snippet, tmp_path, monkeypatch):
    if "transformers" in snippet.code:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names, printed = {"__name__": "snippet"}, io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
        for part in (SHARED, snippet):
            exec(compile(part.code, str(YOUR_MODEL), "exec"), names)
    assert " ".join(printed.getvalue().split()) == " ".join(snippet.output.split())
    assert snippet.output
    attribution = names["attribution"]
    assert attribution.scores.shape == (attribution.metadata["num_queries"], attribution.metadata["num_train"])
    assert (attribution.scores.abs().amax(1) > 0).all()
    assert list(tmp_path.iterdir()) == []  # nothing is left on disk


def test_kinds_are_ten():
    kinds = [heading for heading in re.findall(r"^### (\d+)\. ", YOUR_MODEL.read_text("utf-8"), re.MULTILINE)]
    assert kinds == [str(number) for number in range(1, 11)]
    assert all(snippet.output for snippet in SNIPPETS)


def test_lines_stay_in_their_places():
    lines = YOUR_MODEL.read_text("utf-8").splitlines()
    for snippet in (SHARED, *SNIPPETS):
        code = snippet.code.splitlines()
        assert [line for line in code if line] == [line for line, there in zip(lines, code, strict=False) if there]


@pytest.mark.parametrize("page", [README, *sorted(README.parent.glob("docs/*.md"))], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Files that a page names exist, and so do headings."""
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
