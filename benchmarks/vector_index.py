"""What an index of a million training examples costs: memory while it is built, time, disk, and time of a query.

Protocol. Vectors come from a stream that never holds them all: clusters with noise, random signs and spread-out norms,
drawn block by block from a seed. The index is built in a process of its own, which prints its resident memory every
100,000 rows; with ``--kill-at 0.5`` that process is killed when half of the rows have been streamed, and started again.
The index is then compared with the stream: every position once, and the ten best of 50 queries against a search through
the stream itself. Then, in a fresh process for an index on disk and one in memory each: the search for all queries
together, one query at a time, and with a filter that 1 % and 50 % of the rows pass. Times are of the wall clock, with
the files in the page cache after the first pass, which is not counted.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from stride_lightning.information.index.in_memory import MemoryIndex
from stride_lightning.information.index.on_disk import InformationIndex

BLOCK, PRINTED = 10_000, 100_000
IDENTITY = {"weights": "benchmark", "projection": "none"}
COLUMNS = {"cluster": int, "path": str}


def memory():
    """Resident memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def centres(rows, dim):
    rng = np.random.default_rng(0)
    count = max(rows // 1000, 10)
    return rng.standard_normal((count, dim), np.float32) * np.exp(rng.normal(0, 0.3, (count, 1))).astype(np.float32)


def block(start, stop, middles):
    rng = np.random.default_rng([1, start])
    which = rng.integers(0, len(middles), stop - start)
    noise = rng.standard_normal((stop - start, middles.shape[1]), np.float32)
    vectors = middles[which] + 0.7 * noise
    vectors *= rng.choice(np.array([-1, 1], np.float32), (stop - start, 1)) / np.sqrt(middles.shape[1])
    return np.arange(start, stop), vectors, {"cluster": which, "path": [f"train/{i}.png" for i in range(start, stop)]}


def stream(rows, dim):
    middles = centres(rows, dim)
    for start in range(0, rows, BLOCK):
        yield block(start, min(start + BLOCK, rows), middles)


def make_queries(count, rows, dim):
    rng = np.random.default_rng(2)
    middles = centres(rows, dim)
    return middles[rng.integers(0, len(middles), count)] + 0.7 * rng.standard_normal((count, dim), np.float32)


def build(args):
    index = InformationIndex.create(args.path, args.dim, identity=IDENTITY, columns=COLUMNS, exist_ok=True)
    print(f"  {len(index):>9,} rows in the index at the start, {memory():6.0f} MB resident", flush=True)
    started = time.perf_counter()

    def watched():
        for number, batch in enumerate(stream(args.rows, args.dim)):
            if (streamed := number * BLOCK) % PRINTED == 0 and streamed:
                print(
                    f"  {streamed:>9,} streamed, {memory():6.0f} MB, {time.perf_counter() - started:5.1f} s", flush=True
                )
            yield batch

    added = index.build(watched(), args.rows, show_progress=False)
    print(f"  {added:>9,} rows added, {memory():6.0f} MB, {time.perf_counter() - started:5.1f} s", flush=True)


def run_build(args, kill_at=None):
    command = [sys.executable, __file__, "--stage", "build", "--path", args.path]
    command += ["--rows", str(args.rows), "--dim", str(args.dim)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            words = line.split()
            if kill_at is not None and words[1].startswith("streamed") and int(words[0].replace(",", "")) >= kill_at:
                process.send_signal(signal.SIGKILL)
                print("  killed", flush=True)
                return
    if process.returncode:
        raise SystemExit("building failed")


def check(args):
    """Every position once, and the same answers as a search through the stream."""
    index = InformationIndex.open(args.path, IDENTITY)
    lost, doubled = len(index.missing(args.rows)), len(index) - args.rows
    queries = make_queries(50, args.rows, args.dim)
    dots = np.concatenate([np.abs(queries @ vectors.T) for _, vectors, _ in stream(args.rows, args.dim)], axis=1)
    best = np.argsort(-dots, axis=1, kind="stable")[:, :10]
    same = (index.search(queries, 10).positions.numpy() == best).mean()
    print(
        f"against the stream: {lost} rows lost, {doubled} too many, {same:.1%} of the ten best of 50 queries the same"
    )


def one_at_a_time(search, queries):
    times, hits = [], []
    for query in queries:
        started = time.perf_counter()
        hits.append(search(query[None]).positions[0].tolist())
        times.append((time.perf_counter() - started) * 1e3)
    p50, p99 = np.percentile(times, [50, 99])
    return hits, f"p50 {p50:7.1f} ms, p99 {p99:7.1f} ms"


def together(search, queries):
    started = time.perf_counter()
    hits = search(queries).positions.tolist()
    seconds = time.perf_counter() - started
    return hits, f"{seconds:.1f} s, {seconds / len(queries) * 1e3:.1f} ms each"


def query(args):
    if args.stage == "memory":
        index = MemoryIndex(args.dim, IDENTITY, COLUMNS)
        index.build(stream(args.rows, args.dim), args.rows, show_progress=False)
    else:
        index = InformationIndex.open(args.path, IDENTITY)
    queries = make_queries(args.queries, args.rows, args.dim)
    index.search(queries[:1])
    print(f"{type(index).__name__}: resident {memory():.0f} MB", flush=True)
    hits, text = together(index.search, queries)
    print(f"  {len(queries)} queries together: {text}; resident {memory():.0f} MB", flush=True)
    some = queries[: args.single_queries]
    again, text = one_at_a_time(index.search, some)
    print(f"  {len(some)} queries one at a time: {text}; same hits: {again == hits[: len(some)]}", flush=True)
    num_clusters = len(centres(args.rows, args.dim))
    for share in (0.01, 0.5):

        def filtered(queries, limit=int(share * num_clusters)):
            return index.search(queries, where=lambda columns: columns["cluster"] < limit)

        _, text = one_at_a_time(filtered, some)
        print(f"  with a filter that {share:.0%} of the rows pass, one at a time: {text}", flush=True)
        _, text = together(filtered, queries)
        print(f"    together: {text}; resident {memory():.0f} MB", flush=True)


def size(path):
    files = [file.stat().st_size for file in Path(path).rglob("*") if file.is_file()]
    return f"{sum(files) / 1e6:,.0f} MB in {len(files)} files"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--single-queries", type=int, default=100, help="of these, searched one at a time")
    parser.add_argument("--kill-at", type=float, help="share of the rows after which the build is killed once")
    parser.add_argument("--path", help="folder of the index; a temporary one by default")
    parser.add_argument("--stage", choices=["build", "check", "query", "memory", "all"], default="all")
    args = parser.parse_args()
    if args.stage != "all":
        {"build": build, "check": check, "query": query, "memory": query}[args.stage](args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.path = args.path or str(Path(folder) / "index")
        print(f"{args.rows:,} vectors of {args.dim} dimensions, {os.cpu_count()} cores", flush=True)
        if args.kill_at is not None:
            run_build(args, args.kill_at * args.rows)
        run_build(args)
        print(f"on disk: {size(args.path)}", flush=True)
        for stage in ("check", "query", "memory"):
            options = ["--queries", args.queries, "--single-queries", args.single_queries]
            command = [
                __file__,
                "--stage",
                stage,
                "--path",
                args.path,
                "--rows",
                args.rows,
                "--dim",
                args.dim,
                *options,
            ]
            subprocess.run([sys.executable, *map(str, command)], check=True)


if __name__ == "__main__":
    main()
