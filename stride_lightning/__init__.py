"""Training data attribution for PyTorch Lightning: which training examples made my model do this?"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stride_lightning.attribute import attribute as attribute
    from stride_lightning.attribute import methods as methods
    from stride_lightning.attribute import self_influence as self_influence
    from stride_lightning.attributor import Attributor as Attributor
    from stride_lightning.callbacks.further_training import FurtherTrainingCallback as FurtherTrainingCallback
    from stride_lightning.callbacks.stride import StrideCallback as StrideCallback
    from stride_lightning.callbacks.tracin import TracInCallback as TracInCallback
    from stride_lightning.evaluation.evaluate import evaluate as evaluate
    from stride_lightning.evaluation.tuning import DampingSearch as DampingSearch
    from stride_lightning.evaluation.tuning import tune_damping as tune_damping
    from stride_lightning.gradients.attributor import GradientAttributor as GradientAttributor
    from stride_lightning.information.attributor import InformationGainAttributor as InformationGainAttributor
    from stride_lightning.information.attributor import InformationLossAttributor as InformationLossAttributor
    from stride_lightning.information.index.on_disk import InformationIndex as InformationIndex
    from stride_lightning.information.index.retrieval import build_index as build_index
    from stride_lightning.information.index.retrieval import search_index as search_index
    from stride_lightning.metrics.linear_datamodeling import LinearDatamodelingScore as LinearDatamodelingScore
    from stride_lightning.metrics.linear_datamodeling import linear_datamodeling_score as linear_datamodeling_score
    from stride_lightning.results.attribution import Attribution as Attribution
    from stride_lightning.results.evaluation import Evaluation as Evaluation
    from stride_lightning.results.top_attribution import TopAttribution as TopAttribution
    from stride_lightning.results.top_examples import TopExamples as TopExamples
    from stride_lightning.retraining.attributors import FurtherTrainingAttributor as FurtherTrainingAttributor
    from stride_lightning.retraining.attributors import RetrainingAttributor as RetrainingAttributor
    from stride_lightning.retraining.effects import FurtherTraining as FurtherTraining
    from stride_lightning.retraining.further_training import further_train as further_train
    from stride_lightning.retraining.ground_truth import Counterfactual as Counterfactual
    from stride_lightning.retraining.ground_truth import GroundTruth as GroundTruth
    from stride_lightning.retraining.retrain import retrain as retrain
    from stride_lightning.retraining.retrain import retrain_without as retrain_without
    from stride_lightning.steering.attributor import StrideAttributor as StrideAttributor
    from stride_lightning.steering.module import StrideModule as StrideModule
    from stride_lightning.storage.records import RecordError as RecordError
    from stride_lightning.tasks.counts import PoissonRegression as PoissonRegression
    from stride_lightning.tasks.dense import DenseClassification as DenseClassification
    from stride_lightning.tasks.language import CausalLanguageModeling as CausalLanguageModeling
    from stride_lightning.tasks.language import SequenceClassification as SequenceClassification
    from stride_lightning.tasks.language import TokenClassification as TokenClassification
    from stride_lightning.tasks.likelihoods import BinaryClassification as BinaryClassification
    from stride_lightning.tasks.likelihoods import Classification as Classification
    from stride_lightning.tasks.likelihoods import Regression as Regression
    from stride_lightning.tasks.likelihoods import Task as Task
    from stride_lightning.tasks.own_loss import OwnLoss as OwnLoss

# Names are looked up on first use: importing Lightning takes seconds that a reader of records need not wait.
_FILES = {
    "attribute": ("attribute", "methods", "self_influence"),
    "attributor": ("Attributor",),
    "callbacks.further_training": ("FurtherTrainingCallback",),
    "callbacks.stride": ("StrideCallback",),
    "callbacks.tracin": ("TracInCallback",),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.tuning": ("DampingSearch", "tune_damping"),
    "gradients.attributor": ("GradientAttributor",),
    "information.attributor": ("InformationGainAttributor", "InformationLossAttributor"),
    "information.index.on_disk": ("InformationIndex",),
    "information.index.retrieval": ("build_index", "search_index"),
    "metrics.linear_datamodeling": ("LinearDatamodelingScore", "linear_datamodeling_score"),
    "results.attribution": ("Attribution",),
    "results.evaluation": ("Evaluation",),
    "results.top_attribution": ("TopAttribution",),
    "results.top_examples": ("TopExamples",),
    "retraining.attributors": ("FurtherTrainingAttributor", "RetrainingAttributor"),
    "retraining.effects": ("FurtherTraining",),
    "retraining.further_training": ("further_train",),
    "retraining.ground_truth": ("Counterfactual", "GroundTruth"),
    "retraining.retrain": ("retrain", "retrain_without"),
    "steering.attributor": ("StrideAttributor",),
    "steering.module": ("StrideModule",),
    "storage.records": ("RecordError",),
    "tasks.counts": ("PoissonRegression",),
    "tasks.dense": ("DenseClassification",),
    "tasks.language": ("CausalLanguageModeling", "SequenceClassification", "TokenClassification"),
    "tasks.likelihoods": ("BinaryClassification", "Classification", "Regression", "Task"),
    "tasks.own_loss": ("OwnLoss",),
}
_HOMES = {name: home for home, names in _FILES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*sorted(_HOMES), "__version__"]


class _Package(ModuleType):
    """Keeps ``stride_lightning.attribute`` the function: importing the file of that name would put the file there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
