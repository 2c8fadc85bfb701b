"""Methods for language models against retrained ones: linear datamodeling score (LDS), seconds and memory.

Protocol. A text is cut into passages of equal length; a small model is trained on some of them, and again, twice, on
every one of some random halves. Queries are passages that no model saw (of held-out documents, where there are
documents). LDS is the mean over queries of the rank correlation between losses that scores predict for the halves and
those of the retrained models, with a 95 % bootstrap interval over queries and subsets; the noise ceiling is what a
perfect predictor would get. All methods have their defaults. Seconds are of the whole ``attribute()`` call and memory
is the peak of the resident set above what was there when it began. Every row is a process of its own, which has called
the method once before, on 16 sequences and 2 queries: what a first call pays once is in neither. Only the learned basis
is not tried first, since its training takes as long on a few sequences.

Of TF-IDF, which runs no model, the variant (characters or words) with the higher LDS stands in the table: it is chosen
with the truth in sight, which no method is. Where the text has labels (genres of documents), the last column is the
share of each query's top ten proponents that have its label.

    python benchmarks/language_model.py --retrained pydoc.npz
    python benchmarks/language_model.py --data tinyshakespeare.npz --retrained shakespeare.npz
    python benchmarks/language_model.py --data brown_corpus.npz --tokenizer bpe --retrained brown.npz
    python benchmarks/language_model.py --model llama --tokenizer bpe --retrained llama.npz

``--retrained`` names the file that keeps the losses of the retrained models. It is made if it is not there, which takes
some ten minutes on one thread and goes on where it was killed; the rest takes a few. ``--data`` is an ``.npz`` with
``text`` (UTF-8 bytes), and maybe ``offsets`` of documents and their labels ``y``; without it, the text is Python's help
on its language.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from common.language import MODELS, load_truth, make_truth, open_truth, save_truth, settings_of
from common.memory import start_meter
from torch.nn import functional as F

from stride_lightning import Attribution, attribute, evaluate

#: Name of a row: method and options of attribute(); HEAD stands for the name of the last layer.
HEAD = "net.lm_head"
ROWS = {
    "STRIDE, closed form (default)": {"method": "stride"},
    "STRIDE, operators, prior": {"method": "stride", "recovery": "prior"},
    "STRIDE, learned basis, lasso": {"method": "stride", "basis": "learned", "recovery": "lasso"},
    "Grad-Dot": {"method": "grad-dot"},
    "LoGra": {"method": "logra"},
    "LoGra, last layer": {"method": "logra", "layers": [HEAD]},
    "EK-FAC": {"method": "ekfac"},
    "EK-FAC, last layer": {"method": "ekfac", "layers": [HEAD]},
    "TRAK": {"method": "trak"},
    "TF-IDF": {"text": ["char", "word"]},
    "cosine of mean hidden states": {"hidden": True},
}
WIDTH = max(map(len, ROWS)) + 7


# ---------------------------------------------------------------- in processes of their own


def run_row(arguments, name):
    """One row; prints one line of JSON for every variant of it."""
    truth, options = load_truth(arguments.retrained), ROWS[name]
    model, train, queries, retrained = open_truth(truth)
    for variant in options.get("text", [None]):
        if variant is not None:
            compute, label = tf_idf(truth, variant), f"{name}, {variant}s"
        elif "hidden" in options:
            compute, label = (lambda: Attribution(hidden_cosines(model, train, queries))), name
        else:
            chosen = {**options, "seed": arguments.seed, "show_progress": False}
            if "basis" not in options:
                few, two = torch.utils.data.Subset(train, range(16)), torch.utils.data.Subset(queries, range(2))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    attribute(model, two, train_data=few, **chosen)
            compute, label = (lambda chosen=chosen: attribute(model, queries, train_data=train, **chosen)), name
        peak_memory, started = start_meter(), time.perf_counter()
        attribution = compute()
        seconds, memory = time.perf_counter() - started, peak_memory() / 2**20
        judged = evaluate({label: attribution}, retrained, show_progress=False)[label]
        row = {"name": label, "lds": judged.lds, "low": judged.lds_lower, "high": judged.lds_upper}
        share = label_share(attribution, truth) if has_labels(truth) else None
        print(json.dumps(row | {"seconds": seconds, "memory": memory, "share": share}), flush=True)


def tf_idf(truth, analyzer):
    """A function that compares texts by TF-IDF of words, or of one to four characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    sizes = (1, 4) if analyzer == "char" else (1, 1)

    def compute():
        vectorizer = TfidfVectorizer(analyzer=analyzer, ngram_range=sizes, sublinear_tf=True)
        rows = vectorizer.fit_transform(truth["train_texts"].tolist())
        query_rows = vectorizer.transform(truth["query_texts"].tolist())
        return Attribution(torch.from_numpy((query_rows @ rows.T).toarray()).float())

    return compute


def hidden_cosines(model, train, queries):
    """Cosines of the last layer's hidden states, mean over tokens."""

    def means(data):
        with torch.no_grad():
            parts = [model.net(input_ids=ids, output_hidden_states=True) for ids in data.ids.split(64)]
        return F.normalize(torch.cat([part.hidden_states[-1].mean(1) for part in parts]), dim=1)

    return means(queries) @ means(train).T


def has_labels(truth):
    return bool((truth["train_labels"] >= 0).all())


def label_share(attribution, truth):
    """Mean over queries of the share of their ten strongest proponents that have their label."""
    labels, query_labels = (torch.from_numpy(truth[name]) for name in ("train_labels", "query_labels"))
    return float((labels[attribution.top(10).proponents] == query_labels[:, None]).float().mean())


# ---------------------------------------------------------------- in this process


def child(arguments, name):
    """What this script prints with other arguments."""
    command = [sys.executable, __file__, "--retrained", str(arguments.retrained), "--threads", str(arguments.threads)]
    command += ["--seed", str(arguments.seed), "--row", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        return [{"name": name, "failed": f"status {done.returncode}: {said[-1]}"}]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def compare(arguments):
    """The table; returns the rows that failed."""
    truth = load_truth(arguments.retrained)
    *_, retrained = open_truth(truth)
    describe(truth, retrained, arguments)
    labelled, failed = has_labels(truth), []
    last = f" {'same label':>11}" if labelled else ""
    print(f"\n{'':<{WIDTH}} {'LDS':>6} {'95 % interval':>15} {'seconds':>8} {'MiB':>7}{last}", flush=True)
    for name in ROWS if arguments.rows is None else arguments.rows:
        row = max(child(arguments, name), key=lambda row: row.get("lds", -1))
        if "failed" in row:
            failed.append(name)
            print(f"{name:<{WIDTH}} failed: {row['failed']}", flush=True)
            continue
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        last = f" {row['share']:11.1%}" if labelled else ""
        print(
            f"{row['name']:<{WIDTH}} {row['lds']:6.3f} {interval:>15} {row['seconds']:8.2f} {row['memory']:7.0f}{last}",
            flush=True,
        )
    return failed


def describe(truth, retrained, arguments):
    """Say what stands in the truth, and what chance would give."""
    known, count = truth["settings"], len(truth["train"])
    num_parameters = sum(value.size for name, value in truth.items() if name.startswith("net."))
    print(
        f"{known['data']}: {count} sequences of {known['length']} tokens ({known['tokenizer']}, vocabulary of "
        f"{truth['shape']['vocabulary']}), {len(truth['queries'])} queries\n"
        f"{known['model']} of width {known['width']}, {known['depth']} layers, {num_parameters:,} weights; "
        f"{known['epochs']} epochs of AdamW (one cycle to {known['rate']:g}) in batches of {known['batch_size']}\n"
        f"{len(retrained.masks)} random halves x {len(retrained.seeds)} seeds, trained in {truth['seconds']:.0f} s; "
        f"mean loss of the queries {retrained.losses.mean():.3f} nats per token"
        + ("" if retrained.ceiling is None else f"; noise ceiling {retrained.ceiling:.3f}")
    )
    print(f"{arguments.threads} threads, load before the first row {os.getloadavg()[0]:.1f}")
    if has_labels(truth):
        labels, query_labels = (torch.from_numpy(truth[name]) for name in ("train_labels", "query_labels"))
        chance = (labels == query_labels[:, None]).float().mean()
        print(f"{len(labels.unique())} labels; by chance {chance:.1%} of ten proponents have the query's")


def get_truth(arguments):
    """Make the truth file if there is none; refuse one of other settings."""
    if not arguments.retrained.exists():
        started = time.perf_counter()
        save_truth(arguments.retrained, make_truth(arguments))
        print(f"{arguments.retrained.name} made in {time.perf_counter() - started:.0f} s", flush=True)
        return
    stored, wanted = load_truth(arguments.retrained)["settings"], settings_of(arguments)
    other = [
        f"{name} {stored.get(name)} in place of {wanted[name]}" for name in wanted if stored.get(name) != wanted[name]
    ]
    if other:
        raise SystemExit(f"{arguments.retrained} was made with other settings: {', '.join(other)}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="an .npz file with a text; Python's help on its language by default")
    parser.add_argument(
        "--retrained", type=Path, help="where retrained models' losses are kept; made if it is not there"
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="some rows, by name; all")
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--tokenizer", choices=("char", "bpe"), default="char")
    parser.add_argument("--vocabulary", type=int, default=2000, help="tokens of the BPE")
    parser.add_argument("--length", type=int, default=64, help="tokens of a passage")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--train", type=int, default=400, help="training sequences")
    parser.add_argument("--queries", type=int, default=48)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--num-seeds", type=int, default=2, help="models of every subset")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", action="store_true", help="of retraining")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="lightning")
    if arguments.row is not None:
        run_row(arguments, arguments.row)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.retrained = arguments.retrained or Path(folder) / "truth.npz"
        get_truth(arguments)
        failed = compare(arguments)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
