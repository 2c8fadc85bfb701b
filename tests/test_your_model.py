"""The Python of docs/your_model.md runs as it stands, and prints what the page says."""

import re

import pytest

from tests.helpers.readme import README, YOUR_DATA, YOUR_MODEL, check_snippet, id_of, skip_without_packages, snippets

SHARED, *SNIPPETS = snippets(YOUR_MODEL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=id_of)
def test_snippet_prints_what_the_page_says(snippet, tmp_path, monkeypatch):
    skip_without_packages(snippet)
    monkeypatch.chdir(tmp_path)
    check_snippet(SHARED, snippet)


def test_kinds_are_ten():
    kinds = [heading for heading in re.findall(r"^### (\d+)\. ", YOUR_MODEL.read_text("utf-8"), re.MULTILINE)]
    assert kinds == [str(number) for number in range(1, 11)]
    assert all(snippet.output for snippet in SNIPPETS)


@pytest.mark.parametrize("page", [YOUR_MODEL, YOUR_DATA], ids=lambda page: page.stem)
def test_lines_stay_in_their_places(page):
    lines = page.read_text("utf-8").splitlines()
    for snippet in snippets(page):
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
