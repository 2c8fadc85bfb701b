"""A temporal fusion transformer on five series: windows are examples, the loss is that of quantiles."""

import lightning.pytorch as L
import numpy as np
import pandas as pd
from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer, TimeSeriesDataSet

REQUIREMENTS = ["pytorch-forecasting"]


def frame():
    random = np.random.default_rng(0)
    parts = []
    for series in range(5):
        time = np.arange(24)
        value = 3 + series + np.sin(time / 4 + series) + 0.2 * random.standard_normal(24)
        parts.append(pd.DataFrame({"series": str(series), "time": time, "value": value, "price": random.random(24)}))
    return pd.concat(parts, ignore_index=True)


def make():
    data = frame()
    train = TimeSeriesDataSet(
        data[data.time < 20],
        time_idx="time",
        target="value",
        group_ids=["series"],
        min_encoder_length=4,
        max_encoder_length=8,
        max_prediction_length=4,
        static_categoricals=["series"],
        time_varying_known_reals=["price"],
        time_varying_unknown_reals=["value"],
        add_relative_time_idx=True,
        add_encoder_length=True,
    )
    test = TimeSeriesDataSet.from_dataset(train, data, predict=True, stop_randomization=True)
    return train, train.to_dataloader(train=True, batch_size=8), test.to_dataloader(train=False, batch_size=8)


def train(callbacks, folder):
    dataset, loader, queries = make()
    module = TemporalFusionTransformer.from_dataset(
        dataset, learning_rate=0.01, hidden_size=8, attention_head_size=2, hidden_continuous_size=4, loss=QuantileLoss()
    )
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=callbacks(queries),
        gradient_clip_val=0.1,
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, queries)
    return {"module": module, "train_data": loader, "queries": queries}


def load(ckpt_path, folder):
    _, loader, queries = make()
    module = TemporalFusionTransformer.load_from_checkpoint(ckpt_path, weights_only=False)
    return {"module": module, "train_data": loader, "queries": queries, "options": {"weights_only": False}}
