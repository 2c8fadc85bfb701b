"""Fits whose weights are spread over two processes: their records, and attribution of what they leave."""

import os
import pickle
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from stride_lightning import FurtherTrainingCallback, StrideCallback, TracInCallback, attribute, further_train
from stride_lightning.callbacks import guard
from stride_lightning.model import sharded
from stride_lightning.model.checkpoints import load_checkpoint
from stride_lightning.model.sharded import is_sharded, whole
from stride_lightning.model.weights import state_hash, weight_hash
from stride_lightning.storage.records import find_records, read_info, read_record
from tests.helpers.models import Classifier, Validated, build, classification_data, make_trainer
from tests.helpers.processes import run_two, start

DATA, QUERIES = classification_data(48), classification_data(5, seed=1)
#: Examples of one step, over all processes.
STEP = 16
LEFT_OUT = [3, 20, 41]
#: Relative to the largest score. Rounding, everywhere.
TOLERANCE = 1e-4


class FSDP2(Validated):
    """Its root, which holds the last layer, leaves whole weights in their places after a validation epoch."""

    def configure_model(self):
        for layer in (self.network[0], self):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class TensorParallel(Classifier):
    def configure_model(self):
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)


class FSDPOnCPU(FSDPStrategy):
    """Lightning refuses the strategy itself on CPUs."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


#: How to train: the module, its strategy, and the processes that see other batches.
KINDS = {
    "ddp": (Classifier, lambda: "ddp", 2),
    "fsdp2": (FSDP2, partial(ModelParallelStrategy, 2, 1), 2),
    "tensor parallel": (TensorParallel, partial(ModelParallelStrategy, 1, 2), 1),
    "fsdp": (Classifier, partial(FSDPOnCPU, auto_wrap_policy={nn.Linear}), 2),
}
METHODS = ("stride", "tracin", "further-training", "ekfac")


def callbacks(folder):
    return [
        StrideCallback(folder / "stride", num_subsets=9, statistics_every_n_steps=2, every_n_epochs=1),
        TracInCallback(folder / "tracin"),
        FurtherTrainingCallback(QUERIES, dirpath=folder / "further", left_out=LEFT_OUT, num_seeds=2),
    ]


def fit(kind, folder, *watchers, strategy="auto", devices=1, replicas=1):
    """A fit whose steps are of the same examples, however many processes share them."""
    model = build(kind)
    trainer = make_trainer(folder, *watchers, strategy=strategy, devices=devices)
    rank = int(os.environ.get("RANK", "0")) % replicas
    sampler = DistributedSampler(DATA, replicas, rank, shuffle=False)  # Lightning's own would shuffle
    data = {"train_dataloaders": DataLoader(DATA, STEP // replicas, sampler=sampler)}
    if isinstance(model, Validated):
        data["val_dataloaders"] = DataLoader(QUERIES, 2)
    torch.manual_seed(0)
    trainer.fit(model, **data)
    return model, trainer


def scores(model, folder, *methods, **options):
    """Scores from the records of a fit, which attribution must use."""
    records, scored = {"stride": "stride", "tracin": "tracin", "further-training": "further"}, {}
    for method in methods:
        how = {"record": folder / records[method]} if method in records else {}
        data = {"train_data": DataLoader(DATA, STEP), "method": method, "show_progress": False}
        attribution = attribute(model, QUERIES, **data, **how, **options)
        assert method not in records or "given by the caller" in attribution.metadata["record_note"]
        scored[method] = attribution.scores
    return scored


def look_of(model):
    """What sharding makes of a model, and what a callback must leave so."""
    modules = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    return [modules, len(hooks), [(name, type(value), value.shape) for name, value in model.named_parameters()]]


def weights_of(model):
    with whole(model):
        return {name: value.clone() for name, value in model.state_dict().items()}


def fit_kind(name, folder):
    """A fit with callbacks and one without; what the records and the checkpoint of the first say in this process."""
    kind, strategy, replicas = KINDS[name]
    how = {"devices": 2, "replicas": replicas}
    folder = folder / name
    plain, _ = fit(kind, folder, strategy=strategy(), **how)
    watchers = callbacks(folder)
    model, trainer = fit(kind, folder, *watchers, strategy=strategy(), **how)
    results = {
        "launcher": type(trainer.strategy.cluster_environment).__name__,
        "sharded": is_sharded(model),
        "records": [list(map(str, watcher.records)) for watcher in watchers],
        "weights": weights_of(model),
        "expected weights": weights_of(plain),
        "same look": look_of(model) == look_of(plain),  # with all weights sharded, as a checkpoint leaves them, too
        "live": scores(model, folder, "ekfac", "stride"),
    }
    further = further_train(model, QUERIES, train_data=DataLoader(DATA, STEP), left_out=LEFT_OUT, num_seeds=2)
    results["further"] = further.effects()
    if name != "fsdp":  # torch frees what its full state on the CPU refers to
        path = folder / "end.ckpt"
        trainer.save_checkpoint(path)
        results["scores"] = scores(build(Classifier), folder, *METHODS, ckpt_path=path)
        results["best"] = scores(model, folder, "ekfac", ckpt_path=path)
    return results


def fit_without_room(folder, *, from_call):
    """A fit in which the whole model no longer has room in the second process."""
    free, calls = sharded.free_bytes, []

    def little_on_one(device):
        calls.append(device)
        return 10 if len(calls) >= from_call and torch.distributed.get_rank() == 1 else free(device)

    sharded.free_bytes, watchers = little_on_one, callbacks(folder)[:2]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kind, strategy, _ = KINDS["fsdp2"]
            model, _ = fit(kind, folder, *watchers, strategy=strategy(), devices=2, replicas=2)
    finally:
        sharded.free_bytes = free
    said = [text for text in (str(one.message) for one in caught) if "stopped" in text]
    return {"said": said, "off": [watcher._problem for watcher in watchers], "weights": weights_of(model)}


def fit_on_two(number, port, folder):
    """What each of two processes does, as if launchers had started it; rank r leaves its results in ``rank{r}.pt``."""
    start(number, port)
    os.environ |= {"RANK": str(number), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    results = {name: fit_kind(name, folder) for name in ("ddp", "fsdp2")}
    del os.environ["TORCHELASTIC_RUN_ID"]
    os.environ |= {"SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}
    os.environ |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    results |= {name: fit_kind(name, folder) for name in ("tensor parallel", "fsdp")}
    os.environ[guard.RAISE] = ""
    results["at once"] = fit_without_room(folder / "at once", from_call=1)
    results["later"] = fit_without_room(folder / "later", from_call=6)
    torch.save(results, folder / f"rank{number}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, run_two(fit_on_two, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training in one process: its folder, its model and the scores."""
    folder = tmp_path_factory.mktemp("one")
    model, _ = fit(Classifier, folder, *callbacks(folder))
    return folder, scores(model, folder, *METHODS)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE * other.abs().max().item())


every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.distributed
@every_kind
def test_the_fit_is_the_same_to_the_bit(both, kind):
    for results in both[1]:
        here = results[kind]
        assert here["sharded"] is (kind != "ddp")
        assert here["launcher"] == ("TorchElastic" if kind in ("ddp", "fsdp2") else "SLURM") + "Environment"
        assert here["same look"]
        assert all(value.equal(here["expected weights"][name]) for name, value in here["weights"].items())


@pytest.mark.distributed
@every_kind
def test_rank_zero_writes_records_of_the_whole_weights(both, kind):
    folder, (first, second) = both
    stride, tracin, further = (find_records(folder / kind / name) for name in ("stride", "tracin", "further"))
    assert first[kind]["records"] == [list(map(str, paths)) for paths in (stride, tracin, further)]
    assert second[kind]["records"] == [[], list(map(str, tracin)), []]
    assert [path.name for path in (*stride, *tracin, *further)] == ["step=3", "step=6"] * 2 + ["step=6"]
    hashes = {read_info(path)["weights"] for path in (stride[-1], tracin[-1], further[-1])}
    assert hashes == {state_hash(first[kind]["weights"])}
    model = build(Classifier)
    model.load_state_dict(first[kind]["weights"])
    assert hashes == {weight_hash(model)}
    if kind != "fsdp":
        assert hashes == {state_hash(load_checkpoint(folder / kind / "end.ckpt")["state_dict"])}
    assert set(read_info(tracin[-1])["learning_rates"].items()) == {(name, 0.1) for name in model.state_dict()}


@pytest.mark.distributed
@every_kind
def test_records_attribute_like_those_of_one_process(both, alone, kind):
    folder, (first, second) = both
    one_folder, expected = alone
    here = first[kind]
    for results in (key for key in ("scores", "live", "best") if key in here):
        for method, scored in here[results].items():
            assert scored.equal(second[kind][results][method])
            close(scored, expected[method])
    close(here["further"], expected["further-training"])
    model = build(Classifier)
    model.load_state_dict(here["weights"])
    for method, scored in scores(model, folder / kind, *METHODS).items():
        close(scored, expected[method])
    if kind == "tensor parallel":  # every process saw the batches that the one process saw
        (mine, theirs) = (
            read_record(path / "stride" / "step=6").tensors("statistics") for path in (folder / kind, one_folder)
        )
        for name, value in theirs.items():
            close(mine[name].double(), value.double())


@pytest.mark.distributed
@pytest.mark.parametrize("moment", ["at once", "later"])
def test_a_process_without_room_turns_callbacks_off_everywhere(both, moment):
    folder, (first, second) = both
    for results in (first, second):
        assert all(value.equal(results["fsdp2"]["weights"][name]) for name, value in results[moment]["weights"].items())
        assert all("which has 10 left" in problem for problem in results[moment]["off"])
    assert len(first[moment]["said"]) == 2  # one for each callback
    assert second[moment]["said"] == []
    assert len(find_records(folder / moment / "stride")) == (moment == "later")


def test_a_checkpoint_folder_whose_index_runs_code_is_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(os.getcwd))
    torch.save({}, tmp_path / "meta.pt")
    with pytest.raises(ValueError, match=r"cannot be read.*torch refuses it with weights_only=True"):
        load_checkpoint(tmp_path)
