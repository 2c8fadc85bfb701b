"""What STRIDE costs for language models: against one forward pass, with more subsets, more sequences, two processes.

Protocol. Models have random weights and sequences random tokens: no cost depends on what they say. Every table is of
processes of its own, each of which has called ``attribute()`` once before on a few sequences.

Cost: ``forward`` is the model's plain forward pass over the training tokens, logits and all, without gradients, in the
batches that STRIDE takes; everything else is seconds per token that it reads, and how often a forward pass fits in
that. Growth in the number of subsets K: operators with ``recovery="prior"``. Growth in the number of sequences n: the
closed form on a tiny model. An exponent is the slope from the row above, in logarithms: 1 is linear, 0 is flat.
Memory is the peak of the resident set above what was there at entry, when the sequences themselves were there already;
of that, what the scores take, which must grow, is taken off: ``4 q n`` bytes. Two processes: each of them with one
thread calls ``attribute()`` after ``init_process_group``, against one process with one thread; scores must agree.
Cache: with ``cache_dir`` the first call writes the activations of all training tokens, a second one reads them.

    python benchmarks/language_scale.py
    python benchmarks/language_scale.py --tables cost processes --model llama
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from common.language import MODELS, LanguageModel, Sequences
from common.memory import start_meter
from torch import distributed, multiprocessing

from stride_lightning import attribute

TABLES = ("cost", "subsets", "sequences", "processes", "cache")
TINY = {"model": "gpt2", "vocabulary": 64, "length": 32, "width": 32, "depth": 2, "heads": 2}


def make(shape, num_train, num_queries):
    """A model in eval mode, training sequences and queries."""
    torch.manual_seed(0)
    model = LanguageModel(shape).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape["vocabulary"], (num_train + num_queries, shape["length"]), generator=generator)
    return model, Sequences(ids[num_queries:].clone()), Sequences(ids[:num_queries].clone())


def measured(model, train, queries, **options):
    """One call of attribute(): the attribution, its seconds, and MiB above entry without the scores."""
    peak_memory, started = start_meter(), time.perf_counter()
    attribution = attribute(model, queries, train_data=train, show_progress=False, **options)
    seconds = time.perf_counter() - started
    return attribution, seconds, (peak_memory() - 4 * attribution.scores.numel()) / 2**20


def warm(model, train, queries, **options):
    few = torch.utils.data.Subset(train, range(16))
    measured(model, few, queries, **options)


# ---------------------------------------------------------------- in processes of their own


def cost(arguments):
    """Seconds of the passes and of a plain one, the least of some repeats."""
    model, train, queries = make(arguments.shape, arguments.sequences, arguments.queries)
    options = {"recovery": "prior", "num_subsets": arguments.subsets}
    warm(model, train, queries)
    warm(model, train, queries, **options)
    rows = {"forward": [], "forward, queries": []}
    for name in ("fit", "score", "operators", "measure"):
        rows[name] = []
    for _ in range(arguments.repeats):
        rows["forward"].append(forward(model, train))
        rows["forward, queries"].append(forward(model, queries))
        plain = measured(model, train, queries)[0].metadata
        rows["fit"].append(plain["sequences"]["seconds"]["statistics"])
        rows["score"].append(plain["attribute_seconds"]["measure"])
        steered = measured(model, train, queries, **options)[0].metadata
        rows["operators"].append(steered["sequences"]["seconds"]["operators"])
        rows["measure"].append(steered["attribute_seconds"]["measure"])
    known = {name: plain["sequences"][name] for name in ("steered", "num_features", "operator_shape")}
    return {name: min(seconds) for name, seconds in rows.items()} | known


def forward(model, data):
    started = time.perf_counter()
    with torch.no_grad():
        for ids in data.ids.split(max(1, 2**28 // (16 * data.ids.shape[1] * model.net.config.vocab_size))):
            model(ids)
    return time.perf_counter() - started


def subsets(arguments):
    """One number of subsets."""
    model, train, queries = make(arguments.shape, arguments.sequences, arguments.queries)
    warm(model, train, queries, recovery="prior", num_subsets=8)
    attribution, seconds, memory = measured(model, train, queries, recovery="prior", num_subsets=arguments.value)
    parts = attribution.metadata["sequences"]["seconds"] | attribution.metadata["attribute_seconds"]
    shape = attribution.metadata["sequences"]["operator_shape"]
    return {"seconds": seconds, "memory": memory, "shape": shape, **parts}


def sequences(arguments):
    """One number of sequences."""
    model, train, queries = make(TINY, arguments.value, arguments.queries)
    warm(model, train, queries)
    _, seconds, memory = measured(model, train, queries)
    return {"seconds": seconds, "memory": memory}


def processes(arguments):
    """Seconds and scores of one process, and of two that share the work."""
    model, train, queries = make(arguments.shape, arguments.sequences, arguments.queries)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for options in ({}, {"recovery": "prior", "num_subsets": arguments.subsets}):
            warm(model, train, queries, **options)
            attribution, seconds, _ = measured(model, train, queries, **options)
            given = (arguments.shape, arguments.sequences, arguments.queries, folder, options)
            multiprocessing.spawn(one_rank, given, nprocs=2)
            other = torch.load(Path(folder) / "scores.pt")
            gap = (attribution.scores - other["scores"]).abs().max() / attribution.scores.abs().max()
            rows.append({"one": seconds, "two": other["seconds"], "gap": float(gap)})
    return rows


def one_rank(rank, shape, num_train, num_queries, folder, options):
    torch.set_num_threads(1)
    meeting = Path(folder) / f"meeting-{len(options)}"
    distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=2)
    model, train, queries = make(shape, num_train, num_queries)
    warm(model, train, queries, **options)
    distributed.barrier()
    attribution, seconds, _ = measured(model, train, queries, **options)
    if rank == 0:
        torch.save({"scores": attribution.scores, "seconds": seconds}, Path(folder) / "scores.pt")
    distributed.destroy_process_group()


def cache(arguments):
    """Seconds without a cache, of the call that writes it, and of one that reads it."""
    model, train, queries = make(arguments.shape, arguments.sequences, arguments.queries)
    warm(model, train, queries)
    with tempfile.TemporaryDirectory() as folder:
        attribution, without, _ = measured(model, train, queries)
        _, first, _ = measured(model, train, queries, cache_dir=folder)
        again, second, _ = measured(model, train, queries, cache_dir=folder)
    gap = (attribution.scores - again.scores).abs().max() / attribution.scores.abs().max()
    size = again.metadata["sequences"]["cache_bytes"]
    return {"without": without, "first": first, "second": second, "bytes": size, "gap": float(gap)}


# ---------------------------------------------------------------- in this process


def child(table, value=None):
    """What this script gives for one table, or one row of it, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--row", table, "--value", str(value or 0)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{table} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def print_cost(arguments):
    row, shape = child("cost"), arguments.shape
    tokens, query_tokens = (count * shape["length"] for count in (arguments.sequences, arguments.queries))
    print(
        f"\nCost, {arguments.sequences} sequences of {shape['length']} tokens, {arguments.queries} queries; "
        f"{row['num_features']} features, steered: {row['steered']}, operators {row['operator_shape']}"
    )
    print(f"{'':<44} {'us per token':>13} {'forward passes':>15}")
    plain, plain_query = row["forward"] / tokens, row["forward, queries"] / query_tokens
    # Scoring runs over queries and training sequences; operators on the queries only.
    scored = row["score"] / (tokens + query_tokens)
    effects = max(0.0, row["measure"] - row["score"]) / query_tokens
    lines = {
        "forward": (plain, 1.0),
        "fit: moments of training tokens": (row["fit"] / tokens, row["fit"] / tokens / plain),
        f"score for {arguments.queries} queries": (scored, scored / plain),
        "closed form in all": ((row["fit"] + row["score"]) / tokens, (row["fit"] + row["score"]) / tokens / plain),
        f"fit {arguments.subsets} operators": (row["operators"] / tokens, row["operators"] / tokens / plain),
        f"measure {arguments.subsets} operators on queries, recover": (effects, effects / plain_query),
    }
    for name, (seconds, ratio) in lines.items():
        print(f"{name:<44} {1e6 * seconds:13.2f} {ratio:15.2f}", flush=True)


def print_growth(table, symbol, values):
    print(f"\n{symbol:>8} {'seconds':>9} {'exponent':>9} {'MiB':>8} {'exponent':>9}", flush=True)
    before = None
    for value in values:
        row = child(table, value)
        slopes = {"seconds": "", "memory": ""}
        if before is not None:
            for name in slopes:
                grown = max(row[name], 1e-3) / max(before[1][name], 1e-3)
                slopes[name] = f"{math.log(grown) / math.log(value / before[0]):.2f}"
        parts = f"  fit {row['operators']:.2f} s, measure and recover {row['all']:.2f} s" if "operators" in row else ""
        line = f"{value:>8} {row['seconds']:9.2f} {slopes['seconds']:>9} {row['memory']:8.0f} {slopes['memory']:>9}"
        print(line + parts, flush=True)
        before = value, row


def print_processes(arguments):
    print(f"\nTwo processes, {arguments.sequences} sequences\n{'':<14} {'one, s':>8} {'two, s':>8} {'ratio':>6}  gap")
    for name, row in zip(("closed form", "operators"), child("processes"), strict=True):
        ratio = row["one"] / row["two"]
        print(f"{name:<14} {row['one']:8.2f} {row['two']:8.2f} {ratio:6.2f}  {row['gap']:.1e}", flush=True)


def print_cache(arguments):
    row = child("cache")
    tokens = arguments.sequences * arguments.shape["length"]
    print(f"\nActivations on disk, {row['bytes'] / 2**20:.0f} MiB, {row['bytes'] / tokens:.0f} bytes per token")
    for name in ("without", "first", "second"):
        print(f"{name:<8} {row[name]:7.2f} s {row['without'] / row[name]:6.2f} x", flush=True)
    print(f"scores apart by {row['gap']:.1e} of the largest")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=512, help="training sequences, but of the table of that name")
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--subsets", type=int, default=100, help="operators, but in the table of that name")
    parser.add_argument("--subset-counts", type=int, nargs="+", default=[100, 200, 500, 1000])
    parser.add_argument("--sequence-counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", choices=TABLES, help=argparse.SUPPRESS)
    parser.add_argument("--value", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    arguments.shape = {name: getattr(arguments, name) for name in TINY}
    if arguments.row is not None:
        print(json.dumps(globals()[arguments.row](arguments)))
        return
    print(f"{arguments.shape}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}", flush=True)
    if "cost" in arguments.tables:
        print_cost(arguments)
    if "subsets" in arguments.tables:
        print_growth("subsets", "K", arguments.subset_counts)
    if "sequences" in arguments.tables:
        print_growth("sequences", "n", arguments.sequence_counts)
    if "processes" in arguments.tables:
        print_processes(arguments)
    if "cache" in arguments.tables:
        print_cache(arguments)


if __name__ == "__main__":
    main()
