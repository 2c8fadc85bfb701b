"""Information methods against other methods: backdoors, counterfactuals, coresets, duplicates, refits; a table each.

* ``backdoor``: 1 % of the MNIST training images carry a white 3 x 3 patch and the label 0. Queries are test images of
  other digits with the patch, which the model therefore takes for a 0 (``target="predicted"``). How many of the planted
  images are among the 50 highest scores (recall@50), and how high is the first of them (mean reciprocal rank)? MLP
  784-128-10; mean over plantings. "Features" is the cosine of the activations of the last hidden layer.
* ``counterfactual``: models are retrained without the 10 or 50 highest-scoring training digits of each query; mean rise
  of the query's loss, with its standard error over queries. Digits, n = 1000, MLP 64-128-10. "Signed" information has
  the sign of the first-order influence. "Same class" removes random digits of the query's label.
* ``coresets``: accuracy of models trained on nothing but the chosen digits, over how many there are, from a pool where
  all classes are equally common, and from one where five of ten are rare. Chosen by ``attributor.coreset()`` or by
  k-centre greedy (on hidden activations), with the features of a model trained on the whole pool or on 50 random digits
  of it; or at random. Mean over trainings; for random choice over draws also their standard deviation.
* ``duplicates``: each query's 10 highest-scoring digits are planted five times more and the model is trained again; how
  many different digits are among the first 10 now? Plain, and with ``attributor.diverse(attribution, 10)``; in the last
  row the 10 whose removal, one after the other, loses most information.
* ``refits``: information loss freezes the curvature and knows no labels; what happens if a model is really fitted
  again? Logistic regressions on random data (n = 120, 6 weights, ridge 1/2) without each of their examples.

Digits and MNIST models are trained as those of ``methods.py``: SGD with learning rate .02, momentum .9, weight decay
1e-2, batches of 100, 30 and 15 epochs.

    python benchmarks/information.py --data mnist_small.npz --sections backdoor duplicates
    python benchmarks/information.py --picture information.png

``--data`` is an ``.npz`` with ``X``, ``y``, ``X_test`` and ``y_test`` (28 x 28); by default ``mnist_small.npz`` in the
folder that ``STRIDE_DATA`` names. Without it, scikit-learn's digits are enlarged.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from stride_lightning import (
    Attribution,
    InformationGainAttributor,
    InformationLossAttributor,
    attribute,
    retrain_without,
)
from stride_lightning.attribute import create
from stride_lightning.data.sources import resolve_queries
from stride_lightning.information.greedy import greedy_sets
from stride_lightning.information.loss import information
from stride_lightning.information.posterior import Posterior
from stride_lightning.metrics import mean_reciprocal_rank, retrieval_recall

SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-2)
LOSS, GAIN = "information-loss", "information-gain"
WAYS = {  # method and options by the name in the tables
    LOSS: (LOSS, {}),
    f"{LOSS}, signed": (LOSS, {"signed": True}),
    f"{LOSS}, margin": (LOSS, {"likelihood": "margin"}),
    GAIN: (GAIN, {}),
    f"{GAIN}, signed": (GAIN, {"signed": True}),
    **{method: (method, {}) for method in ("grad-cos", "trak", "ekfac", "stride")},
}


def mlp(num_pixels=64):
    return nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 128), nn.ReLU(), nn.Linear(128, 10))


def fit(data, epochs, seed=0, steps=0):
    """A model trained on some data for so many epochs, or steps if that is more."""
    torch.manual_seed(seed)
    images, labels = data.tensors
    model = mlp(images[0].numel())
    optimizer = SGD(model.parameters())
    for _ in range(max(epochs, -(-steps // -(-len(data) // 100)))):
        for batch in torch.randperm(len(data)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def hidden(model, images):
    with torch.no_grad():
        return model[:3](images)


def scored(way, model, queries, train, **more):
    """The attribution and its seconds."""
    method, options = WAYS[way]
    started = time.perf_counter()
    attribution = attribute(model, queries, train_data=train, method=method, show_progress=False, **options, **more)
    return attribution, time.perf_counter() - started


def digits():
    """All of scikit-learn's digits, in random order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


def some(pair, places):
    return TensorDataset(*(tensor[places] for tensor in pair))


# ---------------------------------------------------------------- backdoor


def large_digits(arguments):
    """Training and test images of 28 x 28, and what they are."""
    if arguments.data is None:
        images, labels = digits()
        images = F.interpolate(images, size=(28, 28), mode="bilinear")
        return (images[:1400], labels[:1400]), (images[1400:], labels[1400:]), "scikit-learn's digits, enlarged"
    stored = np.load(arguments.data)
    parts = [(stored[f"X{part}"], stored[f"y{part}"]) for part in ("", "_test")]
    pairs = [(torch.tensor(x).reshape(-1, 1, 28, 28).float() / 255, torch.tensor(y).long()) for x, y in parts]
    return *pairs, "MNIST"


def patched(images):
    images = images.clone()
    images[..., 24:27, 24:27] = 1
    return images


def backdoor(arguments):
    clean, test, name = large_digits(arguments)
    if arguments.data is None:
        print("\nNo MNIST: give --data, or set STRIDE_DATA to the folder of mnist_small.npz.")
    num_train, ways, rows = len(clean[0]), [way for way in WAYS if way != f"{GAIN}, signed"], {}
    for seed in range(arguments.plantings):
        planted = torch.randperm(num_train, generator=torch.Generator().manual_seed(seed))[: num_train // 100]
        images, labels = (tensor.clone() for tensor in clean)
        images[planted], labels[planted] = patched(images[planted]), 0
        train = TensorDataset(images, labels)
        model = fit(train, 15, seed)
        others = test[1] != 0
        triggered = patched(test[0][others])
        with torch.no_grad():
            taken = model(triggered).argmax(1) == 0
            accuracy = (model(test[0]).argmax(1) == test[1]).float().mean()
        print(
            f"\nbackdoor, planting {seed}: {name}, {len(planted)} of {num_train}; test accuracy {accuracy:.3f}; "
            f"{taken.float().mean():.0%} of {len(triggered)} patched test images are taken for a 0",
            flush=True,
        )
        triggered = triggered[taken][: arguments.queries]
        if not len(triggered):
            print("The backdoor did not take: no queries.")
            continue
        queries = TensorDataset(triggered, torch.zeros(len(triggered), dtype=torch.int64))
        relevant = torch.zeros(len(triggered), num_train, dtype=torch.bool)
        relevant[:, planted] = True
        for way in [*ways, "features"]:
            if way == "features":
                started = time.perf_counter()
                scores = F.normalize(hidden(model, triggered)) @ F.normalize(hidden(model, images)).T
                seconds = time.perf_counter() - started
            else:
                attribution, seconds = scored(way, model, queries, train, target="predicted")
                scores = attribution.scores
            measures = retrieval_recall(scores, relevant, 50), mean_reciprocal_rank(scores, relevant)
            rows.setdefault(way, []).append([*map(float, measures), seconds])
    if rows:
        print(f"{arguments.queries} queries; mean over plantings, with the range of recall")
        print(f"{'method':<26} {'recall@50':>20} {'MRR':>6} {'seconds':>8}")
    for way, values in sorted(rows.items(), key=lambda row: -np.mean(row[1], 0)[0]):
        recall, rank, seconds = np.mean(values, 0)
        recalls = [value[0] for value in values]
        spread = f"{recall:.3f} [{min(recalls):.3f}, {max(recalls):.3f}]"
        print(f"{way:<26} {spread:>20} {rank:6.3f} {seconds:8.2f}", flush=True)


# ---------------------------------------------------------------- counterfactual


def counterfactual(arguments):
    everything, num_queries, ks = digits(), 20, (10, 50)
    train, queries = some(everything, slice(0, 1000)), some(everything, slice(1000, 1000 + num_queries))
    model, generator = fit(train, 30), torch.Generator().manual_seed(0)
    noise = torch.rand(num_queries, 1000, generator=generator)
    same = (queries.tensors[1][:, None] == train.tensors[1]).float()
    attributions = {"random": Attribution(noise), "same class": Attribution(same + noise)}
    ways = [way for way in WAYS if not way.endswith("margin")]
    attributions |= {way: scored(way, model, queries, train)[0] for way in ways}
    how = {"max_epochs": 30, "optimizer": SGD, "num_seeds": arguments.seeds, "show_progress": False}
    loader, rows = DataLoader(train, batch_size=100, shuffle=True), []
    for way, attribution in attributions.items():
        removed = retrain_without(attribution, mlp, queries, train_data=loader, ks=ks, **how)
        rows.append((way, removed.losses_removed - removed.losses_full))
    print(f"\ncounterfactual: digits, {num_queries} queries, {arguments.seeds} seeds; mean rise of the loss, in nats")
    print(f"{'method':<26}", *(f"{f'without top {k}':>20}" for k in ks), "  of 50 with the query's label")
    for way, rises in sorted(rows, key=lambda row: -row[1][0].mean()):
        cells = [f"{rise.mean():+.3f} +- {rise.std() / len(rise) ** 0.5:.3f}" for rise in rises]
        share = same.gather(1, attributions[way].top_columns(50).proponents).mean()
        print(f"{way:<26}", *(f"{cell:>20}" for cell in cells), f"  {share:.0%}", flush=True)


# ---------------------------------------------------------------- coresets


def k_centre(points, size):
    """Farthest-first traversal from the point nearest to the mean."""
    chosen = [int((points - points.mean(0)).norm(dim=1).argmin())]
    distance = (points - points[chosen[0]]).norm(dim=1)
    while len(chosen) < size:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
    return chosen


def coresets(arguments):
    everything, sizes, generator = digits(), (25, 50, 100, 200, 400), torch.Generator().manual_seed(0)
    test, labels = some(everything, slice(1297, None)), everything[1][:1297]
    rare = torch.cat([(labels == digit).nonzero()[:, 0][: 20 if digit > 4 else None] for digit in range(10)])
    pools = {
        "all classes common": torch.arange(1297),
        "classes 5 to 9 rare": rare[torch.randperm(len(rare), generator=generator)],
    }

    def accuracy(data, seed):
        model = fit(data, 0, seed, steps=300)
        with torch.no_grad():
            return float((model(test.tensors[0]).argmax(1) == test.tensors[1]).float().mean())

    for name, places in pools.items():
        pool = some(everything, places)
        images, given = pool.tensors
        few = TensorDataset(images[:50], given[:50])
        models = {"whole pool": fit(pool, 30), "50 digits": fit(few, 0, steps=300)}
        everyone = np.mean([accuracy(pool, seed) for seed in range(arguments.seeds)])
        print(f"\ncoresets: {len(pool)} digits, {name}; accuracy with all of them {everyone:.3f}")
        print(f"{'chosen by (model of)':<32}", *(f"{size:>7}" for size in sizes), "  seconds")
        for source, model in models.items():
            for way in ("information", "k-centre"):
                started = time.perf_counter()
                if way == "information":
                    attributor = InformationGainAttributor(show_progress=False).fit(model, pool)
                    chosen = attributor.coreset(sizes[-1]).places.tolist()
                else:
                    chosen = k_centre(hidden(model, images), sizes[-1])
                seconds = time.perf_counter() - started
                cells = []
                for size in sizes:
                    part = TensorDataset(images[chosen[:size]], given[chosen[:size]])
                    cells.append(np.mean([accuracy(part, seed) for seed in range(arguments.seeds)]))
                print(f"{f'{way} ({source})':<32}", *(f"{cell:7.3f}" for cell in cells), f"  {seconds:.1f}", flush=True)
        draws = [torch.randperm(len(pool), generator=generator) for _ in range(2 * arguments.seeds)]
        values = np.array(
            [
                [accuracy(TensorDataset(images[draw[:size]], given[draw[:size]]), seed) for size in sizes]
                for seed, draw in enumerate(draws)
            ]
        )
        print(f"{f'random, mean of {len(draws)}':<32}", *(f"{cell:7.3f}" for cell in values.mean(0)))
        print(f"{'        standard deviation':<32}", *(f"{cell:7.3f}" for cell in values.std(0, ddof=1)), flush=True)


# ---------------------------------------------------------------- duplicates


def duplicates(arguments):
    everything, num_queries, k = digits(), 10, 10
    train, queries = some(everything, slice(0, 1000)), some(everything, slice(1000, 1000 + num_queries))
    model = fit(train, 30)
    print(f"\nduplicates: digits, {num_queries} queries; different digits among the first {k}, mean over queries")
    print(f"{'method':<32} {'planted':>8} {'plain':>6} {'diverse':>8}", flush=True)

    def different(positions, original):
        return np.mean([len(set(original[row].tolist())) for row in positions])

    for way in (LOSS, GAIN, "grad-cos", "ekfac", "stride"):
        top = scored(way, model, queries, train)[0].top(k).proponents.unique()
        original = torch.cat([torch.arange(1000), top.repeat(5)])
        crowded = some(train.tensors, original)
        again = fit(crowded, 30)
        attribution, _ = scored(way, again, queries, crowded)
        plain, varied = different(attribution.top(k).proponents, original), ""
        if way in (LOSS, GAIN):
            attributor = create(way, show_progress=False).fit(again, crowded)
            varied = f"{different(attributor.diverse(attribution, k).proponents, original):.1f}"
        print(f"{way:<32} {5 * len(top):>8} {plain:6.1f} {varied:>8}", flush=True)
        if way == LOSS:
            last = different(removed_greedily(again, queries, crowded, k), original), 5 * len(top)
    print(f"{'removed one after the other':<32} {last[1]:>8} {last[0]:6.1f}", flush=True)


def removed_greedily(model, queries, train, k):
    """Positions of the examples whose removal loses most information about each query, in order of choice."""
    attributor = InformationLossAttributor(show_progress=False).fit(model, train)
    with attributor.borrowed_model() as (borrowed, device):
        reader = attributor.read(borrowed, resolve_queries(queries), device, "label")
        searched = torch.cat([batch.rows for batch in attributor.tangents.batches(reader)])
        features = torch.cat([batch.rows for batch in attributor.tangents.batches(attributor.reader)])
    return greedy_sets(features, searched, attributor.posterior, k, form="loss").places


# ---------------------------------------------------------------- refits


def refits(arguments, num_problems=20, num_train=120, num_weights=6, ridge=0.5):
    rows = []
    for seed in range(num_problems):
        generator = torch.Generator().manual_seed(seed)
        x, true, query = (
            torch.randn(*shape, num_weights, generator=generator).double() for shape in ((num_train,), (), (1, 1))
        )
        y = (torch.rand(num_train, generator=generator) < (x @ true).sigmoid()).double()
        # All examples first, then all but one: Newton's method, for all models at once.
        included = torch.cat([torch.ones(1, num_train), 1 - torch.eye(num_train)]).double()
        weights = x.new_zeros(len(included), num_weights)
        for _ in range(31):
            p = (weights @ x.T).sigmoid()
            hessian = torch.einsum("mn,np,nr->mpr", included * p * (1 - p), x, x) + ridge * torch.eye(num_weights)
            gradient = (included * (p - y)) @ x + ridge * weights
            weights = weights - torch.linalg.solve(hessian, gradient)
        variances = (query[0] @ torch.linalg.inv(hessian) @ query[0].T).flatten()
        growth, change = variances[1:] - variances[0], (weights[1:] - weights[0]) @ query.flatten()
        curvature = (p[0] * (1 - p[0])).sqrt()
        features = (curvature[:, None] * x)[:, None]
        posterior = Posterior.fit(features, ridge=ridge)
        loss = information(features, query, posterior)[0]
        influence = (x @ torch.linalg.solve(hessian[0], query.flatten())) * (p[0] - y)
        rows.append(
            [
                spearmanr(loss, growth).statistic,
                float((growth < 0).double().mean()),
                spearmanr(loss, change.abs()).statistic,
                spearmanr(influence.abs(), change.abs()).statistic,
            ]
        )
    print(f"\nrefits: {num_problems} logistic regressions without each of {num_train} examples; mean +- deviation")
    names = (
        "Spearman of information loss and growth of the variance of the query's logit",
        "share of examples without which that variance falls",
        "Spearman of information loss and change of the query's logit, without its sign",
        "Spearman of first-order influence and that change, without their signs",
    )
    for name, mean, deviation in zip(names, np.mean(rows, 0), np.std(rows, 0), strict=True):
        print(f"{name:<80} {mean:.2f} +- {deviation:.2f}", flush=True)


# ---------------------------------------------------------------- the picture of docs/information.md


def draw(path):
    """Two weights: what an example tells when nothing else is known, when all others are, and when it has a copy."""
    from matplotlib.figure import Figure

    example, query = torch.tensor([[[1.5, 0.9]]]).double(), torch.tensor([[[1.0, 0.35]]]).double()
    others = torch.tensor([[[-0.5, 1.3]], [[0.4, 1.0]], [[0.7, -0.2]]]).double()
    alone, rest = Posterior.without_data(2, ridge=1.0), Posterior.fit(others, ridge=1.0)
    with_it, with_two = (Posterior.fit(torch.cat([others, *[example] * copies]), ridge=1.0) for copies in (1, 2))
    gain = information(example, query, alone, "gain")
    losses = [information(example, query, posterior) for posterior in (with_it, with_two)]
    panels = [
        ("gain", gain, alone, Posterior.fit(example, ridge=1.0), "nothing known", "the example alone"),
        ("loss", losses[0], rest, with_it, "all others", "all examples"),
        ("loss, with a copy", losses[1], with_it, with_two, "all but this copy", "all examples, and the copy"),
    ]
    figure = Figure(figsize=(9.6, 3.5), dpi=150, layout="constrained")
    angle = torch.linspace(0, 2 * torch.pi, 200).double()
    circle = torch.stack([angle.cos(), angle.sin()])
    line = query.flatten() / query.norm()
    across = torch.stack([-line[1], line[0]])
    for axes, (name, nats, before, after, without, given) in zip(figure.subplots(1, 3), panels, strict=True):
        states = ((before, "#c4262e", "--", without, 0.09), (after, "#0969da", "-", given, -0.09))
        axes.axline((0, 0), slope=float(line[1] / line[0]), color="#656d76", linewidth=0.8)
        for posterior, color, style, label, off in states:
            covariance = posterior.variance(torch.eye(2)[None])[0]
            x, y = torch.linalg.cholesky(covariance) @ circle
            axes.plot(x, y, style, color=color, linewidth=1.4, label=label)
            reach = (line @ covariance @ line).sqrt() * line
            ends = torch.stack([off * across - reach, off * across + reach])
            axes.plot(ends[:, 0], ends[:, 1], color=color, linewidth=2.4, solid_capstyle="butt")
        arrow = {"arrowstyle": "-|>", "color": "#1a7f37", "linewidth": 1.3}
        direction = example.flatten() / example.norm() * 1.25
        axes.annotate("", direction.tolist(), (0, 0), arrowprops=arrow)
        axes.annotate("example", (direction * 1.05).tolist(), color="#1a7f37", fontsize=8, ha="center")
        axes.annotate("query", (line * 1.33 - 0.17 * across).tolist(), color="#656d76", fontsize=8, ha="center")
        axes.set_title(f"{name}: {float(nats):.3f} nats", fontsize=10)
        axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal", xticks=[], yticks=[])
        axes.set_xlabel("weight 1", fontsize=8)
        axes.set_ylabel("weight 2", fontsize=8)
        axes.legend(fontsize=7.5, frameon=False, loc="lower right")
    figure.savefig(path)


SECTIONS = {function.__name__: function for function in (backdoor, counterfactual, coresets, duplicates, refits)}


def default_data():
    path = Path(os.environ.get("STRIDE_DATA", "")) / "mnist_small.npz"
    return path if path.is_file() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="all")
    parser.add_argument("--data", type=Path, default=default_data(), help="MNIST, an .npz file")
    parser.add_argument("--queries", type=int, default=50, help="of each planting of backdoors")
    parser.add_argument("--plantings", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="models trained for each number in the other tables")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="only draw what information is, into this file")
    arguments = parser.parse_args()
    if arguments.data is not None and not arguments.data.is_file():
        parser.error(f"no file {arguments.data}")
    torch.set_num_threads(arguments.threads)
    if arguments.picture is not None:
        draw(arguments.picture)
        return
    for section in arguments.sections:
        started = time.perf_counter()
        SECTIONS[section](arguments)
        print(f"{section}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
