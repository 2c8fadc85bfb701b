"""STRIDE against retrained models: linear datamodeling score, seconds and memory of every basis and recovery.

Protocol. A truth file (``.npz``, see ``common/truth.py``) holds a data set, a network trained on all of it, random half
subsets and the losses of the queries under models retrained on them. The network is rebuilt, the method is fitted and
asked with the options of the row and defaults for the rest, and the scores are compared with the losses. The last row
is ``effect()``: the readout refit without the complement of each half, whose losses are compared directly. Every row is
a process of its own, so that its peak memory (resident set above what was there at entry) is its own.

    python benchmarks/stride_lds.py --truth digits.npz
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
from stride_lightning.metrics.correlation import centred_ranks

ROWS = [
    {"recovery": "closed-form"},
    {"recovery": "prior"},  # the default: 16 subsets
    {"recovery": "prior", "num_subsets": 64},
    {"recovery": "prior", "num_subsets": 200},
    {"recovery": "lasso"},
    {"recovery": "ridge"},
    # The published form: the last hidden layer, few memberships.
    {"basis": "learned", "recovery": "lasso", "layers": ["2"], "degree": 20},
    {"basis": "learned", "recovery": "prior", "layers": ["2"], "degree": 20},
    {"effect": True},
]


def run_row(arguments, options):
    """One configuration, in this process; prints one line of JSON."""
    torch.set_num_threads(arguments.threads)
    (model, train, queries), (masks, losses) = load(arguments.truth), load_retrained(arguments.truth)
    is_effect = options.pop("effect", False)
    peak_memory, started = start_meter(), time.perf_counter()
    attributor = StrideAttributor(seed=arguments.seed, show_progress=False, **options)
    attributor.fit(model, train, Classification())
    fitted = time.perf_counter()
    if is_effect:
        effects = attributor.effect(queries, ~masks.bool())
        lds = mean_rank_correlation(effects, losses.T)
    else:
        scores = attributor.attribute(queries).scores
        lds = float(linear_datamodeling_score(scores, masks, losses))
    ended, memory = time.perf_counter(), peak_memory() / 2**20
    print(json.dumps({"lds": lds, "fit": fitted - started, "attribute": ended - fitted, "memory": memory}))


def mean_rank_correlation(predicted, actual):
    """Mean over queries (rows) of Spearman's correlation."""
    first, second = centred_ranks(predicted.double()), centred_ranks(actual.double())
    return float(((first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1)).clamp(min=1e-12)).mean())


def child(arguments, options):
    command = [sys.executable, __file__, "--truth", arguments.truth, "--threads", str(arguments.threads)]
    command += ["--seed", str(arguments.seed), "--row", json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def name_of(options):
    if "effect" in options:
        return "effect() of each half"
    return ", ".join(f"{key}={value}" for key, value in options.items()).replace("recovery=", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", required=True, help="the .npz with data, model and retrained losses")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        run_row(arguments, arguments.row)
        return
    print(f"{'configuration':<52} {'LDS':>6} {'fit s':>7} {'ask s':>7} {'MiB':>6}")
    for options in ROWS:
        row = child(arguments, options)
        print(
            f"{name_of(options):<52} {row['lds']:6.3f} {row['fit']:7.2f} {row['attribute']:7.2f} {row['memory']:6.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
