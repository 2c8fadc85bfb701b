"""Loggers that note what they were given, and readers of what real ones wrote."""

import pytest


class WandbLike:
    """The part of a Weights & Biases logger that is used."""

    def __init__(self):
        self.calls = []
        self.experiment = object()

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", metrics, step))

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.calls.append((key, columns, data, step))

    def log_image(self, key, images, step=None, **kwargs):
        self.calls.append((key, images, step))


def read_events(logger):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return event_accumulator.EventAccumulator(logger.log_dir).Reload()
