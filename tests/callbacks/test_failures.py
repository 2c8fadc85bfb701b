"""Whatever goes wrong in a callback, the fit is to the bit the one without it, and one warning says what it was."""

import errno
import gc
import logging
import random
import signal
import warnings
from collections import Counter, namedtuple
from contextlib import nullcontext as nothing
from datetime import timedelta
from functools import partial

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset

from stride_lightning import Classification
from stride_lightning.callbacks import guard, recording
from stride_lightning.runtime import progress
from stride_lightning.storage import records
from stride_lightning.storage.records import find_records, read_record
from tests.contract.test_callbacks import CALLBACKS, callback_of, every_callback, is_untouched
from tests.helpers.models import Classifier, build, classification_data, hooks_of, loader, make_trainer
from tests.helpers.processes import run_two, start

pytestmark = [
    pytest.mark.usefixtures("guarded"),
    pytest.mark.filterwarnings(
        "ignore:Two reads of one example",
        "ignore:.*Consider increasing the value of the",
        "ignore:You're resuming from a checkpoint that ended before the epoch ended",
        "ignore:Be aware that when using `ckpt_path`",
        "ignore:Checkpoint directory .* exists and is not empty",
        "ignore:Lazy modules are a new feature",
        "ignore:The training_step of .* minimises another loss",
    ),
]
NAMES = {name: kind.__name__ for name, (kind, _) in CALLBACKS.items()}
DATA = classification_data(80)
NUM_STEPS = 10


# ---- a fit in which everything that can draw or count does so -----------------------------------------------------


class Restless(Classifier):
    """Draws from every generator and counts its calls, in eval mode too; keeps what it computed."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls, self.rng = 0, np.random.default_rng(1)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + len(x)
        self.last = x
        x = self.norm(F.dropout(x, 0.1))
        return super().forward(x) + 0.01 * (random.random() + np.random.rand() + self.rng.random())  # noqa: NPY002


class Drawing(Dataset):
    """Draws from the global generators and from two of its own."""

    def __init__(self, dataset):
        self.dataset, self.rng, self.generator = dataset, random.Random(2), torch.Generator().manual_seed(2)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        x, y = self.dataset[i]
        noise = torch.randn(4) + torch.randn(4, generator=self.generator) + self.rng.random() + random.random()
        return x + 0.01 * noise + 0.01 * np.random.rand(), y  # noqa: NPY002


def bits(value):
    """What a value is to the last bit."""
    if isinstance(value, torch.Tensor) and not is_lazy(value):
        return value.detach().contiguous().numpy().tobytes()
    return repr(value)


class Witness(L.Callback):
    """Sees every bit of the fit at every batch, and counts the hooks that are called."""

    def __init__(self):
        self.seen, self.calls = [], Counter()

    def see(self, trainer, model, batch):
        loader = trainer.train_dataloader
        dataset = loader.dataset
        state = {
            "random": [torch.get_rng_state(), np.random.get_state(), random.getstate()],  # noqa: NPY002
            "generators": [loader.generator.get_state()],
            "batch": batch,
            "weights": [*model.named_parameters(), *model.named_buffers()],
            "gradients": [parameter.grad for parameter in model.parameters()],
            "trainable": [parameter.requires_grad for parameter in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "hooks": [len(hooks_of(model)), torch.is_grad_enabled()],
            "attributes": [sorted(vars(model)), getattr(model, "calls", 0), getattr(model, "last", 0)],
        }
        if isinstance(dataset, Drawing):
            states = [dataset.rng.getstate(), dataset.generator.get_state(), model.rng.bit_generator.state]
            state["generators"] += states
        self.seen.append(pytree.tree_map(bits, state))


def _counted(name):
    def hook(self, *arguments, **_):
        self.calls[name] += 1
        if name.startswith("on_train") and name != "on_train_epoch_start":
            self.see(*arguments[:2], arguments[-2] if "batch" in name else ())

    return hook


for _name in [*(name for name in vars(L.Callback) if name.startswith("on_")), "setup", "teardown"]:
    setattr(Witness, _name, _counted(_name))


def assert_same(witness, expected):
    """The fit was the same to the last bit, and all hooks were called."""
    assert witness.calls == expected.calls
    for place, (seen, other) in enumerate(zip(witness.seen, expected.seen, strict=True)):
        for key, value in other.items():
            assert seen[key] == value, f"{key} differ at {place}"


def fit(folder, kind, *callbacks, data=DATA, num_workers=0, ckpt_path=None, **options):
    """The model, the trainer, and what a callback that comes last has seen."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model, witness = build(kind), Witness()
    data = Drawing(data) if issubclass(kind, Restless) else data
    generator = torch.Generator().manual_seed(3)
    batches = DataLoader(data, 16, shuffle=True, generator=generator, num_workers=num_workers)
    trainer = make_trainer(folder, *callbacks, witness, **options)
    trainer.fit(model, batches, ckpt_path=ckpt_path)
    return model, trainer, witness


_without = {}


def fit_without(folder, kind, data=DATA, **options):
    """What a fit without our callbacks sees; it is the same every time."""
    key = kind, data, str(options)
    if key not in _without:
        _without[key] = fit(folder, kind, data=data, **options)[-1]
    return _without[key]


def often(name, **options):
    """A callback that works as often as it can; STRIDE takes a likelihood that a model without rest does not have.

    Further training is of few examples and queries: losses that draw are measured often and one by one.
    """
    needed = {
        "stride": {"every_n_train_steps": 2, "task": Classification()},
        "tracin": {"every_n_train_steps": 2},
        "further-training": {"queries": classification_data(2, seed=1), "left_out": [12, 3]},
    }
    return callback_of(name, **needed[name] | options)


@every_callback
@pytest.mark.parametrize(("kind", "num_workers"), [(Classifier, 0), (Restless, 0), (Restless, 2)])
def test_a_fit_that_goes_well_is_the_one_without(name, kind, num_workers, tmp_path):
    expected = fit_without(tmp_path, kind, num_workers=num_workers)
    callback = often(name)
    _, trainer, witness = fit(tmp_path, kind, callback, num_workers=num_workers)
    assert_same(witness, expected)
    assert callback.records == find_records(tmp_path / name)
    assert callback.records
    assert trainer.global_step == NUM_STEPS


class CountsBatches(Classifier):
    """Counts the batches that it is handed, by an attribute that any reading of data changes."""

    handed = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.handed += 1
        return batch


@every_callback
def test_data_that_are_read_before_the_first_step_count_for_nothing(name, tmp_path):
    """On a bar, if the Trainer shows one."""
    seen = []

    class Watching(type(callback_of(name))):
        def begin(self, trainer, pl_module):
            super().begin(trainer, pl_module)
            seen.append((pl_module.handed, progress._current.get()))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.handed)

    callback = often(name)
    callback.__class__ = Watching
    model = build(CountsBatches)
    bar = {"enable_progress_bar": True, "limit_train_batches": 1, "max_epochs": 1}
    make_trainer(tmp_path, callback, **bar).fit(model, loader(DATA))
    (while_reading, shown), at_first_batch = seen
    assert while_reading > 0
    assert shown is not None
    assert at_first_batch == 1


# ---- what goes wrong -----------------------------------------------------------------------------------------------


class Failing(Restless):
    """Fails when the callback runs it, once it has drawn and counted."""

    from_step, error = 0, RuntimeError("out of luck")

    def __init__(self):
        super().__init__()
        self.fails = self.from_step == 0

    def on_train_batch_start(self, batch, batch_idx):
        self.fails = self.global_step >= self.from_step

    def forward(self, x):
        outputs = super().forward(x)
        of_the_fit = self.training and isinstance(self._trainer, L.Trainer)  # a stand-in's is where a loss is read
        if self.fails and not of_the_fit:
            raise self.error
        return outputs


class FailingLater(Failing):
    from_step = 3


class OutOfMemory(FailingLater):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


class WithoutRate(torch.optim.SGD):
    """Loses its learning rate in its first step."""

    def step(self, closure=None):
        self.param_groups[0]["lr"] = 0.1
        loss = super().step(closure)
        del self.param_groups[0]["lr"]
        return loss


class NoRate(Restless):
    def configure_optimizers(self):
        return WithoutRate(self.parameters(), lr=0.1)


class Deaf(CSVLogger):
    """Refuses what a callback of ours logs."""

    def log_metrics(self, metrics, step=None):
        if any("/" in key for key in metrics):
            raise ConnectionError("the server does not answer")


def with_nan(place):
    x, y = (tensor.clone() for tensor in DATA.tensors)
    x[place] = torch.nan
    return TensorDataset(x, y)


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def file_in_its_place(folder, monkeypatch):
    (folder / "taken").write_text("")
    return {"dirpath": folder / "taken" / "records"}


def full_disk(folder, monkeypatch):
    monkeypatch.setattr(recording, "write_file", no_space)


def disk_that_fills_up(folder, monkeypatch):
    monkeypatch.setattr(records, "write_file", no_space)


def small_disk(folder, monkeypatch):
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda _: namedtuple("Usage", "total free")(10**9, 10))


class Engine(nn.Module):
    """A wrapper that may hold the model in any way, as DeepSpeed's does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


class EngineStrategy(SingleDeviceStrategy):
    def setup(self, trainer):
        super().setup(trainer)
        self.model = Engine(self.model)


BEFORE = "before the first step"
#: When each callback comes to what goes wrong in the middle of training, and where it is met at the end.
IN_THE_MIDDLE = {"stride": "at step 2", "tracin": "at step 2", "further-training": "at step 10"}
ALL, MODEL = tuple(CALLBACKS), {"stride": "at step 4", "further-training": "at step 10"}
#: What goes wrong, for which callbacks, when they stop, what they say, and how it comes about.
WRONG = {
    "read-only folder": (
        ALL,
        BEFORE,
        r"Nothing can be written into .*taken/records \(.*Make it",
        {"at": file_in_its_place},
    ),
    "full disk": (ALL, BEFORE, r"Nothing can be written into .* \(.*No space left", {"at": full_disk}),
    "disk that fills up": (ALL, IN_THE_MIDDLE, r"into .* \(.*No space left.*make room", {"at": disk_that_fills_up}),
    "small disk": (
        ["tracin"],
        BEFORE,
        r"has 10 bytes left, and a record takes at least \d+\. Make",
        {"at": small_disk},
    ),
    "wrong layer": (["stride"], BEFORE, "'network.9' is not a submodule.*'network.2'", {"layers": ["network.9"]}),
    "wrong example": (["further-training"], BEFORE, r"\[99\] are not among the 80", {"left_out": [99]}),
    "NaN data": (
        ALL,
        {"stride": BEFORE, "tracin": "at step 4", "further-training": BEFORE},
        "Training example 3 has NaN in its outputs, which must be finite|are not finite",
        {"data": with_nan(3)},
    ),
    "late NaN": (ALL, IN_THE_MIDDLE, "has NaN in its|are not finite|with a finite gradient", {"data": with_nan(70)}),
    "model fails": (list(MODEL), BEFORE, "RuntimeError: out of luck", {"kind": Failing}),
    "model fails later": (MODEL, MODEL, "RuntimeError: out of luck", {"kind": FailingLater}),
    "out of memory": (MODEL, MODEL, "OutOfMemoryError: CUDA out of memory", {"kind": OutOfMemory}),
    "logger fails": (ALL, None, "ConnectionError: the server does not answer", {"logger": True}),
    "no learning rate": (["tracin"], "at step 2", "learning rates are not finite", {"kind": NoRate}),
    "other strategy": (ALL, BEFORE, "a model that EngineStrategy holds in Engine", {"strategy": EngineStrategy}),
}


@pytest.mark.parametrize(("wrong", "name"), [(wrong, name) for wrong in WRONG for name in WRONG[wrong][0]])
def test_what_goes_wrong_stops_the_callback_alone(wrong, name, tmp_path, monkeypatch, caplog):
    _, when, message, how = WRONG[wrong]
    when = when[name] if isinstance(when, dict) else when or ""
    how = {"kind": Restless, "data": DATA} | how
    kind, data = how.pop("kind"), how.pop("data")
    options = {"logger": Deaf(tmp_path)} if how.pop("logger", False) else {}
    strategy = how.pop("strategy", SingleDeviceStrategy)
    expected = fit_without(tmp_path, kind, data, strategy=strategy(device="cpu"), **options)
    options["strategy"] = strategy(device="cpu")
    how |= how.pop("at", lambda *_: None)(tmp_path, monkeypatch) or {}
    callback = often(name, **how)
    caplog.set_level(logging.DEBUG, guard.__name__)
    message = f"{NAMES[name]} stopped {when}.*; training goes on without it. .*{message}"
    with pytest.warns(UserWarning, match=message) as warned:
        model, trainer, witness = fit(tmp_path, kind, callback, data=data, **options)
    assert_same(witness, expected)
    assert trainer.global_step == NUM_STEPS
    assert len([one for one in warned if "stopped" in str(one.message)]) == 1
    assert is_untouched(model)
    # The end says it again, and which records there are; the traceback is for who asks.
    last = [text for text in caplog.messages if "stopped" in text and "max_epochs" not in text][-1]
    written = [path.name for path in callback.records]
    assert last.startswith(f"{NAMES[name]} stopped {when}")
    assert last.endswith(f"it wrote {', '.join(written)} in {callback.dirpath}." if written else "It wrote no record.")
    assert [record.exc_info is not None for record in caplog.records if record.name == guard.__name__] == [True]
    assert [read_record(path).path for path in callback.records] == find_records(callback.dirpath)
    # And the next fit of the same callback begins anew.
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"][callback.state_key]
    often(name).load_state_dict(state)


def test_an_error_that_outlives_the_stop_changes_nothing_when_it_goes(tmp_path):
    """Reading that was left in the middle would put back the random state of its own time."""
    error = RuntimeError("out of luck")

    class Reader(CALLBACKS["stride"][0]):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with self.working(trainer, pl_module):
                self.read()

        def read(self):
            batches = self._watched.examples.batches(4, torch.device("cpu"))
            next(batches)
            raise error

    class Dropping(Restless):
        def training_step(self, batch, batch_idx):
            if self.global_step == 6:
                error.__traceback__ = None
                gc.collect()
            return super().training_step(batch, batch_idx)

    expected = fit(tmp_path, Dropping)[-1]
    with pytest.warns(UserWarning, match="Reader stopped at step 1"):
        witness = fit(tmp_path, Dropping, Reader(task=Classification()))[-1]
    assert_same(witness, expected)


@every_callback
def test_a_fit_resumed_after_a_stop_writes_again(name, tmp_path, monkeypatch):
    keep = partial(ModelCheckpoint, tmp_path / "kept", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    how = {"enable_checkpointing": True}
    monkeypatch.setattr(records, "write_file", no_space)
    with pytest.warns(UserWarning, match="stopped at step"):
        fit(tmp_path, Restless, often(name), keep(), **how)
    monkeypatch.undo()
    monkeypatch.delenv(guard.RAISE)
    resumed, path = often(name), tmp_path / "kept" / "step=5.ckpt"
    fit(tmp_path, Restless, resumed, keep(), ckpt_path=path, **how)
    steps = sorted({read_record(path).info["step"] for path in resumed.records})
    assert steps == ([10] if name == "further-training" else [6, 8, 10])


@every_callback
def test_a_state_that_cannot_be_read_stops_the_callback_alone(name, tmp_path):
    how = {"enable_checkpointing": True, "ckpt_path": tmp_path / "old.ckpt"}
    _, trainer, _ = fit(tmp_path, Restless, often(name), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt")
    (key,) = checkpoint["callbacks"]
    checkpoint["callbacks"][key] = {"steps": 3}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    expected = fit(tmp_path, Restless, **how)[-1]
    with pytest.warns(UserWarning, match=f"{NAMES[name]} stopped before the first step; .*KeyError: 'records'"):
        witness = fit(tmp_path, Restless, often(name), **how)[-1]
    assert_same(witness, expected)


@every_callback
def test_hooks_of_subclasses_are_guarded_too(name, tmp_path):
    kind, needed = CALLBACKS[name]
    needed = needed | ({"task": Classification()} if name == "stride" else {})

    class Mine(kind):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            raise ZeroDivisionError("mine")

        def state_dict(self):
            return {"ratio": 1 / 0}

    expected = fit_without(tmp_path, Restless)
    mine = Mine(*[classification_data(2)] * (name == "further-training"), **needed)
    with pytest.warns(UserWarning, match=r"Mine stopped at step 5; .*ZeroDivisionError: mine \(.*py:\d+\)") as warned:
        _, trainer, witness = fit(tmp_path, Restless, mine)
    assert_same(witness, expected)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.load(tmp_path / "end.ckpt")["callbacks"] == {}
    assert len([one for one in warned if "stopped" in str(one.message)]) == 1


def test_where_warnings_are_errors_the_log_has_it(tmp_path, caplog):
    _, trainer, _ = fit(tmp_path, Classifier, often("stride", layers=["network.9"]))
    assert trainer.global_step == NUM_STEPS
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "StrideCallback stopped before the first step" in error.getMessage()


def test_the_error_itself_is_raised_on_demand(tmp_path, monkeypatch):
    monkeypatch.setenv(guard.RAISE, "1")
    with pytest.raises(RuntimeError, match=r"^out of luck$"):
        fit(tmp_path, Failing, often("stride"))
    with pytest.raises(ValueError, match=r"failed on a batch.*RuntimeError: out of luck"):
        fit(tmp_path, Failing, often("further-training"))


def test_lazy_layers_would_be_made_by_the_callback(tmp_path):
    class Lazy(Classifier):
        def __init__(self):
            super().__init__()
            self.network[0] = nn.LazyLinear(8)

    expected = fit(tmp_path, Lazy)[-1]
    with pytest.warns(UserWarning, match="StrideCallback stopped before the first step; .*lazy layers.*Call the model"):
        witness = fit(tmp_path, Lazy, often("stride"))[-1]
    assert_same(witness, expected)


def test_the_queries_of_the_fits_own_data_module_do_not_set_it_up_again(tmp_path):
    class Data(L.LightningDataModule):
        def setup(self, stage):
            self.stage = stage

        def train_dataloader(self):
            return loader(DATA)

        def test_dataloader(self):
            return loader(classification_data(5), shuffle=False)

    data, callback = Data(), callback_of("further-training", queries=None or Data())
    callback.queries = data
    make_trainer(tmp_path, callback).fit(build(Classifier), data)
    assert callback.records
    assert data.stage == "fit"


# ---- what is not ours ----------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible():
    """Lightning ignores SIGINT once it has met one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Broken(Restless):
    """Its fourth training step fails."""

    is_fourth = False

    def on_train_batch_start(self, batch, batch_idx):
        self.is_fourth = self.global_step == 3

    def training_step(self, batch, batch_idx):
        if self.is_fourth:
            self.breaks()
        return super().training_step(batch, batch_idx)

    def breaks(self):
        raise RuntimeError("the user's own")


class Interrupted(Broken):
    def breaks(self):
        signal.raise_signal(signal.SIGINT)


@every_callback
@pytest.mark.parametrize("stopped", [False, True], ids=["working", "stopped"])
@pytest.mark.parametrize(("kind", "error"), [(Interrupted, SystemExit), (Broken, RuntimeError)])
def test_sigint_and_errors_of_the_module_are_as_without(name, kind, error, stopped, tmp_path, interruptible, caplog):
    """Also where the callback has stopped by then."""
    seen = []
    for callbacks in ([], [often(name)]):
        if stopped and callbacks:
            callbacks[0].train_indices = [999]
        model, witness = build(kind), Witness()
        trainer = make_trainer(tmp_path, *callbacks, witness)
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        batches = DataLoader(Drawing(DATA), 16, shuffle=True, generator=torch.Generator().manual_seed(3))
        warns = pytest.warns(UserWarning, match="stopped before") if stopped and callbacks else nothing()
        with pytest.raises(error) as raised, warns:
            trainer.fit(model, batches)
        assert str(raised.value) == ("1" if kind is Interrupted else "the user's own")
        assert not [optimizer for optimizer in trainer.optimizers if optimizer._optimizer_step_post_hooks]
        assert hooks_of(model) == []
        signal.signal(signal.SIGINT, signal.default_int_handler)
        seen.append(witness)
    assert_same(*reversed(seen))
    assert seen[1].calls["on_exception"] == 1
    assert not [text for text in caplog.messages if "Callback stopped" in text]


@every_callback
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_in_the_callbacks_work_pass(name, error, tmp_path, monkeypatch, interruptible):
    def interrupted(*_):
        raise error

    monkeypatch.setattr(records, "write_file", interrupted)
    model, witness = build(Restless), Witness()
    trainer = make_trainer(tmp_path, often(name), witness)
    with pytest.raises(SystemExit):
        trainer.fit(model, DataLoader(Drawing(DATA), 16, generator=torch.Generator()))
    assert witness.calls["on_exception"] == 1
    assert is_untouched(model)


# ---- two processes ----------------------------------------------------------------------------------------------


class FailingHere(FailingLater):
    """Fails on one rank."""

    rank = 0

    def forward(self, x):
        self.fails = self.fails and torch.distributed.get_rank() == self.rank
        return super().forward(x)


class FailingHook(CALLBACKS["stride"][0]):
    """Fails on one rank outside its work, after the first epoch."""

    rank = 0

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        if torch.distributed.get_rank() == self.rank:
            raise RuntimeError("out of luck")


#: Whose failure, on which rank, and when.
ALONE = [
    ("stride", 1, "at once"),
    ("further-training", 0, "at once"),
    *((name, rank, "later") for name in ("stride", "further-training") for rank in (0, 1)),
    *((name, 0, "disk") for name in CALLBACKS),
    *(("stride", rank, "hook") for rank in (0, 1)),
]


def fit_on_two(number, port, folder):
    """Fits in which one rank fails alone; the last without a callback."""
    start(number, port)
    outcomes, write = {}, records.write_file
    for name, rank, moment in [*ALONE, (None, 0, "never")]:
        kind = type("Here", (FailingHere,), {"rank": rank, "from_step": {"at once": 0, "later": 3}.get(moment, 10**6)})
        records.write_file = no_space if (moment, number) == ("disk", 0) else write
        callbacks = [] if name is None else [often(name, dirpath=folder / f"{name}{rank}{moment}")]
        if moment == "hook":
            callbacks[0].__class__ = type("StrideCallback", (FailingHook,), {"rank": rank})
        witness, model = Witness(), build(kind)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        torch.manual_seed(0)
        # A rank that waits for one that has gone fails the test instead of waiting for ever.
        strategy = DDPStrategy(timeout=timedelta(seconds=60))
        trainer = make_trainer(folder, *callbacks, witness, strategy=strategy, devices=2)
        batches = DataLoader(Drawing(DATA), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(model, batches)
        outcomes[name, rank, moment] = {
            "said": [text for text in (str(one.message) for one in caught) if "stopped" in text],
            "off": [callback._problem for callback in callbacks],
            "seen": witness.seen,
            "calls": witness.calls,
            "untouched": is_untouched(model),
        }
    torch.save(outcomes, folder / f"rank{number}.pt")


@pytest.mark.distributed
def test_one_rank_that_fails_turns_the_callback_off_on_both(tmp_path):
    first, second = run_two(fit_on_two, tmp_path)
    error = {"disk": "No space left on device"}
    for name, rank, moment in ALONE:
        case = name, rank, moment
        for outcomes in (first, second):
            assert outcomes[case]["seen"] == outcomes[None, 0, "never"]["seen"], case
            assert outcomes[case]["calls"] == outcomes[None, 0, "never"]["calls"], case
            assert outcomes[case]["untouched"], case
        (said,) = first[case]["said"]
        assert second[case]["said"] == []
        assert NAMES[name] in said
        assert error.get(moment, "RuntimeError: out of luck") in said
        assert ("Rank 1 failed: " in said) is (rank == 1), case
        (mine,), (theirs,) = first[case]["off"], second[case]["off"]
        assert mine
        assert ("Rank 0 failed: " in theirs) is (rank == 0), case
