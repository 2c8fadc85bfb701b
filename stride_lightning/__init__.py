"""Training data attribution for PyTorch Lightning: which training examples made my model do this?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stride_lightning.attribution import Attribution as Attribution
    from stride_lightning.attribution import TopExamples as TopExamples
    from stride_lightning.attributors import Attributor as Attributor
    from stride_lightning.attributors import attribute as attribute
    from stride_lightning.callbacks.stride import StrideCallback as StrideCallback
    from stride_lightning.metrics.linear_datamodeling import linear_datamodeling_score as linear_datamodeling_score
    from stride_lightning.records import RecordError as RecordError
    from stride_lightning.steering.attributor import StrideAttributor as StrideAttributor
    from stride_lightning.steering.module import StrideModule as StrideModule
    from stride_lightning.tasks import BinaryClassification as BinaryClassification
    from stride_lightning.tasks import Classification as Classification
    from stride_lightning.tasks import Regression as Regression
    from stride_lightning.tasks import Task as Task

# Names are looked up on first use: importing Lightning takes seconds that a reader of records need not wait.
_HOMES = {
    "Attribution": "attribution",
    "Attributor": "attributors",
    "BinaryClassification": "tasks",
    "Classification": "tasks",
    "RecordError": "records",
    "Regression": "tasks",
    "StrideAttributor": "steering.attributor",
    "StrideCallback": "callbacks.stride",
    "StrideModule": "steering.module",
    "Task": "tasks",
    "TopExamples": "attribution",
    "attribute": "attributors",
    "linear_datamodeling_score": "metrics.linear_datamodeling",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*sorted(_HOMES), "__version__"]
