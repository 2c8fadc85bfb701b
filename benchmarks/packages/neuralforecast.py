"""N-HiTS on 12 series: series are examples, and training_step draws windows of them."""

import logging

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset, TimeSeriesLoader

REQUIREMENTS = ["neuralforecast"]


def frame(count, seed):
    random = np.random.default_rng(seed)
    parts = []
    for series in range(count):
        time = np.arange(20)
        value = np.sin(time / 3 + series) + 0.1 * random.standard_normal(20)
        parts.append(pd.DataFrame({"unique_id": f"{series:02d}", "ds": time, "y": value}))
    return pd.concat(parts, ignore_index=True)


def make(callbacks, folder):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    queries = TimeSeriesDataset.from_df(frame(5, 1))[0]
    model = NHITS(
        h=4,
        input_size=8,
        stack_types=["identity"],
        n_blocks=[1],
        mlp_units=[[16, 16]],
        n_pool_kernel_size=[2],
        n_freq_downsample=[1],
        windows_batch_size=256,
        batch_size=6,
        max_steps=4,
        callbacks=callbacks(queries),
        accelerator="cpu",
        default_root_dir=str(folder),
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    return NeuralForecast(models=[model], freq=1), queries


def train(callbacks, folder):
    forecast, queries = make(callbacks, folder)
    forecast.fit(frame(12, 0))
    return {
        "module": forecast.models[0],
        "train_data": TimeSeriesDataModule(forecast.dataset, batch_size=6),  # added
        "queries": queries,
        # The package takes the Trainer away from its module, and with it the place of the records.
        "options": lambda method: {"record": folder.parent / "tracin"} if method == "tracin" else {},  # added
        "ckpt_path": next((folder / "checkpoints").glob("*.ckpt")),
    }


def load(ckpt_path, folder):
    forecast, queries = make(lambda queries: [], folder)
    data = TimeSeriesDataModule(TimeSeriesDataset.from_df(frame(12, 0))[0], batch_size=6)
    return {
        "module": forecast.models[0],
        "train_data": data,
        "queries": queries,
        "options": {"weights_only": False},
    }


def batch_of(data, places, is_query):
    dataset = data if is_query else data.dataset
    loader = TimeSeriesLoader(dataset)
    return loader.collate_fn([dataset[place] for place in places])
