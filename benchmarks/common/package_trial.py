"""The trial of one package; see ``benchmarks/packages.py``. Run in the package's environment: ``SCRIPT RESULT.json``.

A package's script is a file ``benchmarks/packages/NAME.py`` with

* ``REQUIREMENTS = ["..."]``: what pip installs, on one line; the first is the package whose version is shown;
* ``train(callbacks, folder) -> dict``: trains on small generated data by the package's own code, with
  ``callbacks=callbacks(queries)`` in its Trainer (logs and checkpoints below ``folder``; one thread, no workers);
* ``load(ckpt_path, folder) -> dict``: the same objects in a second process, built without training. ``folder`` is that
  of ``train``, where it may have stored what the package needs.

Both dictionaries hold ``"module"`` (the LightningModule), ``"train_data"`` and ``"queries"`` (loaders, data modules or
data sets, as the package gives them), optionally ``"options"`` (keyword arguments of ``attribute()``, or a function
that gives them for a method), and that of ``train`` optionally ``"ckpt_path"`` (by default the trial saves one through
``module.trainer``).

* ``batch_of(data, places)``, optional: the batch of training examples or queries at these places, by other means than
  this library's. By default ``loader.collate_fn([loader.dataset[place] ...])``, of a data module's train loader, or
  of its test (else validation) loader for queries.

Lines that a user adds to the package's own code, apart from the callbacks and the call of ``attribute()``, end in
``# added``. Every module seeds itself: the trial calls ``seed_everything(0)`` before ``train``.
"""

import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

METHODS = ("ekfac", "grad-dot", "tracin", "trak", "stride")
OPTIONS = {"trak": {"projection_dim": 64}, "stride": {"num_subsets": 200}}
#: Training examples and queries whose scores are compared with ordinary gradients.
NUM_COMPARED = 12
NUM_DRAWS = 8


def load_script(path):
    spec = importlib.util.spec_from_file_location(f"trial_of_{Path(path).stem.replace('-', '_')}", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


@contextmanager
def reported(result, what):
    """An error inside the block is a problem of the package, with its last lines."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        result["problems"].append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")


# ---- the fit ----


def make_callbacks(folder):
    """A function that makes the three callbacks, and the list of those that were made."""
    from stride_lightning import FurtherTrainingCallback, StrideCallback, TracInCallback

    made = []

    def callbacks(queries):
        made.append(StrideCallback(folder / "stride"))
        made.append(TracInCallback(folder / "tracin"))
        made.append(FurtherTrainingCallback(queries, dirpath=folder / "further", left_out=[0, 1, 2]))
        return list(made)  # a Trainer adds its own to the list that it gets

    return callbacks, made


def trained(script, callbacks, folder):
    """What ``train`` gives, under a fixed seed, and the warnings of our callbacks."""
    import lightning.pytorch as L

    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(0, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = script.train(callbacks, folder)
    return fit, list(dict.fromkeys(str(each.message) for each in caught if "Callback" in str(each.message)))


def same_weights(one, other):
    """Names of weights and buffers that differ in any bit."""
    one, other = one.state_dict(), other.state_dict()
    names = one.keys() | other.keys()
    return sorted(name for name in names if name not in one or name not in other or not same(one[name], other[name]))


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else True


# ---- the scores ----


def answers(fit, ckpt_path, result, key):
    """Scores by every method; what is wrong with them goes into the result."""
    from stride_lightning import attribute

    scores, told = {}, {}
    options = fit.get("options", {})
    for method in METHODS:
        started = time.time()
        try:
            attribution = attribute(
                fit["module"],
                fit["queries"],
                train_data=fit["train_data"],
                method=method,
                ckpt_path=ckpt_path,
                show_progress=False,
                **OPTIONS.get(method, {}),
                **(options(method) if callable(options) else options),
            )
        except Exception as error:
            traceback.print_exc()
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            is_refusal = method == "stride" and isinstance(error, ValueError | TypeError)
            told[method] = f"{'refuses' if is_refusal else 'FAILS'}: {line}"
            if not is_refusal:
                result["problems"].append(f"{key}, {method}: {line}")
            continue
        values = attribution.scores
        if not torch.isfinite(values).all() or float(values.std()) <= 1e-6 * float(values.abs().max()):
            result["problems"].append(f"{key}, {method}: scores are not finite, or constant")
        told[method] = f"yes: {tuple(values.shape)} in {time.time() - started:.1f} s"
        scores[method] = values
        result.setdefault("loss", str(attribution.metadata.get("loss")))
    return scores, told


# ---- ordinary gradients ----


def loaders(data, is_query):
    if hasattr(data, "train_dataloader"):
        if not is_query:
            return data.train_dataloader()
        return next(loader for name in ("test", "val") if (loader := getattr(data, f"{name}_dataloader")()))
    return data


def batch_of(data, places, is_query):
    """Examples as the package makes a batch of them."""
    loader = loaders(data, is_query)
    dataset, collate = getattr(loader, "dataset", loader), getattr(loader, "collate_fn", None)
    collate = collate or torch.utils.data.default_collate
    return collate([dataset[place] for place in places])


def transferred(module, batch):
    batch = module.on_before_batch_transfer(batch, 0)
    return module.on_after_batch_transfer(module.transfer_batch_to_device(batch, module.device, 0), 0)


class Gradients:
    """Gradients of a module's own ``training_step``; of a random loss, through the library's seeds of examples."""

    def __init__(self, module, moment, batch, key):
        from stride_lightning.tasks.training_step import TrainingStep

        self.module, self.step = module, TrainingStep(module, moment)
        module.log = module.log_dict = lambda *args, **kwargs: None
        vars(module).setdefault("_trainer", None)  # some packages take it away after a fit
        if module._trainer is not None:
            module.trainer.state.stage = "train"  # which a Trainer forgets after a fit
        module.train()
        for child in module.modules():
            if isinstance(child, torch.nn.modules.dropout._DropoutNd | torch.nn.modules.batchnorm._BatchNorm):
                child.eval()
        self.parameters = [value for value in module.parameters() if value.requires_grad]
        losses = [float(self.loss(batch()).detach()) for _ in range(2)]
        self.is_random = losses[0] != losses[1]

    def loss(self, batch):
        output = self.module.training_step(*(transferred(self.module, batch), 0)[: self.num_arguments])
        return output["loss"] if isinstance(output, dict) else output

    @property
    def num_arguments(self):
        return min(2, self.module.training_step.__func__.__code__.co_argcount - 1)

    def __call__(self, make_batch, keys):
        """The gradient of the loss of a batch, in one vector."""
        if not self.is_random:
            return self.flat(self.loss(make_batch()))
        keys = torch.tensor(keys)
        draws = [self.step(transferred(self.module, make_batch()), keys, draw) for draw in range(NUM_DRAWS)]
        return sum(self.flat(draw) for draw in draws) / NUM_DRAWS

    def flat(self, loss):
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(slopes, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if s is None else s).flatten() for s, p in pairs]).double()


def weight(together, alone, partner, is_random):
    """The weight of an example in a mean, where its partner's is 1, from gradients of both together and each alone.

    A step that draws a sample of its batch makes a mean on average only: its examples count alike.
    """
    if not alone.any():  # an example without weight has no loss of its own
        return 0.0 if torch.allclose(together, partner) else 1.0
    design = torch.stack([alone, partner], 1)
    shares = torch.linalg.lstsq(design, together[:, None], driver="gelsd").solution[:, 0]
    misfit = float((design @ shares - together).norm() / together.norm().clamp_min(1e-30))
    if is_random and 1e-3 < misfit < 0.3:
        return 1.0
    if misfit > 1e-3:
        raise ValueError(f"a pair's gradient is no combination of those of its examples (misfit {misfit:.2g})")
    if abs(float(shares.sum()) - 2) < 2e-3:  # a sum
        return 1.0
    return float(shares[0] / shares[1])


def grad_dot_error(script, fit, scores):
    """Largest difference to inner products of ordinary gradients, over the largest of these."""
    from stride_lightning.gradients.own_reader import QUERY_KEYS
    from stride_lightning.tasks.moments import moment_of

    module, make = fit["module"], getattr(script, "batch_of", batch_of)
    num_queries, num_train = scores.shape

    def train(*places):
        return lambda: make(fit["train_data"], list(places), False)

    def query(place):
        return lambda: make(fit["queries"], [place], True)

    gradients = Gradients(module, moment_of(module, None), train(0), 0)
    if gradients.is_random:  # two sizes of a batch tell which random numbers belong to examples
        for places in ([0], [0, 1]):
            gradients(train(*places), places)
    alone = [torch.nan_to_num(gradients(train(place), [place])) for place in range(num_train)]
    partner = max(range(num_train), key=lambda place: float(alone[place].norm()))
    weights = torch.tensor(
        [
            1.0
            if i == partner
            else weight(
                gradients(train(i, partner), [i, partner]), alone[i], alone[partner], is_random=gradients.is_random
            )
            for i in range(num_train)
        ]
    )
    weights = weights / weights.mean()
    rows = torch.stack(alone[:NUM_COMPARED]) * weights[:NUM_COMPARED, None]
    asked = [
        torch.nan_to_num(gradients(query(place), [place + QUERY_KEYS]))
        for place in range(min(num_queries, NUM_COMPARED))
    ]
    is_weighted = bool((weights - 1).abs().max() > 1e-3)
    expected = torch.stack(asked) @ rows.T
    given = scores[: len(asked), : len(rows)].double()
    if is_weighted:  # a query's own weight is one number for its row
        given = given * (expected * given).sum(1, keepdim=True) / (given * given).sum(1, keepdim=True)
    error = float((given - expected).abs().max() / expected.abs().max())
    return error, gradients.is_random, [float(weights.min()), float(weights.max())]


# ---- all of it ----


def first(script_path, result_path):
    script, folder = load_script(script_path), result_path.parent / "run"
    subprocess.run(["rm", "-rf", folder], check=True)
    package = script.REQUIREMENTS[0].partition("[")[0].partition("=")[0]
    source = Path(script_path).read_text().splitlines()
    names = (package, "torch", "lightning")
    result = {
        "problems": [],
        "version": importlib.metadata.version(package),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        "added": [line.strip() for line in source if line.endswith("# added")],
    }
    started = time.time()
    try:
        judge(script, script_path, folder, result)
    finally:
        result["seconds"] = round(time.time() - started)
        result_path.write_text(json.dumps(result, indent=1))


def judge(script, script_path, folder, result):
    if len(result["added"]) > 3:
        result["problems"].append(f"{len(result['added'])} lines were added")
    with reported(result, "fit without callbacks"):
        plain, _ = trained(script, lambda queries: [], folder / "plain")
    with reported(result, "fit with callbacks"):
        callbacks, made = make_callbacks(folder)
        fit, result["callbacks"] = trained(script, callbacks, folder / "watched")
        # A loss of the module's own is none for STRIDE yet, so its callback may stop.
        stopped = [text for text in result["callbacks"] if "stopped" in text and not text.startswith("StrideCallback")]
        result["problems"] += stopped
        if len(made) != 3:
            result["problems"].append("`train` did not ask for the callbacks once")
        different = same_weights(plain["module"], fit["module"])
        result["same fit"] = not different
        if different:
            result["problems"].append(f"the fit with callbacks gives other weights: {different[:5]}")
        result["records"] = {each.name: len(list(each.iterdir())) for each in folder.iterdir() if each.is_dir()}
    if "same fit" not in result:
        return
    ckpt_path = fit.get("ckpt_path")
    if ckpt_path is None:
        ckpt_path = folder / "model.ckpt"
        fit["module"].trainer.save_checkpoint(ckpt_path)
    scores, result["methods"] = answers(fit, None, result, "same process")
    torch.save(scores, folder / "scores.pt")
    if "grad-dot" in scores:
        with reported(result, "grad-dot against ordinary gradients"):
            error, is_random, weights = grad_dot_error(script, fit, scores["grad-dot"])
            result["grad-dot error"] = error
            result["random loss"], result["weights"] = is_random, weights
            if not error < 1e-3:
                result["problems"].append(f"grad-dot differs from ordinary gradients by {error:.2g}")
    command = [sys.executable, "-P", __file__, str(script_path), str(folder), str(ckpt_path)]
    if subprocess.run(command).returncode:
        result["problems"].append("the second process ended with an error")
        return
    second = json.loads((folder / "second.json").read_text())
    result["problems"] += second["problems"]
    result["second process"] = second["methods"]


def second(script_path, folder, ckpt_path):
    """The second process: scores from the checkpoint, compared with those of the first."""
    script, result = load_script(script_path), {"problems": [], "methods": {}}
    with reported(result, "second process, load"):
        fit = script.load(Path(ckpt_path), folder / "watched")
        scores, result["methods"] = answers(fit, ckpt_path, result, "second process")
        for method, before in torch.load(folder / "scores.pt").items():
            if method in scores:
                error = float((scores[method] - before).abs().max() / before.abs().max())
                result["methods"][method] = "yes" if error < 1e-4 else f"differs by {error:.2g}"
                if error >= 1e-4:
                    result["problems"].append(f"second process, {method}: scores differ by {error:.2g}")
    (folder / "second.json").write_text(json.dumps(result))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if len(sys.argv) == 3:
        first(sys.argv[1], Path(sys.argv[2]))
    else:
        second(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
