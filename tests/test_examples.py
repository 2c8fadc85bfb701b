"""The scripts that a newcomer runs do run, and say what they promise."""

import importlib.util
import logging
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


def load_script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def as_before(monkeypatch, tmp_path):
    """Runs in an empty folder; what scripts set for the whole process is put back."""
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # so that it is put back
    logger = logging.getLogger("lightning.pytorch")
    level, threads, generator = logger.level, torch.get_num_threads(), torch.get_rng_state()
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)
    torch.set_rng_state(generator)


@pytest.fixture
def example(monkeypatch, as_before):
    """Loads an example with some of its constants made smaller."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")

    def load(name, **constants):
        script = load_script(f"examples/{name}.py")
        for constant, value in constants.items():
            monkeypatch.setattr(script, constant, value)
        return script

    return load


@pytest.fixture
def run(capsys):
    """Runs a script; all it printed, and the parts that match a pattern, as many as are said."""

    def run(script, pattern, count):
        script.main()
        printed = capsys.readouterr().out
        rows = re.findall(pattern, printed, re.MULTILINE)
        assert len(rows) == count, printed
        return printed, rows

    return run


def test_wrong_labels_are_found(example, run):
    script = example("find_mislabelled", NUM_TRAIN=400, NUM_WRONG=40, EPOCHS=12, EVERY_N_EPOCHS=3)
    printed, rows = run(script, r"^(loss|mean loss|tracin|grad-dot|ekfac) +(\.?\d\S*)  (\S+) +(\d+)  ", 2 * 5)
    # Twelve epochs are too few to learn wrong labels by heart: everything finds them.
    assert min(float(auroc) for _, auroc, *_ in rows) > 0.9, printed
    assert min(int(hits) for *_, hits in rows) > 20, printed
    assert {path.name for path in Path("runs/mislabelled").glob("*.png")} == {"regularised.png", "memorised.png"}


def test_wrong_labels_are_wrong_and_as_many_as_said(example):
    script = example("find_mislabelled")
    train, true = script.digits_with_wrong_labels()
    images, given = train.tensors
    assert images.shape == (1000, 1, 8, 8)
    assert int((given != true).sum()) == script.NUM_WRONG == 100
    assert set(given.tolist()) <= set(range(10))


def test_labels_are_spent(example, run):
    script = example("choose_coreset", BUDGETS=(5, 60), NUM_SEEDS=2, EPOCHS=30)
    printed, rows = run(script, r"^(information|k-centre|least sure|random) +(\S+) +(\S+) +(\d+)$", 4)
    (before,) = re.findall(r"accuracy (\S+)\.", printed)
    assert all(float(before) - 0.05 < float(few) < float(many) for _, few, many, _ in rows), printed
    num_rare = {name: int(rare) for name, *_, rare in rows}
    assert min(num_rare["information"], num_rare["k-centre"], num_rare["least sure"]) > 2 * num_rare["random"], printed
    assert Path("runs/coreset/accuracy.png").stat().st_size > 0


def test_digits_with_rare_classes_are_split(example):
    script = example("choose_coreset")
    labelled, pool, test = script.digits()
    assert len(labelled) == script.NUM_LABELLED
    assert torch.cat([labelled.tensors[1], pool.tensors[1]]).bincount()[5:].tolist() == [script.NUM_RARE] * 5
    assert test.tensors[1].bincount().min() > 30
    pixels = torch.cat([part.tensors[0] for part in (labelled, pool, test)]).flatten(1)
    assert len(pixels.unique(dim=0)) == len(pixels)  # no digit is in two parts


# ---- benchmarks/methods.py ------------------------------------------------------------------------------------------


@pytest.fixture
def truth_folder(tmp_path):
    """A truth file in which nothing was retrained: losses are noise."""
    generator = np.random.default_rng(0)
    layers = nn.Linear(5, 8), nn.Linear(8, 3)
    arrays = {
        "x_train": generator.standard_normal((60, 5), dtype=np.float32),
        "x_test": generator.standard_normal((6, 5), dtype=np.float32),
        "y_train": np.arange(60) % 3,
        "y_test": np.arange(6) % 3,
        "masks": np.packbits(generator.permuted(np.arange(60) < np.full((10, 1), 30), axis=1), axis=1),
        "losses": generator.random((10, 6), dtype=np.float32),
    }
    for place, layer in enumerate(layers):
        arrays[f"p{2 * place}"] = layer.weight.detach().numpy().T
        arrays[f"p{2 * place + 1}"] = layer.bias.detach().numpy()[None]
    np.savez(tmp_path / "tiny.npz", **arrays)
    return tmp_path


def test_methods_are_compared(truth_folder, monkeypatch, capsys, as_before):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as if it were run: scripts import from their folder
    monkeypatch.setenv("STRIDE_TRUTH", str(truth_folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--methods", "tracin,trak", "--epochs", "2", "--threads", "1", "--sweep"]
    monkeypatch.setattr(sys, "argv", ["methods.py", "--truth", "tiny", *options])
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        load_script("benchmarks/methods.py").main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    table, sweep = printed.split("tiny: LDS by damping")
    number = r"-?\d\.\d{3}"
    assert re.search(rf"^tracin +{number} +\d+\.\d\d +\d+ +-$", table, re.MULTILINE), printed
    assert re.search(rf"^trak +{number} +\d+\.\d\d +\d+ +[\d.]+$", table, re.MULTILINE), printed
    assert re.search(rf"^trak.* \[{number}\].*   \d\.\d{{3}}$", sweep, re.MULTILINE), printed
    (scored,) = re.findall(rf"^trak +({number})", table, re.MULTILINE)
    assert f"[{scored}]" in sweep  # the same method at the same damping


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "--sweep"),
        (["--truth", "nowhere"], 2, "Expected the path of an .npz file, or the name of one"),
        (["--truth", __file__, "--methods", "tracing"], 2, "unknown: tracing. Known: stride, "),
    ],
)
def test_methods_say_what_they_expect(monkeypatch, capsys, arguments, status, said):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as if it were run: scripts import from their folder
    monkeypatch.delenv("STRIDE_TRUTH", raising=False)
    script = load_script("benchmarks/methods.py")
    monkeypatch.setattr(sys, "argv", ["methods.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == status
    assert said in " ".join("".join(capsys.readouterr()).split())


# ---- benchmarks/information.py --------------------------------------------------------------------------------------


def test_information_is_compared_with_refits_and_drawn(monkeypatch, capsys, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("STRIDE_DATA", str(tmp_path))  # where there is none
    script = load_script("benchmarks/information.py")
    assert script.default_data() is None
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", ["information.py", "--sections", "refits", "--threads", threads])
    script.main()
    values = re.findall(r" (\d\.\d\d) \+- \d\.\d\d$", capsys.readouterr().out, re.MULTILINE)
    growth, falling, change, influence = map(float, values)
    assert 0.3 < growth < change < 0.9 < influence <= 1
    assert 0.3 < falling < 0.5
    monkeypatch.setattr(
        sys, "argv", ["information.py", "--threads", threads, "--picture", str(tmp_path / "information.png")]
    )
    script.main()
    assert (tmp_path / "information.png").stat().st_size > 0


# ---- examples of language models -----------------------------------------------------------------------------------


@pytest.fixture
def language_example(example):
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    return example


def test_passages_behind_a_text_are_found(language_example, run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script = language_example(
        "attribute_text", NUM_CHAPTERS=5, NUM_PER_CHAPTER=18, NUM_HELD_OUT=12, EPOCHS=6, PROMPTS=("A future", "The")
    )
    printed, rows = run(script, r"^top 10, (stride|shared words|random) +(\d+)% +(\S+) nats$", 3)
    same = {name: int(share) for name, share, _ in rows}
    helped = {name: float(nats) for name, _, nats in rows}
    assert same["stride"] > same["random"] + 15, printed
    assert helped["stride"] > helped["random"] + 0.01, printed
    folder = Path("runs/text/version_0")
    assert r"A future [\u2026]" in (folder / "report.html").read_text("utf-8")
    events = EventAccumulator(str(folder)).Reload()
    (table,) = events.Tensors("stride/top_examples/text_summary")
    assert "| chapter | text |" in table.tensor_proto.string_val[0].decode()
    assert (folder / "scores").is_dir()


def test_passages_stand_once_and_of_a_continuation_only_it_is_asked(language_example):
    script = language_example("attribute_text")
    passages = script.passages()
    assert len({text for _, text in passages}) == len(passages) > 300
    assert len({topic for topic, _ in passages}) == script.NUM_CHAPTERS

    class Letters:
        def encode(self, text):
            return type("Encoding", (), {"ids": [ord(letter) for letter in text]})

    query = script.encoded(Letters(), "ab", "cde")
    assert query["labels"][:6].tolist() == [-100, -100, 99, 100, 101, -100]
    assert query["attention_mask"].sum() == 5


def test_a_selection_helps_more_than_chance(language_example, run):
    sizes = {"code": 90, "reference": 60, "docstrings": 30}
    script = language_example(
        "select_data", POOL=sizes, NUM_WANTED=12, NUM_TEST=30, NUM_CHOSEN=40, NUM_SEEDS=2, POOL_EPOCHS=3, EPOCHS=3
    )
    printed, rows = run(script, r"^(\S.*?)  +(\d\.\d{3}) ± \d\.\d{3} +(\d+)%$", 5)
    loss = {name: float(value) for name, value, _ in rows}
    shares = {name: int(share) for name, *_, share in rows}
    assert max(loss["stride, mean"], loss["stride, in turn"]) < loss["random"] - 0.03, printed
    assert min(shares["stride, mean"], shares["stride, in turn"]) > shares["random"] + 5, printed
    assert Path("runs/selection/losses.png").stat().st_size > 0


def test_target_and_pool_have_no_text_in_common(language_example):
    script = language_example("select_data")
    pool, wanted, test = script.pool_and_target()
    texts = [text for _, text in pool] + wanted + test
    assert len(set(texts)) == len(texts) == sum(script.POOL.values()) + script.NUM_WANTED + script.NUM_TEST
    assert {kind: [k for k, _ in pool].count(kind) for kind in script.POOL} == script.POOL


def test_sequences_that_gave_answers_away_are_found(language_example, run):
    script = language_example("find_contamination", NUM_ITEMS=16, NUM_OTHERS=20, EPOCHS=24)
    printed, rows = run(script, r"^(\S.*?)  +(\d+)% +(\d+)% +(\S+)$", 5)
    shares = {name: (int(three), int(ten)) for name, three, ten, _ in rows}
    assert shares["stride"][1] > shares["random"][1] + 25, printed
    assert shares["stride among those"][0] > shares["random"][0] + 40, printed
    (right,) = re.findall(r"the 8 leaked items: (\d+)%", printed)
    assert int(right) > 50, printed  # by chance 25 %
    assert Path("runs/contamination/scores").is_dir()


def test_leaked_items_have_answers_in_the_training_data(language_example):
    script = language_example("find_contamination")
    items, train = script.benchmark_and_training_data()
    assert len(items) == len({answer for *_, answer in items}) == script.NUM_ITEMS
    for number, (_, options, answer) in enumerate(items):
        copies = [(text, given) for text, item, given in train if item == number]
        assert [given for _, given in copies].count(True) == 3 * (number < script.NUM_ITEMS // 2)
        assert len(copies) == 5
        assert all(word in text for text, _ in copies for word in options)
        assert all(text.endswith(f": {answer}") == given for text, given in copies)
