"""STRIDE against retrained models: linear datamodeling score, seconds and memory of every basis and recovery.

Protocol. A truth file (``.npz``, see ``common/truth.py``) holds a data set, an MLP trained on all of it, random half
subsets and the losses of the queries under models retrained on them. The MLP is rebuilt, ``attribute()`` is called with
its defaults, and the scores are compared with the losses. Every row is a process of its own, so that its peak memory
(resident set above what was there at entry) is its own.

    python benchmarks/stride_lds.py --truth digits.npz --num-subsets 200

``--ridges`` adds the automatic ridge against a grid of given ones; ``--adam`` compares the solver with 200 batched
Adam steps on the same objective.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from common.memory import start_meter
from common.truth import load, load_retrained

from stride_lightning import Classification, StrideAttributor, linear_datamodeling_score
from stride_lightning.steering.basis import Observation
from stride_lightning.steering.solvers import fit_operators, refit
from stride_lightning.steering.subsets import Design, sample_design

ROWS = [
    {"basis": "statistics", "recovery": "prior"},
    {"basis": "statistics", "recovery": "lasso"},
    {"basis": "statistics", "recovery": "ridge"},
    {"basis": "statistics", "recovery": "prior", "stability": 1.0},
    {"basis": "statistics", "recovery": "lasso", "stability": 0.0},
    # The published form: the last hidden layer, few memberships.
    {"basis": "learned", "recovery": "lasso", "layers": ["2"], "degree": 20},
    {"basis": "learned", "recovery": "prior", "layers": ["2"], "degree": 20},
]
RIDGES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def run_row(arguments, options):
    """One configuration, in this process; prints one line of JSON."""
    torch.set_num_threads(arguments.threads)
    (model, train, queries), (masks, losses) = load(arguments.truth), load_retrained(arguments.truth)
    peak_memory, started = start_meter(), time.perf_counter()
    attributor = StrideAttributor(
        num_subsets=arguments.num_subsets, seed=arguments.seed, show_progress=False, batch_size=1024, **options
    ).fit(model, train, Classification())
    attribution = attributor.attribute(queries)
    seconds, memory = time.perf_counter() - started, peak_memory() / 2**20
    known = attribution.metadata
    print(
        json.dumps(
            {
                "lds": float(linear_datamodeling_score(attribution.scores, masks, losses)),
                "fit": known["seconds"]["fit"],
                "measure": known["attribute_seconds"]["measure"],
                "recover": known["attribute_seconds"]["recover"],
                "total": seconds,
                "gradient": known["operators"].get("relative_gradient_max"),
                "memory": memory,
                "ridge": known["operators"]["ridge_relative"],
            }
        )
    )


def child(arguments, options):
    command = [sys.executable, __file__, "--truth", arguments.truth, "--num-subsets", str(arguments.num_subsets)]
    command += ["--threads", str(arguments.threads), "--seed", str(arguments.seed), "--row", json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare_rows(arguments):
    print(
        f"{'configuration':<44} {'LDS':>6} {'fit s':>7} {'meas. s':>7} {'rec. s':>7} {'total':>7} {'|g|':>8} {'MiB':>6}"
    )
    for options in ROWS:
        row = child(arguments, options)
        name = (
            ", ".join(f"{key}={value}" for key, value in options.items()).replace("basis=", "").replace("recovery=", "")
        )
        gradient = f"{row['gradient']:.1e}" if row["gradient"] is not None else "-"
        print(
            f"{name:<44} {row['lds']:6.3f} {row['fit']:7.2f} {row['measure']:7.3f} {row['recover']:7.2f} "
            f"{row['total']:7.2f} {gradient:>8} {row['memory']:6.0f}",
            flush=True,
        )


def compare_ridges(arguments):
    automatic = child(arguments, {})
    print(f"automatic ridge {automatic['ridge']:.2f} x mean curvature: LDS {automatic['lds']:.3f}")
    grid = {factor: child(arguments, {"ridge": factor})["lds"] for factor in RIDGES}
    print("  ".join(f"{factor:g}: {lds:.3f}" for factor, lds in grid.items()))
    print(f"best on the grid {max(grid.values()):.3f}, automatic is {max(grid.values()) - automatic['lds']:+.3f} below")


def compare_adam(arguments):
    """Our solver against autograd and Adam on the same convex objective, all operators batched in both."""
    torch.set_num_threads(arguments.threads)
    model, train, _ = load(arguments.truth)
    task = Classification()
    attributor = StrideAttributor(num_subsets=arguments.num_subsets, show_progress=False).fit(model, train, task)
    observed, design = attributor.fitted.train_pass, sample_design(len(train), arguments.num_subsets)
    ridge, started = attributor.module.chosen["ridge"], time.perf_counter()
    full = attributor.module.chosen["operator_ridge"]
    start = refit(observed, task, torch.tensor([full]))[..., 0]
    ours = fit_operators(observed, design, task, ridge, start=start, show_progress=False)
    seconds = time.perf_counter() - started
    best = fit_operators(
        observed,
        design,
        task,
        ridge,
        start=ours.coefficients.mean(2),
        tolerance=1e-5,
        max_iterations=5000,
        show_progress=False,
    )
    optimum = objective(best.coefficients, observed, design, task, ridge)
    gap = (objective(ours.coefficients, observed, design, task, ridge) - optimum) / optimum
    print(
        f"ours: {seconds:.2f} s, {ours.iterations} iterations, relative gap max {gap.max():.1e} mean {gap.mean():.1e}"
    )
    for learning_rate in (0.01, 0.03, 0.1, 0.3):
        took, coefficients = adam(observed, design, task, ridge, learning_rate)
        gap = (objective(coefficients, observed, design, task, ridge) - optimum) / optimum
        print(
            f"Adam, lr {learning_rate:<4}: {took:.2f} s for 200 steps, relative gap max {gap.max():.1e} "
            f"mean {gap.mean():.1e}; ours is {took / seconds:.1f} times faster",
            flush=True,
        )


def objective(coefficients, observed: Observation, design: Design, task, ridge):
    """Value of every operator's objective, shape (K,)."""
    members = design.dense()
    penalty = ridge * design.num_train / design.sizes / 2 * coefficients.square().sum((0, 1))
    loss = task.loss(observed.features @ coefficients, observed.encoded.T[:, :, None], dim=0)  # (n, K)
    return (members.T * loss).sum(0) / design.sizes + penalty


def adam(observed, design, task, ridge, learning_rate, steps=200):
    shape = (observed.outputs.shape[1], observed.features.shape[1], design.num_subsets)
    coefficients = torch.zeros(shape, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=learning_rate)
    started = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        objective(coefficients, observed, design, task, ridge).sum().backward()
        optimizer.step()
    return time.perf_counter() - started, coefficients.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", required=True, help="the .npz with data, model and retrained losses")
    parser.add_argument("--num-subsets", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ridges", action="store_true", help="also compare the automatic ridge with a grid")
    parser.add_argument("--adam", action="store_true", help="also compare the solver with Adam")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        run_row(arguments, arguments.row)
        return
    compare_rows(arguments)
    if arguments.ridges:
        compare_ridges(arguments)
    if arguments.adam:
        compare_adam(arguments)


if __name__ == "__main__":
    main()
