"""Losses with random numbers: scores do not depend on batch size, order or process."""

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from stride_lightning import attribute

X = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))
DATA, QUERIES = TensorDataset(X[:40]), TensorDataset(X[40:44])


class Autoencoder(L.LightningModule):
    """A variational autoencoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def training_step(self, batch, batch_idx):
        mean, spread = self.encoder(batch[0]).chunk(2, -1)
        posterior = torch.distributions.Normal(mean, (spread / 2).exp())
        error = F.mse_loss(self.decoder(posterior.rsample()), batch[0], reduction="none").sum(1).mean()
        prior = torch.distributions.Normal(0.0, 1.0)
        return error + torch.distributions.kl_divergence(posterior, prior).sum(1).mean()


class Diffusion(L.LightningModule):
    """A step of denoising diffusion, which sometimes drops the condition."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, 8), nn.SiLU(), nn.Linear(8, 6))
        self.register_buffer("alphas", torch.linspace(0.99, 0.01, 50))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        t = torch.randint(0, 50, (x.shape[0],), device=x.device)
        alpha, noise = self.alphas[t][:, None], torch.randn_like(x)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        time = torch.where(torch.rand(len(x)) < 0.1, -1.0, t / 50)[:, None]
        return F.mse_loss(F.dropout(self.net(torch.cat([noisy, time], 1)), 0.1), noise)


@pytest.mark.parametrize("kind", [Autoencoder, Diffusion])
def test_scores_do_not_depend_on_the_batch_size(kind):
    torch.manual_seed(0)
    model = kind()
    options = {"train_data": DATA, "method": "grad-dot", "show_progress": False}
    scores = [attribute(model, QUERIES, batch_size=size, **options).scores for size in (64, 1, 7)]
    assert scores[0].abs().max() > 0
    for other in scores[1:]:
        assert (scores[0] - other).abs().max() <= 1e-5 * scores[0].abs().max()
    reverse = list(range(40))[::-1]
    turned = attribute(model, QUERIES, batch_size=7, train_indices=reverse, **options).scores
    torch.testing.assert_close(turned.flip(1), scores[0], rtol=0, atol=1e-5 * float(scores[0].abs().max()))
