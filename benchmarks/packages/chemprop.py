"""chemprop: a message-passing network on molecules, a regression as in its documentation (``notebooks/training``)."""

import lightning.pytorch as L
import numpy as np
from chemprop import data, featurizers, models, nn

REQUIREMENTS = ["chemprop"]

PARTS = ["C", "CC", "C(C)C", "O", "CO", "N(C)C", "c1ccccc1", "C1CCCCC1", "F", "Cl"]


def loaders():
    """A loader of 40 molecules, and one of 5; targets are standardised by those of training."""
    draws = np.random.default_rng(0)
    smiles = ["C" + "".join(f"C({PARTS[part]})" for part in draws.integers(10, size=3)) + "O" for _ in range(45)]
    targets = [[float(text.count("C") - 2 * text.count("O") + draws.normal())] for text in smiles]
    points = [data.MoleculeDatapoint.from_smi(text, target) for text, target in zip(smiles, targets, strict=True)]
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    train = data.MoleculeDataset(points[:40], featurizer)
    scaler = train.normalize_targets()
    test = data.MoleculeDataset(points[40:], featurizer)
    test.normalize_targets(scaler)
    train, test = (data.build_dataloader(each, batch_size=8, shuffle=each is train) for each in (train, test))
    return train, test, scaler


def train(callbacks, folder):
    train_loader, test_loader, scaler = loaders()
    unscale = nn.UnscaleTransform.from_standard_scaler(scaler)
    predictor = nn.RegressionFFN(input_dim=32, hidden_dim=32, output_transform=unscale)
    model = models.MPNN(nn.BondMessagePassing(d_h=32), nn.MeanAggregation(), predictor, batch_norm=True)
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=4,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks(test_loader),
    )
    trainer.fit(model, train_loader)
    return {"module": model, "train_data": train_loader, "queries": test_loader}


def load(ckpt_path, folder):
    train_loader, test_loader, _ = loaders()
    model = models.MPNN.load_from_checkpoint(ckpt_path)
    options = {"weights_only": False}  # added
    return {"module": model, "train_data": train_loader, "queries": test_loader, "options": options}
