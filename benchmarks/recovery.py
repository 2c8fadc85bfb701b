"""Seconds, exactness and memory of the Lasso against celer and scikit-learn.

Protocol. A sparse design of K subsets and n examples; each query plants 40 examples with normal weights and adds
normal noise of 10 % or 100 % of its signal's standard deviation. For relative penalties .1 and .02 every solver
fits the same float32-representable measurements with an unpenalised intercept. Each solver of each setting runs in
its own child process, limited to the same number of threads, in turn within a setting so that other load on the
machine meets all alike: it builds the problem, fits one query unmeasured (compilation, imports), then fits all
queries. celer and scikit-learn fit one query at a time on the same sparse columns in float64, which is what they
offer. Seconds are wall-clock for all queries. Gaps are recomputed here for all solvers alike, in float64 over all
n examples: duality gap over 1/2 ||y_c||^2, the dual point being the residual scaled to be feasible. The peers'
`tol` is the loosest of a descending list with which the first four queries reach the requested gap, found unmeasured:
their stopping rules count the gap differently. Recall is the share of planted examples with a non-zero score. Memory
is how far the child's peak resident size rises during the fits, the dense scores (q, n) of ours included; the peers'
scores are kept sparse, which favours them.

Run `python benchmarks/recovery.py`; `--num-queries 4 --num-train 5000` for a quick look.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from common.memory import start_meter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stride_lightning.steering.lasso import solve_lasso
from stride_lightning.steering.subsets import Design, sample_design

PLANTED = 40
SETTINGS = [(noise, penalty) for noise in (0.1, 1.0) for penalty in (0.1, 0.02)]
SOLVERS = ("ours", "celer", "sklearn")
TOLERANCES = (1e-4, 5e-5, 2e-5, 1e-5, 5e-6, 2e-6, 1e-6)


def planted_problem(
    options: argparse.Namespace, noise: float
) -> tuple[Design, scipy.sparse.csc_matrix, np.ndarray, np.ndarray]:
    """Design, its columns ``(K, n)``, measurements ``(q, K)`` and planted examples ``(q, 40)``."""
    design = sample_design(options.num_train, options.num_subsets, options.degree, seed=0)
    if design.indices is None:
        raise SystemExit("This benchmark needs a sparse design: lower --degree or raise --num-subsets.")
    rows = np.sort(design.indices.numpy(), axis=1).ravel()
    starts = np.arange(options.num_train + 1, dtype=np.int32) * options.degree
    shape = (options.num_subsets, options.num_train)
    columns = scipy.sparse.csc_matrix((np.ones(len(rows)), rows, starts), shape=shape)
    rng = np.random.default_rng(0)
    support = np.stack([rng.choice(options.num_train, PLANTED, replace=False) for _ in range(options.num_queries)])
    signal = np.stack([columns[:, chosen] @ rng.standard_normal(PLANTED) for chosen in support])
    measurements = signal + noise * signal.std(1, keepdims=True) * rng.standard_normal(signal.shape)
    return design, columns, measurements.astype(np.float32).astype(np.float64), support


def relative_gap(columns: scipy.sparse.csc_matrix, measured: np.ndarray, weights: np.ndarray, penalty: float) -> float:
    """Duality gap of one query in float64, relative to ``1/2 ||y_c||^2``."""
    target = measured - measured.mean()
    largest = np.abs(columns.T @ target).max()
    residual = target - columns @ weights
    residual -= residual.mean()
    dual = residual * min(1.0, penalty * largest / np.abs(columns.T @ residual).max())
    primal = residual @ residual / 2 + penalty * largest * np.abs(weights).sum()
    return (primal - target @ dual + dual @ dual / 2) / (target @ target / 2)


def peer_fit(
    solver: str, columns: scipy.sparse.csc_matrix, penalty: float, tolerance: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit of one query by celer or scikit-learn: measurements ``(K,)`` to weights ``(n,)``."""
    if solver == "celer":
        from celer import Lasso
    else:
        from sklearn.linear_model import Lasso

    def fit(measured: np.ndarray) -> np.ndarray:
        alpha = penalty * np.abs(columns.T @ (measured - measured.mean())).max() / len(measured)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence: gaps are recomputed below
            return Lasso(alpha=alpha, tol=tolerance, max_iter=100_000).fit(columns, measured).coef_

    return fit


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run one solver on one setting: the child process."""
    torch.set_num_threads(options.threads)
    penalty = options.penalty
    design, columns, measurements, support = planted_problem(options, options.noise)
    if options.child == "ours":
        values = torch.from_numpy(measurements).float()
        solve_lasso(values[:1], design, penalty, tolerance=options.gap)
        peak_memory, started = start_meter(), time.perf_counter()
        scores = solve_lasso(values, design, penalty, tolerance=options.gap).scores
        seconds, memory = time.perf_counter() - started, peak_memory() / 2**20
        weights = [scipy.sparse.csr_matrix(row) for row in scores.double().numpy()]
    else:
        fit = peer_fit(options.child, columns, penalty, TOLERANCES[0])
        for tolerance in TOLERANCES:
            fit = peer_fit(options.child, columns, penalty, tolerance)
            if max(relative_gap(columns, row, fit(row), penalty) for row in measurements[:4]) <= options.gap:
                break
        peak_memory, started = start_meter(), time.perf_counter()
        weights = [scipy.sparse.csr_matrix(fit(row)) for row in measurements]
        seconds, memory = time.perf_counter() - started, peak_memory() / 2**20
    dense = [row.toarray()[0] for row in weights]
    gaps = [relative_gap(columns, row, solution, penalty) for row, solution in zip(measurements, dense, strict=True)]
    recall = [np.mean(solution[chosen] != 0) for solution, chosen in zip(dense, support, strict=True)]
    non_zeros = float(np.mean([np.count_nonzero(solution) for solution in dense]))
    return {
        "seconds": seconds,
        "gap": max(gaps),
        "non_zeros": non_zeros,
        "recall": float(np.mean(recall)),
        "memory": memory,
    }


def in_child(options: argparse.Namespace, solver: str, noise: float, penalty: float) -> dict[str, float]:
    """Measure one solver on one setting in a process of its own."""
    passed = ("num_train", "num_subsets", "degree", "num_queries", "threads", "gap")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in passed]
    arguments += [f"--child={solver}", f"--noise={noise}", f"--penalty={penalty}"]
    threads = {f"{library}_NUM_THREADS": str(options.threads) for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env={**os.environ, **threads}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print one table of all settings and solvers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-train", type=int, default=100_000)
    parser.add_argument("--num-subsets", type=int, default=1000)
    parser.add_argument("--degree", type=int, default=10)
    parser.add_argument("--num-queries", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gap", type=float, default=1e-4, help="relative duality gap asked of every solver")
    parser.add_argument("--child", choices=SOLVERS, help=argparse.SUPPRESS)
    parser.add_argument("--noise", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--penalty", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    solvers = [name for name in SOLVERS if name != "celer" or importlib.util.find_spec("celer")]
    if "celer" not in solvers:
        print("celer is not installed (pip install celer): going on without it.")
    shape = f"K={options.num_subsets} n={options.num_train} d={options.degree} q={options.num_queries}"
    print(
        f"{shape}, gap <= {options.gap:g}, {options.threads} threads. ratio: seconds over ours; memory: peak rise, MiB"
    )
    print(
        f"memory of ours by formula: 4 q n = {4 * options.num_queries * options.num_train / 2**20:.0f} MiB of scores,"
    )
    print("  and for each thread 12 b n + 16 b p d, about 128 MiB at most, for b <= 64 queries and working sets of p")
    print("noise penalty   solver  seconds  ratio      gap non-zeros recall memory")
    total = dict.fromkeys(solvers, 0.0)
    for noise, penalty in SETTINGS:
        ours = 0.0
        for solver in solvers:
            row = in_child(options, solver, noise, penalty)
            ours = row["seconds"] if solver == "ours" else ours
            total[solver] += row["seconds"]
            exact = f"{row['gap']:8.1e} {row['non_zeros']:9.1f} {row['recall']:6.2f} {row['memory']:6.0f}"
            print(
                f"{noise:5g} {penalty:7g} {solver:>8} {row['seconds']:8.2f} {row['seconds'] / ours:6.1f} {exact}",
                flush=True,
            )
    for solver, seconds in total.items():
        print(f"{'total':>13} {solver:>8} {seconds:8.2f} {seconds / total['ours']:6.1f}")


if __name__ == "__main__":
    main()
