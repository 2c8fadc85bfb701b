"""PyTorch Geometric: a classifier of graphs through ``LightningDataset``, as ``examples/pytorch_lightning/gin.py``."""

import lightning.pytorch as L
import torch
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningDataset
from torch_geometric.nn import GIN, MLP, global_add_pool

REQUIREMENTS = ["torch_geometric"]


def graphs(num, seed):
    """Rings of random length with chords; the class is whether there are more than two chords."""
    draws = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(num):
        size, chords = (int(torch.randint(low, high, (), generator=draws)) for low, high in ((5, 10), (0, 5)))
        ring = torch.stack([torch.arange(size), (torch.arange(size) + 1) % size])
        edges = torch.cat([ring, torch.randint(size, (2, chords), generator=draws)], 1)
        label = torch.tensor([int(chords > 2)])
        made.append(Data(torch.randn(size, 4, generator=draws), torch.cat([edges, edges.flip(0)], 1), y=label))
    return made


class Model(L.LightningModule):
    """The module of the package's example."""

    def __init__(self, in_channels=4, out_channels=2, hidden_channels=16):
        super().__init__()
        self.gnn = GIN(in_channels, hidden_channels, num_layers=3, dropout=0.5, jk="cat")
        self.classifier = MLP([hidden_channels, hidden_channels, out_channels], norm="batch_norm", dropout=0.5)

    def forward(self, x, edge_index, batch):
        x = self.gnn(x, edge_index)
        return self.classifier(global_add_pool(x, batch))

    def training_step(self, data, batch_idx):
        y_hat = self(data.x, data.edge_index, data.batch)
        loss = F.cross_entropy(y_hat, data.y)
        self.log("train_loss", loss, batch_size=y_hat.size(0))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data_module():
    train, test = graphs(40, 0), graphs(5, 1)
    return LightningDataset(train, test_dataset=test, batch_size=8, num_workers=0)


def train(callbacks, folder):
    model, datamodule = Model(), data_module()
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=4,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks(datamodule),
    )
    trainer.fit(model, datamodule)
    return {"module": model, "train_data": datamodule, "queries": datamodule}


def load(ckpt_path, folder):
    datamodule = data_module()
    return {"module": Model.load_from_checkpoint(ckpt_path), "train_data": datamodule, "queries": datamodule}
