"""The Python of docs/your_data.md runs as it stands, and prints what the page says."""

import io
import re
import tarfile

import numpy as np
import pytest

from tests.helpers.readme import YOUR_DATA, check_snippet, id_of, skip_without_packages, snippets

SHARED, *SNIPPETS = snippets(YOUR_DATA)
ROWS = np.random.default_rng(0).standard_normal((70, 8)).astype(np.float32)
#: Places of the rows in each file of a package.
FILES = {"train-00": range(32), "train-01": range(32, 64), "queries-00": range(64, 70)}


def write_shards(folder):
    """Tar files, as webdataset reads them."""
    for name, places in FILES.items():
        with tarfile.open(folder / f"{name}.tar", "w") as shard:
            for i in places:
                array = io.BytesIO()
                np.save(array, ROWS[i])
                for suffix, content in {"x.npy": array.getvalue(), "label.cls": str(i % 3).encode()}.items():
                    member = tarfile.TarInfo(f"{i:04}.{suffix}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


def write_chunks(folder):
    """Chunks, as litdata reads them."""
    from litdata.streaming import Cache

    for name, places in {"train": range(64), "queries": range(64, 70)}.items():
        (folder / name).mkdir()
        cache = Cache(str(folder / name), chunk_size=16)
        for number, i in enumerate(places):
            cache[number] = {"x": ROWS[i], "label": i % 3}
        cache.done()
        cache.merge()


#: What writes the files that a snippet reads.
WRITERS = {"webdataset": write_shards, "litdata": write_chunks}


# The first is Lightning's, of streams that have a length; webdataset leaves files open.
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.filterwarnings("ignore:.*queries-00.tar|.*train-0..tar:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=id_of)
def test_snippet_prints_what_the_page_says(snippet, tmp_path, monkeypatch):
    skip_without_packages(snippet)
    monkeypatch.chdir(tmp_path)
    for package, write in WRITERS.items():
        if f"import {package}" in snippet.code:
            write(tmp_path)
    check_snippet(SHARED, snippet)


def test_packages_are_numbered():
    headings = re.findall(r"^### (\d+)\. ", YOUR_DATA.read_text("utf-8"), re.MULTILINE)
    assert headings == [str(number) for number in range(1, 8)]
