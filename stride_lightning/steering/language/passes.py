"""Training sequences read over and over: from a cache as far as it goes, then through the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from stride_lightning.data.examples import Examples
from stride_lightning.runtime.distributed import shard
from stride_lightning.runtime.progress import counting
from stride_lightning.steering.language.activation_cache import ActivationCache
from stride_lightning.steering.language.tokens import TokenBatch, TokenReader


class TrainingPasses:
    """Passes over this rank's share of the training sequences.

    Args:
        reader: Runs the model.
        train: All training sequences.
        lengths: Tokens that count of each, int64 of shape ``(n,)``.
        cache_dir: Folder for activations, so that later passes do not run the model.
        identity: As of an :class:`ActivationCache`.
    """

    def __init__(
        self,
        reader: TokenReader,
        train: Examples,
        lengths: Tensor,
        cache_dir: str | Path | None,
        identity: Mapping[str, Any],
    ) -> None:
        self.reader, self.train, self.share = reader, train, shard(len(train))
        num_probed = min(len(train), reader.rows_per_batch, 8)
        started = time.perf_counter()
        probe = next(iter(reader.batches(train, "", share=slice(0, num_probed))))
        self.seconds_per_sequence = (time.perf_counter() - started) / num_probed
        self.cache: ActivationCache | None = None
        if cache_dir is not None:
            folder = Path(cache_dir).expanduser() / f"sequences-{self.share.start}-{self.share.stop}"
            widths = {name: values.shape[-1] for name, values in reader.to_store(probe).items()}
            self.cache = ActivationCache(folder, identity, lengths[self.share], widths)

    def __len__(self) -> int:
        """Sequences of this rank."""
        return self.share.stop - self.share.start

    def within(self, places: slice) -> slice:
        """Where the sequences at some places stand in this rank's share."""
        return slice(places.start - self.share.start, places.stop - self.share.start)

    def __call__(self, description: str) -> Iterator[TokenBatch]:
        """Read the sequences once, in order."""
        if self.cache is None:
            yield from self.reader.batches(self.train, description, share=self.share)
            return
        first = self.share.start
        with counting(self.cache.done, description, show=self.reader.show_progress) as bar:
            for rows, stored, losses in self.cache.batches():
                yield self.reader.restored(slice(rows.start + first, rows.stop + first), stored, losses)
                bar.update(rows.stop - rows.start)
        rest = slice(first + self.cache.done, self.share.stop)
        for batch in self.reader.batches(self.train, description, share=rest):
            self.cache.write(self.within(batch.places), self.reader.to_store(batch), batch.losses)
            yield batch
