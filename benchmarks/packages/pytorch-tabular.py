"""A feed-forward network with embeddings on a table: batches are dictionaries, classes are targets."""

import os

import numpy as np
import pandas as pd
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

REQUIREMENTS = ["pytorch_tabular", "requests"]


def frame(seed, count):
    random = np.random.default_rng(seed)
    table = pd.DataFrame({"height": random.standard_normal(count), "width": random.standard_normal(count)})
    table["colour"] = random.choice(["red", "green", "blue"], count)
    table["kind"] = np.where(table.height + (table.colour == "red") + 0.3 * random.standard_normal(count) > 0, "a", "b")
    return table


def make(folder):
    os.chdir(folder)  # where the package writes the number of its run
    tabular = TabularModel(
        data_config=DataConfig(target=["kind"], continuous_cols=["height", "width"], categorical_cols=["colour"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-8", learning_rate=0.01),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=8,
            max_epochs=2,
            accelerator="cpu",
            progress_bar="none",
            early_stopping=None,
            checkpoints=None,
            load_best=False,
            trainer_kwargs={"default_root_dir": str(folder), "enable_model_summary": False},
        ),
        verbose=False,
    )
    datamodule = tabular.prepare_dataloader(train=frame(0, 40), validation=frame(1, 5), seed=0)
    return tabular, tabular.prepare_model(datamodule), datamodule


def train(callbacks, folder):
    tabular, module, datamodule = make(folder)
    queries = datamodule.val_dataloader()
    tabular.train(module, datamodule, callbacks=callbacks(queries))
    return {"module": module, "train_data": datamodule.train_dataloader(), "queries": queries}


def load(ckpt_path, folder):
    _, module, datamodule = make(folder)
    return {
        "module": module,
        "train_data": datamodule.train_dataloader(),
        "queries": datamodule.val_dataloader(),
        "options": {"weights_only": False},
    }


def batch_of(loader, places, is_query):
    # The metrics in training_step cannot take a single example: twice the same has the same mean.
    places = places * 2 if len(places) == 1 else places
    return loader.collate_fn([loader.dataset[place] for place in places])
