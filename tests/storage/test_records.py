"""What is written comes back bit for bit; whatever is damaged is refused by name; a kill leaves all or nothing."""

import enum
import errno
import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from stride_lightning.storage import records
from stride_lightning.storage.records import RecordError, find_records, read_info, read_record, write_record
from tests.helpers.processes import needs_fork, what_helper_saw

INFO = {"step": 3, "layers": ["fc1", "fc2"], "lr": 0.1, "seed": None, "nested": {"ok": True, "name": "é\n"}}
FILES = ["MANIFEST", "basis.safetensors", "design.safetensors", "empty.safetensors", "record.json"]


def example_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "basis": {"fc1": torch.randn(6, 4, generator=generator), "fc2": torch.randn(3, generator=generator)},
        "design": {"membership": torch.rand(5, 9, generator=generator) < 0.5},
        "empty": {},
    }


@pytest.fixture
def record_path(tmp_path):
    return write_record(tmp_path, "step=3", INFO, example_tensors())


def refused(path, file, reader=read_record):
    """The message with which `reader` refuses the record because of `file`."""
    with pytest.raises(RecordError, match=re.escape(f"file '{file}' of record '{path}': expected ")) as caught:
        reader(path)
    return str(caught.value)


OTHER_SCHEMA = (
    r"has schema 1, and this version of stride-lightning reads schema 2.*wrote it \(\{'stride_lightning': '9.1'\}\)"
)


def forge_manifest(path, files=None):
    """Make the manifest agree with the folder (or with `files`), as someone who knows the format could."""
    files = sorted(set(os.listdir(path)) - {"MANIFEST"}) if files is None else files
    body = "".join(f"{hashlib.sha256((path / file).read_bytes()).hexdigest()}  {file}\n" for file in files)
    (path / "MANIFEST").write_text(f"{body}{hashlib.sha256(body.encode()).hexdigest()}  MANIFEST\n")


class PlantsMarker:
    """Unpickling this creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_info_and_files_come_back(record_path):
    record = read_record(record_path)
    assert record.path == record_path
    assert {key: record.info[key] for key in INFO} == INFO
    assert (set(record.info), record.info["schema"]) == ({*INFO, "schema", "written"}, 2)
    assert read_info(record_path) == record.info
    assert record.groups == ("basis", "design", "empty")
    assert sorted(os.listdir(record_path)) == FILES
    assert os.listdir(record_path.parent) == ["step=3"]
    assert record.tensors("empty") == {}
    for group, named in example_tensors().items():
        torch.testing.assert_close(record.tensors(group), named, rtol=0, atol=0)
    with pytest.raises(KeyError, match=r"no tensor group 'none'; it has \['basis', 'design', 'empty'\]"):
        record.tensors("none")


def test_manifest_is_what_sha256sum_checks(record_path):
    lines = (record_path / "MANIFEST").read_text().splitlines(keepends=True)
    for line, file in zip(lines[:-1], FILES[1:], strict=True):
        assert line == f"{hashlib.sha256((record_path / file).read_bytes()).hexdigest()}  {file}\n"
    assert lines[-1] == f"{hashlib.sha256(''.join(lines[:-1]).encode()).hexdigest()}  MANIFEST\n"


@pytest.mark.parametrize(
    "name", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
)
def test_dtype_shape_and_bits_are_kept(tmp_path, name):
    dtype = getattr(torch, name)
    full = (torch.arange(12).reshape(3, 4) * 0.7).to(dtype)
    named = {"full": full, "transposed": full.t(), "scalar": full[1, 1].clone(), "none": full.new_empty(0, 3)}
    named["odd"] = torch.tensor([-0.0, *[torch.nan, torch.inf] * dtype.is_floating_point]).to(dtype)
    loaded = read_record(write_record(tmp_path, "r", {}, {"g": named})).tensors("g")
    assert set(loaded) == set(named)
    for name, tensor in named.items():
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tensor.shape)
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tensors_that_share_memory_or_need_grad_are_stored(tmp_path):
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    complex_values = torch.tensor([1 + 2j, 3 - 4j])
    named = {
        "tied": weight,
        "tied_again": weight,
        "row": weight[1],
        "overlapping_rows": weight[1:],
        "every_second": weight[:, ::2],
        "conjugate": complex_values.conj(),
        "negated_view": complex_values[:1].conj().imag,
    }
    loaded = read_record(write_record(tmp_path, "r", {}, {"g": named})).tensors("g")
    for name, tensor in named.items():
        assert torch.equal(loaded[name], tensor.detach()), name
    assert list(loaded) == sorted(named)
    loaded["tied"].zero_()
    assert torch.equal(loaded["tied_again"], weight.detach())  # separate copies, and writable ones


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"a": {"b": [0.0, float("nan")]}}, ValueError, "info['a']['b'][1] is nan"),
        ({"a": float("-inf")}, ValueError, "info['a'] is -inf"),
        ({"a": np.float64(1.0)}, TypeError, "info['a'] is a numpy.float64"),
        ({"a": (1, np.int64(1))}, TypeError, "info['a'][1] is a numpy.int64"),
        ({"a": Path("x")}, TypeError, "info['a'] is a pathlib"),
        ({"a": Colour.RED}, TypeError, "info['a'] is a "),
        ({"a": torch.ones(1)}, TypeError, "info['a'] is a torch.Tensor"),
        ({"a": {1: 2}}, TypeError, "info['a'] has the key 1: expected str, got int"),
        ({"a": {1, 2}}, TypeError, "info['a'] is a builtins.set"),
        ({"schema": 1}, ValueError, "reserved keys ['schema']"),
        ({"written": 2}, ValueError, "reserved keys ['written']"),
    ],
)
def test_info_that_is_not_plain_is_refused_by_key(tmp_path, value, error, message):
    with pytest.raises(error, match=re.escape(message)):
        write_record(tmp_path, "r", value, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a\nb", "a\0b"])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="A record needs a name"):
        write_record(tmp_path, name, {}, {})
    with pytest.raises(ValueError, match="The name of a tensor group"):
        write_record(tmp_path, "r", {}, {name: {}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["ä", "日本語", "v(1) of two"])
def test_records_may_have_any_name_of_a_folder(tmp_path, name):
    """Tensor groups may not: their names stand in the manifest, and some file systems rewrite accented letters."""
    path = write_record(tmp_path, name, {"a": 1}, {})
    assert path.name == name
    assert read_record(path).info["a"] == 1
    with pytest.raises(ValueError, match="The name of a tensor group"):
        write_record(tmp_path, "r", {}, {name: {}})


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"w": [1.0]}, TypeError, "tensors['g']['w']: expected a dense torch.Tensor, got list"),
        (
            {"w": torch.eye(2).to_sparse()},
            TypeError,
            "tensors['g']['w']: expected a dense torch.Tensor, got torch.sparse_coo.",
        ),
        ({"__metadata__": torch.ones(1)}, ValueError, "'__metadata__' cannot be the name"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused(tmp_path, named, error, message):
    with pytest.raises(error, match=re.escape(message)):
        write_record(tmp_path, "r", {}, {"fine": {"x": torch.ones(2)}, "g": named})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("file", FILES)
def test_every_truncation_is_refused_by_name(record_path, file):
    content = (record_path / file).read_bytes()
    for length in sorted({0, 1, len(content) // 2, len(content) - 1}):
        (record_path / file).write_bytes(content[:length])
        message = refused(record_path, file)
        assert "Delete this record and write it again, or restore it from a copy." in message
    (record_path / file).write_bytes(content + b"\n")
    refused(record_path, file)
    (record_path / file).write_bytes(content)
    read_record(record_path)


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_byte_is_refused_by_name(record_path, file):
    content = (record_path / file).read_bytes()
    positions = sorted({0, len(content) - 1, *np.linspace(0, len(content) - 1, 60).astype(int).tolist()})
    if file == "MANIFEST":
        positions = range(len(content))
    for position in positions:
        for mask in (0x01, 0x20, 0x80):  # 0x20 turns a hexadecimal digit into its capital
            damaged = bytearray(content)
            damaged[position] ^= mask
            (record_path / file).write_bytes(damaged)
            refused(record_path, file)
            if file in ("MANIFEST", "record.json"):
                refused(record_path, file, reader=read_info)
    (record_path / file).write_bytes(content)
    read_record(record_path)


def test_message_gives_both_checksums_and_info_is_read_without_the_tensors(record_path):
    file = record_path / "design.safetensors"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(b"other")
    message = refused(record_path, "design.safetensors")
    assert f"expected SHA-256 {expected}, got {hashlib.sha256(b'other').hexdigest()} (5 bytes)" in message
    assert read_info(record_path)["step"] == 3


def test_damage_after_reading_is_seen_when_tensors_are_asked_for(record_path):
    record = read_record(record_path)
    content = bytearray((record_path / "basis.safetensors").read_bytes())
    content[-1] ^= 1
    (record_path / "basis.safetensors").write_bytes(content)
    refused(record_path, "basis.safetensors", reader=lambda _: record.tensors("basis"))
    (record_path / "basis.safetensors").unlink()
    assert "missing" in refused(record_path, "basis.safetensors", reader=lambda _: record.tensors("basis"))


def test_the_checked_bytes_are_the_parsed_bytes(record_path, monkeypatch):
    """The file is read once: whoever swaps it after the check changes nothing."""
    record, parse = read_record(record_path), records.load_tensors

    def swap_then_parse(content):
        (record_path / "basis.safetensors").write_bytes(safetensors.torch.save({"fc1": torch.zeros(1)}))
        return parse(content)

    monkeypatch.setattr(records, "load_tensors", swap_then_parse)
    torch.testing.assert_close(record.tensors("basis"), example_tensors()["basis"], rtol=0, atol=0)


@pytest.mark.parametrize("forged", [False, True], ids=["unlisted", "listed"])
def test_planted_pickle_is_refused_by_name_and_never_loaded(record_path, tmp_path, forged):
    marker = tmp_path / "marker"
    evil = pickle.dumps(PlantsMarker(marker))
    pickle.loads(evil).close()
    assert marker.exists()  # the weapon works
    marker.unlink()
    (record_path / "evil.pkl").write_bytes(evil)
    if forged:
        forge_manifest(record_path)
    assert "this unexpected file" in refused(record_path, "evil.pkl")
    assert not marker.exists()


@pytest.mark.parametrize("file", ["basis.safetensors", "record.json"])
def test_pickle_under_a_good_name_is_never_loaded(record_path, tmp_path, file):
    (record_path / file).write_bytes(pickle.dumps(PlantsMarker(tmp_path / "marker")))
    forge_manifest(record_path)
    refused(record_path, file, reader=lambda path: read_record(path).tensors("basis"))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", FILES)
def test_missing_file_and_symlink_are_refused_by_name(record_path, tmp_path, file):
    (record_path / file).rename(tmp_path / "elsewhere")
    assert file == "MANIFEST" or "missing" in refused(record_path, file)
    (record_path / file).symlink_to(tmp_path / "elsewhere")
    assert "got a symlink" in refused(record_path, file)


def test_folder_in_place_of_a_file_is_refused_by_name(record_path):
    (record_path / "basis.safetensors").unlink()
    (record_path / "basis.safetensors").mkdir()
    assert "got a folder or device" in refused(record_path, "basis.safetensors")
    (record_path / "more").mkdir()
    (record_path / "basis.safetensors").rmdir()
    (record_path / "basis.safetensors").write_bytes(safetensors.torch.save({}))
    forge_manifest(record_path, FILES[1:])
    refused(record_path, "more")


def test_manifest_must_list_each_file_once_sorted_with_the_info(record_path):
    for files in (FILES[1:] + FILES[-1:], FILES[:0:-1], FILES[1:-1], ["MANIFEST", *FILES[1:]]):
        forge_manifest(record_path, files)
        assert "every file once, sorted" in refused(record_path, "MANIFEST")
    forge_manifest(record_path, [*FILES[1:], "../step=3/record.json"])
    assert "another form" in refused(record_path, "MANIFEST")
    forge_manifest(record_path)
    first, *middle, _ = (record_path / "MANIFEST").read_text().splitlines(keepends=True)
    other_forms = first[:64].upper() + first[64:], first.replace("  ", " *"), first.replace("\n", "\r\n"), "\n" + first
    for other in other_forms:
        body = "".join([other, *middle]).encode()
        (record_path / "MANIFEST").write_bytes(body + f"{hashlib.sha256(body).hexdigest()}  MANIFEST\n".encode())
        assert "another form" in refused(record_path, "MANIFEST")


def test_other_schema_says_who_wrote_it(record_path):
    info = read_info(record_path) | {"schema": 1, "versions": {"stride_lightning": "9.1"}}
    (record_path / "record.json").write_text(json.dumps(info))
    forge_manifest(record_path)
    with pytest.raises(RecordError, match=OTHER_SCHEMA):
        read_record(record_path)


@pytest.mark.parametrize("manifest", [None, "", "{}", "another form altogether"])
def test_the_schema_is_read_before_anything_else(record_path, manifest):
    """Whatever the other files of another schema look like, and whether there are any."""
    info = read_info(record_path) | {"schema": 1, "versions": {"stride_lightning": "9.1"}}
    (record_path / "record.json").write_text(json.dumps(info))
    (record_path / "basis.safetensors").unlink()
    (record_path / "MANIFEST").unlink()
    if manifest is not None:
        (record_path / "MANIFEST").write_text(manifest)
    for read in (read_info, read_record):
        with pytest.raises(RecordError, match=OTHER_SCHEMA):
            read(record_path)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, '{"schema": 2}', '{"schema": 2, "written": "now"}'])
def test_other_json_is_refused(record_path, content):
    (record_path / "record.json").write_text(content)
    forge_manifest(record_path)
    refused(record_path, "record.json")


def test_what_is_not_a_record(record_path, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        read_record(tmp_path / "absent")
    write_record(tmp_path, "step=4", {}, {})
    with pytest.raises(RecordError, match=r"holds records and is not one: choose one of \['step=3', 'step=4'\]"):
        read_record(tmp_path)
    (tmp_path / "plain").mkdir()
    for path in (tmp_path / "plain", record_path / "record.json"):
        for action in (read_record, read_info, records.remove_record):
            with pytest.raises(RecordError, match="is not a record: it has no file 'MANIFEST'"):
                action(path)
    (record_path / "MANIFEST").unlink()
    with pytest.raises(RecordError, match="is not a record"):
        read_record(record_path)
    assert issubclass(RecordError, RuntimeError)


def test_taken_names_get_versions_and_nothing_is_overwritten(tmp_path):
    (tmp_path / "r-v2").write_text("a file, not a record")
    (tmp_path / "r-v3").mkdir()
    paths = [write_record(tmp_path, "r", {"i": i}, {"g": {"x": torch.full((2,), i)}}) for i in range(4)]
    assert [path.name for path in paths] == ["r", "r-v1", "r-v4", "r-v5"]
    assert [read_info(path)["i"] for path in paths] == [0, 1, 2, 3]
    assert (tmp_path / "r-v2").read_text() == "a file, not a record"
    assert find_records(tmp_path) == paths
    with pytest.raises(FileExistsError):
        write_record(tmp_path / "r-v2", "r", {}, {})
    assert write_record(tmp_path / "new" / "deeper", "r", {}, {}) == tmp_path / "new" / "deeper" / "r"


def test_name_taken_between_look_and_rename(tmp_path, monkeypatch):
    """The rename itself refuses, whatever the look before it said."""
    rename, others = os.rename, []

    def slow_rename(source, target):
        if not others:
            others.append(target)
            monkeypatch.setattr(os, "rename", rename)
            others.append(write_record(tmp_path, "r", {"by": "other"}, {}))
        return rename(source, target)

    monkeypatch.setattr(os, "rename", slow_rename)
    path = write_record(tmp_path, "r", {"by": "me"}, {})
    assert (others[1].name, path.name) == ("r", "r-v1")
    assert [read_record(each).info["by"] for each in (others[1], path)] == ["other", "me"]
    assert len(os.listdir(tmp_path)) == 2


def test_records_are_found_oldest_first_whatever_the_folder_times_say(tmp_path, monkeypatch):
    clock = iter([50, 40, 60, 60, 60])
    monkeypatch.setattr(records.time, "time_ns", lambda: next(clock))
    paths = [write_record(tmp_path, name, {}, {}) for name in ("c", "d", "s10", "s9", "a")]
    for age, path in enumerate(paths):
        os.utime(path, ns=(age, 1000 - age))
    (tmp_path / ".c.part-1-0").mkdir()
    (tmp_path / ".c.part-1-0" / "MANIFEST").write_text("")
    (tmp_path / "link").symlink_to(paths[0])
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert [path.name for path in find_records(tmp_path)] == ["d", "c", "a", "s9", "s10"]
    assert find_records(tmp_path / "absent") == []
    (paths[1] / "record.json").write_text("")  # damaged: still listed, by its modification time
    os.utime(paths[1], ns=(0, 55))
    assert [path.name for path in find_records(str(tmp_path))] == ["c", "d", "a", "s9", "s10"]


def test_removal_takes_the_record_only(record_path, tmp_path):
    other = write_record(tmp_path, "other", {}, {})
    (record_path / "basis.safetensors").write_bytes(b"damaged")
    (tmp_path / "link").symlink_to(other)
    with pytest.raises(RecordError, match="is a symlink: remove the record it points to"):
        records.remove_record(tmp_path / "link")
    records.remove_record(record_path)
    assert sorted(os.listdir(tmp_path)) == ["link", "other"]
    read_record(other)
    with pytest.raises(FileNotFoundError, match="nothing is there"):
        records.remove_record(record_path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads file names of handles from /proc")
def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Order of the durable steps: each file, its folder, the rename, the parent."""
    order, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda old, new: (order.append((str(old), str(new))), rename(old, new))[1])
    path = write_record(tmp_path, "r", {}, example_tensors())
    part = os.path.dirname(order[0])
    assert re.fullmatch(rf"\.r\.part-{os.getpid()}-[0-9a-f]+", os.path.basename(part))
    assert sorted(order[:5]) == [f"{part}/{file}" for file in FILES]
    assert order[4:] == [f"{part}/MANIFEST", part, (part, str(path)), str(tmp_path)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_failure_at_any_step_leaves_nothing_and_is_reported(tmp_path, monkeypatch, error):
    before = write_record(tmp_path, "r", {}, {})
    fsync, calls = os.fsync, []

    def failing(handle):
        calls.append(handle)
        if len(calls) == fail_at or (fail_at < 0 and len(calls) >= -fail_at):
            raise error if len(calls) == abs(fail_at) else OSError(errno.EIO, "while cleaning up")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    for fail_at in (1, 2, 3, 4, 5, 6, 7, *([-3, -7] if isinstance(error, OSError) else [])):  # negative: from then on
        calls.clear()
        with pytest.raises(type(error)) as caught:
            write_record(tmp_path, "r", {}, example_tensors())
        assert caught.value is error
        assert os.listdir(tmp_path) == ["r"], fail_at
    fail_at = 8
    calls.clear()
    write_record(tmp_path, "r", {}, example_tensors())
    assert len(calls) == 7  # so the loop above has failed at every one of them
    read_record(before)


@pytest.fixture(scope="module")
def after_kills(tmp_path_factory):
    """What tests/helpers/kill_writer.py saw, by kind of kill; one process for all kinds, as importing torch is slow."""
    return what_helper_saw("kill_writer.py", tmp_path_factory.mktemp("kills"))


@needs_fork
def test_writer_killed_after_each_operation_or_at_random_moments_leaves_all_or_nothing(after_kills):
    assert after_kills["loaded"] == []  # neither lightning nor torchmetrics
    result = after_kills["steps"]
    file = ["open", "write", "write", "fsync", "close"]
    # two groups, record.json, the manifest; then folder, rename, parent
    assert result["trace"] == ["mkdir", *file * 4, "fsync", "rename", "fsync"]
    named = result["trace"].index("rename")
    assert result["outcomes"] == ["absent"] * named + ["whole"] * (len(result["trace"]) + 1 - named)
    assert result["leftovers"] == named  # each early kill fell inside the write
    result = after_kills["moments"]
    assert len(result["outcomes"]) == 40
    assert set(result["outcomes"]) == {"absent", "whole"}
    assert result["inside"] >= 3


@needs_fork
def test_remover_killed_after_each_operation_leaves_all_or_nothing(after_kills):
    result = after_kills["removal"]
    assert result["trace"] == ["rename", "fsync", *["unlink"] * 4, "rmdir"]
    assert set(result["outcomes"]) == {"absent"}  # gone from its first operation on
    assert result["left"] == []


@needs_fork
def test_writers_at_once_to_one_name_all_end_whole(after_kills):
    result = after_kills["race"]
    assert sorted(result["by"]) == [[writer, i] for writer in range(4) for i in range(10)]
    assert sorted(result["names"]) == sorted(["step=1", *(f"step=1-v{version}" for version in range(1, 40))])
    assert sorted(result["left"]) == sorted(result["names"])
