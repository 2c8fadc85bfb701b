"""N-BEATS on two series: windows are examples, in dataclasses with slots."""

import logging

import numpy as np
from darts import TimeSeries
from darts.models import NBEATSModel
from darts.utils.data import SequentialTorchTrainingDataset
from darts.utils.data.torch_datasets.utils import _batch_collate_fn_train

REQUIREMENTS = ["darts"]


def make(callbacks, folder):
    logging.getLogger("darts").setLevel(logging.ERROR)
    random = np.random.default_rng(0)
    time = np.arange(40)
    values = [np.sin(time / 3 + shift) + 0.1 * random.standard_normal(40) for shift in (0, 1)]
    series = [TimeSeries.from_values(value.astype(np.float32)) for value in values]
    chunks = {"input_chunk_length": 8, "output_chunk_length": 4}
    train = SequentialTorchTrainingDataset([each[:32] for each in series], **chunks)
    queries = SequentialTorchTrainingDataset([each[-14:] for each in series], **chunks)
    model = NBEATSModel(
        **chunks,
        num_stacks=2,
        num_layers=2,
        layer_widths=16,
        batch_size=8,
        n_epochs=2,
        random_state=0,
        work_dir=str(folder),
        pl_trainer_kwargs={
            "callbacks": callbacks(queries),
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    )
    return model, train, queries


def train(callbacks, folder):
    model, dataset, queries = make(callbacks, folder)
    model.fit_from_dataset(dataset, val_dataset=queries)
    model.save(str(folder / "darts.pt"), clean=True)
    return {"module": model.model, "train_data": model.trainer.datamodule, "queries": queries}


def load(ckpt_path, folder):
    _, dataset, queries = make(lambda queries: [], folder)
    model = NBEATSModel.load(str(folder / "darts.pt"))
    # The data module that fit_from_dataset() makes.
    data = model._setup_for_train(dataset, queries)["datamodule"]
    return {"module": model.model, "train_data": data, "queries": queries, "options": {"weights_only": False}}


def batch_of(data, places, is_query):
    dataset = data if is_query else data.train_dataset
    return _batch_collate_fn_train([dataset[place] for place in places])
