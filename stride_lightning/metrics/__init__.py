"""How good scores are: metrics against retraining, against planted truth, and against other scores.

Each is a function of all data at once and a ``torchmetrics.Metric`` for batches and processes.
"""

from stride_lightning.metrics.counterfactual import CounterfactualScore, counterfactual_score
from stride_lightning.metrics.further_training import FurtherTrainingCosine, further_training_cosine
from stride_lightning.metrics.leave_one_out import LeaveOneOutCorrelation, leave_one_out_correlation
from stride_lightning.metrics.linear_datamodeling import (
    LinearDatamodelingScore,
    linear_datamodeling_interval,
    linear_datamodeling_score,
)
from stride_lightning.metrics.mislabel import MislabelDetection, mislabel_detection
from stride_lightning.metrics.overlap import TopKOverlap, top_k_overlap
from stride_lightning.metrics.retrieval import (
    MeanReciprocalRank,
    RetrievalRecall,
    mean_reciprocal_rank,
    retrieval_recall,
)

__all__ = [
    "CounterfactualScore",
    "FurtherTrainingCosine",
    "LeaveOneOutCorrelation",
    "LinearDatamodelingScore",
    "MeanReciprocalRank",
    "MislabelDetection",
    "RetrievalRecall",
    "TopKOverlap",
    "counterfactual_score",
    "further_training_cosine",
    "leave_one_out_correlation",
    "linear_datamodeling_interval",
    "linear_datamodeling_score",
    "mean_reciprocal_rank",
    "mislabel_detection",
    "retrieval_recall",
    "top_k_overlap",
]
