"""Truth files: a data set, a model trained on it, and the losses of models retrained on random halves of it.

A ``.npz`` file holds the data, an MLP with one hidden layer (ReLU) trained on all of them (``p0..p3``) or a network of
two convolutions (``w_`` and the keys of its state dict), random subsets (``masks``, bit-packed) and the losses of the
queries under models retrained on those. The packages that are compared share this file: nothing here imports
stride_lightning.
"""

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset


def load(path):
    """The model, its training data and the queries."""
    truth = np.load(path)
    x, y, queries, labels = (torch.from_numpy(truth[k]) for k in ("x_train", "y_train", "x_test", "y_test"))
    train, asked = TensorDataset(x, y.long()), TensorDataset(queries, labels.long())
    if "p0" not in truth:
        model = convolutional()
        model.load_state_dict({key[2:]: torch.from_numpy(truth[key]) for key in truth.files if key.startswith("w_")})
        return model.eval(), train, asked
    width, hidden = truth["p0"].shape
    model = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, truth["p2"].shape[1]))
    weights = {"0.weight": "p0", "0.bias": "p1", "2.weight": "p2", "2.bias": "p3"}
    state = {name: torch.from_numpy(truth[key]) for name, key in weights.items()}
    model.load_state_dict(
        {name: value.T if name.endswith("weight") else value.flatten() for name, value in state.items()}
    )
    return model, train, asked


def convolutional():
    """A network for images of 28 x 28 in ten classes."""
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10))


def load_retrained(path):
    """Subsets ``(M, n)`` and the losses of the queries under models retrained on them."""
    truth = np.load(path)
    masks = torch.from_numpy(np.unpackbits(truth["masks"], axis=1)[:, : len(truth["x_train"])])
    return masks, torch.from_numpy(truth["losses"])
