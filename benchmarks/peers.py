"""The gradient methods side by side with the packages that others made: same model, data and checkpoints.

Protocol. A truth file (``common/truth.py``): an MLP with one hidden layer, its data, and the losses of retrained
models for the linear datamodeling score (LDS). Every row is a process of its own. ``cold`` is the first call with all
imports that it needs (torch is there already), ``warm`` the median of three further calls. Memory is the peak of the
resident set above what was there at entry, in another process, where a call on a few examples has imported everything.
All scores are (queries, training
examples), positive = helpful, which is the sign of all these packages when query and training gradients are of the same
loss (TRAK: of the same margin). Agreement is the Pearson correlation of two score matrices: per query (mean and worst
query) and over all entries. ``exact`` is the definition in float64, straight from the formulas.

    python benchmarks/peers.py --truth digits.npz

What is compared:

- ``grad-dot``: inner products of loss gradients. Captum's TracInCP with one checkpoint of learning rate 1,
  kronfluence's "identity", dattri-llm's TracIn.
- ``tracin``: the same summed over checkpoints with their learning rates, read from plain Lightning checkpoint files.
- ``trak``: one model, equal projection dimension and equal damping. The random projections differ, so neither package
  can agree with the other better than it does with ``exact``, the kernel without a projection.
- ``ekfac``: equal damping, ``--damping`` times the mean eigenvalue of all layers together, which kronfluence is given
  as a number (its own rule is 0.1 times the mean of each layer). Kronfluence draws one label per example where we take
  the expectation over the model's predictive distribution. ``kronfluence xR`` fits its factors to the training set
  repeated R times, which leaves less noise; ``kronfluence E[y]`` to every example with every label, weighted by its
  probability, which leaves none. Only the row as it comes counts for time.

Every peer has the batch size at which it was fastest on digits (of 64, 256 and 1000), unless ``--batch-size`` is given.

Packages: ``pip install -e ".[bench]"`` brings captum and traker. The others ask for packages that they do not import
here (kronfluence for torchvision), so they come without what they ask for:

    pip install --no-deps kronfluence dattri-llm
    pip install accelerate einops einconv opt-einsum

Whatever is not installed is named and left out.
"""

import argparse
import copy
import importlib.metadata
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common.memory import start_meter
from common.truth import load, load_retrained
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

REPEATS = 3
TIMES = ("cold", "warm")
BATCH_SIZES = {"captum": 1000, "kronfluence": 1000, "kronfluence xR": 1000, "kronfluence E[y]": 1000, "traker": 1000}
LEARNING_RATES = (0.02, 0.02, 0.01, 0.005, 0.002)  # one checkpoint after the epochs at each
INSTALL = {
    "captum": "pip install captum",
    "traker": "pip install traker",
    "kronfluence": "pip install --no-deps kronfluence && pip install accelerate einops einconv opt-einsum",
    "dattri-llm": "pip install --no-deps dattri-llm",
}


# ---------------------------------------------------------------- checkpoints


def write_checkpoints(model, train, folder, epochs):
    """Train from scratch with a plain loop and write one checkpoint, as Lightning does, per learning rate."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    for layer in (model[0], model[2]):
        layer.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATES[0], momentum=0.9, weight_decay=1e-2)
    x, y = train.tensors
    step = 0
    for number, learning_rate in enumerate(LEARNING_RATES):
        optimizer.param_groups[0]["lr"] = learning_rate
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(100):
                optimizer.zero_grad()
                cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                step += 1
        checkpoint = {
            "epoch": (number + 1) * epochs - 1,
            "global_step": step,
            "pytorch-lightning_version": "2.6.1",
            "state_dict": model.state_dict(),
            "optimizer_states": [{"state": {}, "param_groups": [{"lr": learning_rate, "params": [0, 1, 2, 3]}]}],
        }
        torch.save(checkpoint, folder / f"epoch={checkpoint['epoch']:02d}-step={step}.ckpt")


def read_checkpoints(folder):
    """Weights and learning rate of every checkpoint, in order of training."""
    checkpoints = [torch.load(path, weights_only=True) for path in folder.glob("*.ckpt")]
    checkpoints.sort(key=lambda checkpoint: checkpoint["global_step"])
    return [(c["state_dict"], c["optimizer_states"][0]["param_groups"][0]["lr"]) for c in checkpoints]


# ---------------------------------------------------------------- stride-lightning


def ours(method, model, train, queries, arguments):
    from stride_lightning import attribute

    options = {
        "grad-dot": {},
        "tracin": {"record": arguments.checkpoints},
        "trak": {"projection_dim": arguments.projection_dim, "damping": arguments.trak_damping},
        "ekfac": {"damping": arguments.damping},
    }[method]
    options |= {"batch_size": arguments.batch_size, "show_progress": False}
    return attribute(model, queries, train_data=train, method=method, **options).scores


# ---------------------------------------------------------------- captum


def captum(method, model, train, queries, arguments):
    """TracInCP; per-example gradients one by one (``sample_wise_grads_per_batch=False``) are many times slower."""
    from captum.influence import TracInCP

    model = copy.deepcopy(model)
    checkpoints = [(model.state_dict(), 1.0)] if method == "grad-dot" else read_checkpoints(arguments.checkpoints)

    def restore(module, checkpoint):
        state, learning_rate = checkpoint
        module.load_state_dict(state)
        return learning_rate

    tracin = TracInCP(
        model,
        train,
        checkpoints,
        checkpoints_load_func=restore,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=arguments.batch_size,
        sample_wise_grads_per_batch=True,
    )
    return tracin.influence(queries.tensors)


# ---------------------------------------------------------------- kronfluence


def kronfluence(method, model, train, queries, arguments, repeats=1, every_label=False):
    """Query loss against training loss: its score <g_q, (H + damping)^-1 g_i> has our sign.

    A layer's gradient holds the bias as a last column; the covariances are means over examples; the curvature is the
    mean of squared rotated per-example gradients of sampled labels; nothing is divided by the number of examples after.
    With ``every_label`` a gradient times the root of its label's probability stands for the sample. The mean is then
    over labels too, so that scores are larger by the number of classes.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classify(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits, labels = model(batch[0]), batch[1]
            if sample and every_label:
                weights = logits.detach().softmax(-1).gather(1, labels[:, None])[:, 0].sqrt()
                return weights @ cross_entropy(logits, labels, reduction="none")
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    task = Classify()
    model = prepare_model(copy.deepcopy(model), task)
    strategy = "identity" if method == "grad-dot" else "ekfac"
    factors = FactorArguments(strategy=strategy, covariance_max_examples=None, lambda_max_examples=None)
    x, y = train.tensors
    classes = range(model[2].out_features)
    labels = [torch.full_like(y, label) for label in classes] if every_label else [y] * repeats
    damping = arguments.absolute_damping / (len(classes) if every_label else 1)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("peers", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors(
            "factors",
            ConcatDataset([TensorDataset(x, y) for y in labels]),
            per_device_batch_size=arguments.batch_size,
            factor_args=factors,
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            queries,
            train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=arguments.batch_size,
            score_args=ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]


def kronfluence_repeated(method, model, train, queries, arguments):
    return kronfluence(method, model, train, queries, arguments, repeats=arguments.repeats)


def kronfluence_every_label(method, model, train, queries, arguments):
    return kronfluence(method, model, train, queries, arguments, every_label=True)


# ---------------------------------------------------------------- dattri-llm


class Named(Dataset):
    """Examples as dictionaries, which dattri-llm asks for."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return {"x": x, "y": y}


def dattri_llm(method, model, train, queries, arguments):
    """One row per checkpoint and training example, without learning rates: they are put in here."""
    from dattri_llm.attribution import AttributionArguments, TracInAttributor
    from dattri_llm.task import AttributionTask

    model = copy.deepcopy(model)
    checkpoints = [(None, 1.0)] if method == "grad-dot" else read_checkpoints(arguments.checkpoints)

    def loss(model, batch):
        return cross_entropy(model(batch["x"]), batch["y"], reduction="sum")

    with tempfile.TemporaryDirectory() as folder:
        options = AttributionArguments(
            output_dir=folder,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=len(queries),
            max_grad_norm=None,
            use_cpu=True,
        )
        task = AttributionTask(loss, model, checkpoints=[state for state, _ in checkpoints])
        score = TracInAttributor(options, task=task).attribute(Named(train), Named(queries))
    rates = torch.tensor([learning_rate for _, learning_rate in checkpoints])
    assert score.row_steps == [step for step in range(len(rates)) for _ in range(len(train))]
    return torch.einsum("k,knq->qn", rates, score.scores.reshape(len(rates), len(train), len(queries)))


# ---------------------------------------------------------------- traker


def traker(method, model, train, queries, arguments):
    """Gradients of the margin log p / (1 - p), weighted by 1 - p of the training example; positive is helpful.

    It divides projections, of variance one per entry, by the root of the number of parameters, and its damping is
    absolute: the mean eigenvalue of its kernel is the summed squared norm of the gradients per parameter.
    """
    from trak import TRAKer

    model = copy.deepcopy(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    damping = arguments.trak_damping * arguments.margin_norm / num_parameters
    state = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        trak = TRAKer(
            model,
            "image_classification",
            train_set_size=len(train),
            save_dir=folder,
            device="cpu",
            proj_dim=arguments.projection_dim,
            use_half_precision=False,
            lambda_reg=damping,
            logging_level=logging.WARNING,
        )
        trak.load_checkpoint(state, model_id=0)
        for batch in DataLoader(train, batch_size=arguments.batch_size):
            trak.featurize(batch, num_samples=len(batch[0]))
        trak.finalize_features()
        trak.start_scoring_checkpoint("queries", state, model_id=0, num_targets=len(queries))
        for batch in DataLoader(queries, batch_size=arguments.batch_size):
            trak.score(batch, num_samples=len(batch[0]))
        return torch.from_numpy(np.array(trak.finalize_scores("queries"))).T


# ---------------------------------------------------------------- the definitions, in float64


def exact(method, model, train, queries, arguments):
    model = copy.deepcopy(model).double()
    if method == "grad-dot":
        return gram(factors(model, queries, loss_gradient), factors(model, train, loss_gradient))
    if method == "tracin":
        total = 0
        for state, learning_rate in read_checkpoints(arguments.checkpoints):
            model.load_state_dict(state)
            total += learning_rate * exact("grad-dot", model, train, queries, arguments)
        return total
    if method == "trak":
        of_train, of_queries = factors(model, train, margin_gradient), factors(model, queries, margin_gradient)
        kernel = gram(of_train, of_train)
        # The kernel of k projections has k eigenvalues whose sum is, on average, the trace of this one.
        kernel.diagonal().add_(arguments.trak_damping * kernel.trace() / arguments.projection_dim)
        x, y = train.tensors
        p = model(x.double()).softmax(-1).gather(1, y[:, None])[:, 0].detach()
        return torch.linalg.solve(kernel, gram(of_train, of_queries)).T * (1 - p)
    return exact_ekfac(model, train, queries, arguments.damping)


def exact_ekfac(model, train, queries, damping):
    """Sum over layers of <g_q, U ((U' g_i V) / (curvature + damping)) V'>, damping relative to the mean of all."""
    of_train, of_queries = factors(model, train, loss_gradient), factors(model, queries, loss_gradient)
    blocks = kronecker_blocks(model, train)
    damping = damping * mean_eigenvalue(blocks)
    scores = 0
    for (u, v, curvature), of_layer, query_of_layer in zip(blocks, of_train, of_queries, strict=True):
        (a, d), (query_a, query_d) = ((a @ v, d @ u) for a, d in (of_layer, query_of_layer))
        solved = torch.einsum("qo,qi->qoi", query_d, query_a) / (curvature + damping)
        parts = [torch.einsum("qoi,no,ni->qn", solved, d[rows], a[rows]) for rows in torch.arange(len(a)).split(500)]
        scores += torch.cat(parts, 1)
    return scores


def kronecker_blocks(model, train):
    """Per layer U and V, eigenvectors of the covariances of output gradients and inputs, and the curvature in their
    basis, shape (out, in + 1); labels in expectation over the model's own predictions."""
    x, _ = train.tensors
    probabilities = model(x.double()).softmax(-1).detach()
    classes = range(probabilities.shape[1])
    by_class = [factors(model, TensorDataset(x, torch.full((len(x),), c)), loss_gradient) for c in classes]
    blocks = []
    for layer, (inputs, _) in enumerate(by_class[0]):
        drawn = [of_class[layer][1] for of_class in by_class]
        covariance = sum((d.T * probabilities[:, c]) @ d for c, d in enumerate(drawn)) / len(x)
        u, v = torch.linalg.eigh(covariance)[1], torch.linalg.eigh(inputs.T @ inputs / len(x))[1]
        squares = sum(probabilities[:, c, None] * (d @ u).square() for c, d in enumerate(drawn))
        blocks.append((u, v, squares.T @ (inputs @ v).square() / len(x)))
    return blocks


def mean_eigenvalue(blocks):
    return torch.cat([curvature.flatten() for _, _, curvature in blocks]).mean()


def factors(model, data, output_gradient):
    """Per layer the inputs (n, in + 1), a one for the bias at the end, and the gradients of its outputs (n, out)."""
    x, y = data.tensors
    with torch.no_grad():
        inputs, last = x.double(), model[2]
        hidden = model[1](model[0](inputs))
        above = output_gradient(last(hidden), one_hot(y, last.out_features).bool())
        below = (above @ last.weight) * (hidden > 0)
    return [(torch.cat([a, a.new_ones(len(a), 1)], 1), d) for a, d in ((inputs, below), (hidden, above))]


def loss_gradient(logits, label):
    return logits.softmax(-1) - label.double()


def margin_gradient(logits, label):
    return label.double() - logits.masked_fill(label, -torch.inf).softmax(-1)


def gram(left, right):
    return sum((a @ b.T) * (d @ e.T) for (a, d), (b, e) in zip(left, right, strict=True))


# ---------------------------------------------------------------- rows

PEERS = {  # name: (function, distribution)
    "stride-lightning": (ours, "stride-lightning"),
    "captum": (captum, "captum"),
    "kronfluence": (kronfluence, "kronfluence"),
    "kronfluence xR": (kronfluence_repeated, "kronfluence"),
    "kronfluence E[y]": (kronfluence_every_label, "kronfluence"),
    "dattri-llm": (dattri_llm, "dattri-llm"),
    "traker": (traker, "traker"),
    "exact": (exact, None),
}
METHODS = {
    "grad-dot": ["captum", "kronfluence", "dattri-llm"],
    "tracin": ["captum", "dattri-llm"],
    "trak": ["traker"],
    "ekfac": ["kronfluence", "kronfluence xR", "kronfluence E[y]"],
}
UNTIMED = ("exact", "kronfluence xR", "kronfluence E[y]")


def run_row(arguments, method, name):
    """One package and method, in this process; writes the scores and prints one line of JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    function = PEERS[name][0]
    model, train, queries = load(arguments.truth)
    arguments.checkpoints = arguments.folder / "checkpoints"
    arguments.batch_size = arguments.batch_size or BATCH_SIZES.get(name, 256)
    precise = copy.deepcopy(model).double()
    if method == "trak":  # what absolute dampings are made of
        of_train = factors(precise, train, margin_gradient)
        arguments.margin_norm = float(sum(a.square().sum(1) @ d.square().sum(1) for a, d in of_train))
    arguments.absolute_damping = 0.0
    if method == "ekfac":
        arguments.absolute_damping = arguments.damping * float(mean_eigenvalue(kronecker_blocks(precise, train)))
    if arguments.memory:
        function(method, model, few(train), few(queries), arguments)
        meter = start_meter()
        function(method, model, train, queries, arguments)
        print(json.dumps({"memory": meter() / 2**20}))
        return
    started = time.perf_counter()
    scores = function(method, model, train, queries, arguments)
    row = {"cold": time.perf_counter() - started}
    np.save(arguments.folder / f"{method} {name}.npy", scores.detach().double().numpy())
    if name not in UNTIMED:
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            function(method, model, train, queries, arguments)
            seconds.append(time.perf_counter() - started)
        row["warm"] = statistics.median(seconds)
    print(json.dumps(row))


def few(data):
    return TensorDataset(*(tensor[:8] for tensor in data.tensors))


def child(arguments, method, name, *more):
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(arguments.folder), "--row", method, name, *more]
    threads = {key: str(arguments.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    row = json.loads(done.stdout.splitlines()[-1])
    return row if more else {**row, "scores": np.load(arguments.folder / f"{method} {name}.npy")}


# ---------------------------------------------------------------- the tables


def compare(arguments, method, lds):
    names = ["stride-lightning", *METHODS[method], "exact"]
    print(f"\n{method}")
    print(
        f"{'package':<18} {'version':>8} {'LDS':>6} {'cold s':>8} {'warm s':>8} {'MiB':>6}"
        f"  {'with ours: mean, worst, all':>30}  {'with exact: mean, worst, all':>30}"
    )
    rows = {}
    for name in ["exact", *names[:-1]]:
        distribution = PEERS[name][1]
        if distribution and not installed(distribution):
            print(f"{name:<18} not installed: {INSTALL[distribution]}")
            continue
        rows[name] = {}
    for _ in range(arguments.rounds):
        for name in rows:
            if not (rows[name] and name in UNTIMED):
                rows[name] = best(rows[name], child(arguments, method, name))
    for name, row in rows.items():
        if name not in UNTIMED and "failed" not in row:
            row.update(child(arguments, method, name, "--memory"))
    for name in names:
        if name not in rows:
            continue
        row, label = rows[name], name.replace("xR", f"x{arguments.repeats}")
        if "failed" in row:
            print(f"{label:<18} failed: {row['failed']}")
            continue
        seconds = "".join(f" {row[key]:8.3f}" if key in row and name not in UNTIMED else f" {'-':>8}" for key in TIMES)
        distribution = PEERS[name][1]
        number = importlib.metadata.version(distribution) if distribution else "-"
        memory = "-" if name in UNTIMED else f"{row['memory']:.0f}"
        print(
            f"{label:<18} {number:>8} {lds(row['scores']):6.3f}{seconds} {memory:>6}"
            f"  {agreement(row, rows.get('stride-lightning')):>30}  {agreement(row, rows.get('exact')):>30}",
            flush=True,
        )
    conclude(rows)
    return [name for name, row in rows.items() if "failed" in row]


def best(row, again):
    """Of two runs of a row the shorter times: on a machine shared with others the rest is waiting."""
    return again if not row or "failed" in again else {**row, **{k: min(row[k], again[k]) for k in TIMES if k in row}}


def conclude(rows):
    ours = rows["stride-lightning"]
    peers = {name: row for name, row in rows.items() if name not in ("stride-lightning", *UNTIMED) and "warm" in row}
    if "failed" in ours or not peers:
        return
    for key in ("warm", "cold"):
        fastest = min(peers, key=lambda name: peers[name][key])
        print(f"{key}: ours is {peers[fastest][key] / ours[key]:.2f} times faster than the fastest peer ({fastest})")
    leanest = min(peers, key=lambda name: peers[name]["memory"])
    ratio = ours["memory"] / peers[leanest]["memory"]
    print(f"memory: ours takes {ratio:.2f} times the memory of the leanest peer ({leanest})")


def agreement(row, other):
    if other is None or row is other or "failed" in other:
        return "-"
    per_query = [np.corrcoef(a, b)[0, 1] for a, b in zip(row["scores"], other["scores"], strict=True)]
    overall = np.corrcoef(row["scores"].ravel(), other["scores"].ravel())[0, 1]
    return f"{np.mean(per_query):.5f}, {np.min(per_query):.5f}, {overall:.5f}"


def installed(distribution):
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def lds_of(path):
    from stride_lightning import linear_datamodeling_score

    masks, losses = load_retrained(path)
    return lambda scores: float(linear_datamodeling_score(torch.from_numpy(scores).float(), masks, losses))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", required=True, help="the .npz with data, model and retrained losses")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, help="training examples per batch, of every package")
    parser.add_argument("--epochs", type=int, default=3, help="epochs between checkpoints of TracIn")
    parser.add_argument("--projection-dim", type=int, default=512, help="dimension of TRAK's projection")
    parser.add_argument("--trak-damping", type=float, default=1.0, help="relative to the mean eigenvalue")
    parser.add_argument("--damping", type=float, default=0.1, help="of EK-FAC, relative to the mean eigenvalue")
    parser.add_argument("--repeats", type=int, default=10, help="R: how often kronfluence's factors see the data")
    parser.add_argument("--rounds", type=int, default=1, help="run all rows so often, in turn, and keep the best times")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        run_row(arguments, *arguments.row)
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = Path(folder)
        (arguments.folder / "checkpoints").mkdir()
        model, train, _ = load(arguments.truth)
        write_checkpoints(model, train, arguments.folder / "checkpoints", arguments.epochs)
        lds = lds_of(arguments.truth)
        failed = list(itertools.chain.from_iterable(compare(arguments, method, lds) for method in arguments.methods))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
