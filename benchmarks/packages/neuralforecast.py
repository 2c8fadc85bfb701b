"""N-HiTS on forty series: series are examples, and training_step draws windows of them."""

import logging

import numpy as np
import pandas as pd
import torch
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

REQUIREMENTS = ["neuralforecast"]


def frame(count, seed):
    random = np.random.default_rng(seed)
    parts = []
    for series in range(count):
        time = np.arange(20 + series % 5)
        value = np.sin(time / 3 + series) + 0.1 * random.standard_normal(len(time))
        parts.append(pd.DataFrame({"unique_id": f"{series:02d}", "ds": time, "y": value}))
    return pd.concat(parts, ignore_index=True)


def make(callbacks, folder):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    queries = TimeSeriesDataset.from_df(frame(5, 1))[0]
    model = NHITS(
        h=4,
        input_size=8,
        mlp_units=[[16, 16]] * 3,
        batch_size=8,
        max_steps=10,
        callbacks=callbacks(queries),
        accelerator="cpu",
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    return NeuralForecast(models=[model], freq=1), queries


def train(callbacks, folder):
    forecast, queries = make(callbacks, folder)
    forecast.fit(frame(40, 0))
    module = forecast.models[0]
    module.save(folder / "nhits.ckpt")
    data = TimeSeriesDataModule(forecast.dataset, batch_size=8)  # added
    return {"module": module, "train_data": data, "queries": queries, "ckpt_path": folder / "nhits.ckpt"}


def load(ckpt_path, folder):
    module = NHITS.load(ckpt_path)
    data = TimeSeriesDataModule(TimeSeriesDataset.from_df(frame(40, 0))[0], batch_size=8)
    return {"module": module, "train_data": data, "queries": TimeSeriesDataset.from_df(frame(5, 1))[0]}
