"""Results that are one record on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Self

from stride_lightning.runtime.distributed import barrier, broadcast_object, rank
from stride_lightning.storage.records import Record, RecordError, read_record, write_record


def write_once(path: str | Path, info: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a record on rank 0; all ranks learn where it is, which may be another version of the name."""
    path = Path(path)
    if rank() == 0:
        path = write_record(path.parent, path.name, info, tensors)
    barrier()
    return broadcast_object(path)


class Stored(ABC):
    """Plain values and tensors that are saved into one folder, and read from it again."""

    #: Kind of its records, and their group of tensors.
    kind: ClassVar[str]
    group: ClassVar[str]
    #: Plain values that say how the result was made.
    metadata: dict[str, Any]

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """Plain values to store; ``"kind"`` among them."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Tensors to store."""

    @classmethod
    @abstractmethod
    def from_contents(cls, info: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The result that :meth:`info` and :meth:`tensors` describe."""

    def save(self, path: str | Path) -> Path:
        """Write everything into one folder, all or nothing; where one exists, the new folder gets a version."""
        return write_once(path, self.info(), {self.group: self.tensors()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote; every byte is checked.

        Raises:
            FileNotFoundError: If there is nothing.
            RecordError: If it is damaged or something else.
        """
        return cls.from_record(read_record(path))

    @classmethod
    def from_record(cls, record: Record) -> Self:
        """The result in a record that is open already."""
        if record.info.get("kind") != cls.kind:
            raise RecordError(
                f"{record.path} holds a {record.info.get('kind')!r} record, not a {cls.kind!r} record. Read it with "
                "load() of the class that wrote it."
            )
        return cls.from_contents(record.info, record.tensors(cls.group))
