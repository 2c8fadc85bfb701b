"""The two kinds of readers and of batches: of a likelihood, and of a loss of the module's own."""

from __future__ import annotations

from stride_lightning.gradients.features import Batch, Reader
from stride_lightning.gradients.own_batch import OwnBatch
from stride_lightning.gradients.own_reader import OwnReader

AnyReader = Reader | OwnReader
AnyBatch = Batch | OwnBatch
