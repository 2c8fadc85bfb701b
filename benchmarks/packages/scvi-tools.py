"""scvi-tools: the variational autoencoder SCVI on counts of genes in cells, through ``SCVI.train`` and its own plan."""

import anndata
import numpy as np
import scvi

REQUIREMENTS = ["scvi-tools"]

NUM_TRAIN, NUM_QUERIES = 40, 5


def cells():
    """Counts of 30 genes in cells of three types, from two batches of a laboratory."""
    draws = np.random.default_rng(0)
    types = draws.integers(3, size=NUM_TRAIN + NUM_QUERIES)
    means = draws.gamma(2.0, 1.0, size=(3, 30))[types] * draws.uniform(0.5, 2, size=(len(types), 1))
    data = anndata.AnnData(draws.poisson(means).astype(np.float32))
    data.obs["batch"] = [f"batch {number}" for number in draws.integers(2, size=len(types))]
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    return data


def data_of(model):
    """The package's data module of the cells, and its loader of the cells to explain."""
    places = np.arange(NUM_TRAIN + NUM_QUERIES)
    split = [places[:NUM_TRAIN], places[:0], places[NUM_TRAIN:]]
    datamodule = scvi.dataloaders.DataSplitter(model.adata_manager, external_indexing=split, batch_size=16)
    queries = scvi.dataloaders.AnnDataLoader(model.adata_manager, indices=split[2], batch_size=16)
    return split, datamodule, queries


def train(callbacks, folder):
    scvi.settings.seed = 0
    model = scvi.model.SCVI(cells(), n_hidden=16, n_latent=4)
    split, _, queries = data_of(model)
    model.train(
        max_epochs=5,
        batch_size=16,
        accelerator="cpu",
        datasplitter_kwargs={"external_indexing": split},
        plan_kwargs={"n_epochs_kl_warmup": 10},
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=callbacks(queries),
    )
    model.save(str(folder / "model"), overwrite=True)
    plan, datamodule = model.trainer.lightning_module, model.trainer.datamodule
    return {"module": plan, "train_data": datamodule, "queries": queries}


def load(ckpt_path, folder):
    model = scvi.model.SCVI.load(str(folder / "model"), cells(), accelerator="cpu")
    plan = scvi.train.TrainingPlan(model.module, n_epochs_kl_warmup=10)
    _, datamodule, queries = data_of(model)
    return {"module": plan, "train_data": datamodule, "queries": queries}


def batch_of(data, places, is_query):
    """The dataset of the package makes batches itself, from lists of positions."""
    loader = data if is_query else data.train_dataloader()
    return loader.collate_fn(loader.dataset[places])
