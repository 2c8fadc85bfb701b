"""Tasks of language models: batches of token ids, with attention masks and labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from typing_extensions import override

from stride_lightning.runtime.checks import RowError
from stride_lightning.tasks import texts
from stride_lightning.tasks.dense import IGNORED, ClassesOfPlaces, Reduction, first_row, labels_and_weights
from stride_lightning.tasks.likelihoods import HOW_TO_PASS_TASK, Classification, describe

#: Items of a batch that the model does not read.
_TARGETS = ("labels", "label", "loss_weights")
#: Items that packing kernels read; batches are unpacked.
_PACKING = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class _TokenTask(Classification):
    """The batches of both tasks: dictionaries with ``input_ids``, or a tensor of token ids."""

    has_padding: ClassVar[bool] = True

    @override
    def inputs(self, batch: Any) -> dict[str, Any]:
        ids = texts.token_ids(batch)
        if not isinstance(batch, Mapping):
            return {"input_ids": ids}
        inputs = {name: value for name, value in batch.items() if name not in _TARGETS}
        if not texts.is_packed(batch):
            return inputs
        packed = {name: value for name, value in inputs.items() if name not in _PACKING}
        packed["attention_mask"] = torch.ones_like(ids)
        return {name: texts.unpack(value, batch["position_ids"], 0) for name, value in packed.items()}

    @override
    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        try:
            return texts.logits_of(model, inputs)
        except IndexError as error:  # from a table of embeddings, in a model that does not say how long it is
            row = next((row for row in range(len(inputs["input_ids"])) if _is_too_much(model, inputs, row)), None)
            if row is None:
                raise
            ids = inputs["input_ids"][row]
            raise RowError(
                row,
                f"has {len(ids)} tokens with ids up to {int(ids.max())}, and the model has no embedding for one of "
                f"them or its position ({error}). Check the tokenizer, and how long a text may be",
            ) from error

    @override
    def check_batch(self, model: nn.Module, batch: Any) -> None:
        inputs = self.inputs(batch)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise TypeError(
                f"Expected an attention_mask of shape {tuple(ids.shape)} as input_ids, got {describe(mask)}."
            )
        lengths = torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1).cpu()
        if int(lengths.min()) == 0:
            raise RowError(
                int(lengths.argmin()), "has no tokens: its text is empty, or all of it is padding. Leave it out"
            )
        if mask is not None and "position_ids" not in inputs and not mask[:, 0].all() and texts.counts_positions(model):
            warnings.warn(
                "Texts are padded on the left, and this model counts positions from the padding on: other padding is "
                "another text to it. Pad on the right, or give `position_ids`.",
                stacklevel=2,
            )
        size, limit = texts.vocabulary_size(model), texts.max_length(model)
        if (row := first_row(ids < 0)) is not None:
            raise RowError(
                row,
                f"has the token id {int(ids[row].min())}, and ids are not negative. Mark padding by an attention_mask, "
                "and by labels of -100",
            )
        if size is not None and (row := first_row(ids >= size)) is not None:
            raise RowError(
                row,
                f"has the token id {int(ids[row].max())}, and the model knows 0..{size - 1}: the tokenizer is not the "
                "one it was trained with",
            )
        if limit is not None and ids.shape[1] > limit:
            row = int(lengths.argmax())
            raise RowError(
                row,
                f"has {int(lengths[row])} tokens (its batch {ids.shape[1]} with padding), and the model takes {limit}: "
                "truncate the text, or cut it into several examples",
            )


class CausalLanguageModeling(_TokenTask, ClassesOfPlaces):
    """Next-token prediction: an example is a sequence, its loss the mean over its tokens.

    Batches are as Hugging Face's models take them, dictionaries with ``input_ids`` of shape ``(B, T)`` and perhaps
    ``attention_mask`` and ``labels``, where -100 marks tokens that are not predicted. Labels stand beside the token
    that they are (the shift is done here) and are ``input_ids`` by default. Tokens that the mask hides never count.
    ``loss_weights`` of shape ``(B, T)`` weighs the loss of each label. Padding changes nothing; on the left a model of
    absolute positions, such as GPT-2, needs ``position_ids`` for that. Packing changes nothing either: one row of
    concatenated sequences with ``position_ids`` that start again at 0, as ``DataCollatorWithFlattening`` makes them, is
    unpacked first.

    A batch ``(ids, next_ids)``, as plain PyTorch code has it, is read as already shifted. Labels that are not the
    tokens they should be are refused: masked tokens and classes of tokens are other tasks.

    Args:
        reduction: ``"mean"`` over the tokens of a sequence, or their ``"sum"``.
        shifted: Whether labels stand one place ahead of their token; by default in tuples, not in dictionaries.
        normalised: Whether training takes the mean over all tokens of a batch: with the reduction ``"sum"`` each text
            then counts by its number of tokens, over the mean number in the training set.

    Example:
        >>> task = CausalLanguageModeling()
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
        >>> encoded = task.encode(task.targets(batch), num_outputs=8)
        >>> task.loss(torch.zeros(1, 3, 8), encoded)  # log 8
        tensor([2.0794])
    """

    name = "causal language modeling"
    has_tokens: ClassVar[bool] = True

    def __init__(self, reduction: Reduction = "mean", *, shifted: bool | None = None, normalised: bool = False) -> None:
        super().__init__(reduction, normalised=normalised)
        self.shifted = shifted

    @override
    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        logits, ids = super().outputs(model, inputs), inputs["input_ids"]
        if logits.ndim == 3 and logits.shape[:2] != ids.shape:
            raise TypeError(
                f"{type(model).__name__} gave logits of shape {tuple(logits.shape)} for token ids of shape "
                f"{tuple(ids.shape)}, and every token needs a row of logits. Some models predict the next token alone "
                f"where they get no labels. {HOW_TO_PASS_TASK}"
            )
        return logits

    @override
    def targets(self, batch: Any) -> Tensor:
        """The label that each output predicts and its weight, float32 of shape ``(B, T, 2)``; exact for 2^24 labels."""
        ids, named = texts.token_ids(batch), batch if isinstance(batch, Mapping) else {}
        labels, weights, mask = (named.get(name) for name in ("labels", "loss_weights", "attention_mask"))
        if isinstance(batch, tuple | list) and len(batch) > 1:
            if len(batch) > 2:
                raise TypeError(
                    f"Expected a batch (ids, next_ids), got {describe(batch)}: name its items in a dictionary."
                )
            labels = batch[1]
        for name, value in (("labels", labels), ("loss_weights", weights)):
            if value is not None and (not isinstance(value, Tensor) or value.shape != ids.shape):
                raise ValueError(
                    f"Expected {name} of the shape of input_ids, {tuple(ids.shape)}; got {describe(value)}."
                )
        is_shifted = not isinstance(batch, Mapping) if self.shifted is None else self.shifted
        if labels is None:
            labels, is_shifted = ids, False
        else:
            _check_labels(ids, labels, is_shifted=is_shifted)
        weights = torch.ones(labels.shape, device=ids.device) if weights is None else weights.float()
        weights = weights.masked_fill(labels == IGNORED, 0)
        mask = torch.ones_like(ids) if mask is None else mask
        if texts.is_packed(named):
            labels, weights, mask = (texts.unpack(value, named["position_ids"], 0) for value in (labels, weights, mask))
        if not is_shifted:
            # Padding is not predicted, and the first token is not predicted from padding. The last predicts nothing.
            weights = F.pad(weights[:, 1:] * mask[:, 1:] * mask[:, :-1], (0, 1))
            labels = F.pad(labels[:, 1:], (0, 1))
        return labels_and_weights(labels, weights)

    @override
    def check_counted(self, weights: Tensor) -> None:
        if (row := first_row(~(weights.sum(1, keepdim=True) > 0))) is not None:
            raise RowError(
                row,
                "has no token to predict: it needs at least two tokens, and a label other than -100 after the first "
                "(was the answer truncated?)",
            )

    @override
    def problem_of_label(self, label: int, num_outputs: int) -> str:
        return (
            f"has the label {label}; the model predicts 0..{num_outputs - 1}. Is the tokenizer that of the model? "
            "Labels of tokens not to predict are -100"
        )

    @override
    def margin(self, outputs: Tensor, encoded: Tensor) -> Tensor:
        raise ValueError("A sequence has no margin, only its tokens have.")

    @override
    def predict(self, outputs: Tensor) -> Tensor:
        raise ValueError(
            "target='predicted' is not for language models, whose prediction is a text. Let the model generate, and "
            "pass prompt and continuation as a query whose prompt has the labels -100."
        )

    @override
    def settings(self) -> list[str]:
        reduction, *others = super().settings()
        return [reduction, *([] if self.shifted is None else [f"shifted={self.shifted}"]), *others]


class TokenClassification(_TokenTask, ClassesOfPlaces):
    """A class for each token of a text, or the words behind its masks: the loss is the mean, or the sum, over tokens.

    Batches are dictionaries with ``input_ids``, perhaps ``attention_mask``, and ``labels`` beside their tokens, where
    -100 marks those that do not count. Arguments are those of :class:`CausalLanguageModeling`.

    Example:
        >>> task = TokenClassification()
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 1, 0]])}
        >>> task.loss(torch.zeros(1, 3, 2), task.encode(task.targets(batch), num_outputs=2))  # log 2
        tensor([0.6931])
    """

    name = "token classification"

    @override
    def targets(self, batch: Any) -> Tensor:
        ids, labels = texts.token_ids(batch), batch["labels"]
        if not isinstance(labels, Tensor) or labels.shape != ids.shape or labels.is_floating_point():
            raise ValueError(f"Expected labels of the shape of input_ids, {tuple(ids.shape)}; got {describe(labels)}.")
        if texts.is_packed(batch):
            raise TypeError(f"Packed texts have no classes of tokens here. {HOW_TO_PASS_TASK}")
        return labels_and_weights(labels, labels != IGNORED)


class SequenceClassification(_TokenTask):
    """One class for a whole text: dictionaries with ``input_ids``, ``attention_mask`` and ``labels`` of shape ``(B,)``.

    Example:
        >>> task = SequenceClassification()
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([1])}
        >>> task.loss(torch.zeros(1, 2), task.encode(task.targets(batch), num_outputs=2))  # log 2
        tensor([0.6931])
    """

    name = "sequence classification"

    @override
    def targets(self, batch: Any) -> Tensor | None:
        if not isinstance(batch, Mapping):
            return Classification.targets(self, batch)
        return batch.get("labels", batch.get("label"))


def _check_labels(ids: Tensor, labels: Tensor, *, is_shifted: bool) -> None:
    """Refuse labels that are not the tokens at their places, or one ahead if shifted."""
    stand, other = "beside their tokens", "one place ahead: pass task=CausalLanguageModeling(shifted=True)"
    if is_shifted:
        labels, ids = labels[:, :-1], ids[:, 1:]
        stand, other = "one place ahead of their tokens", "beside them: pass task=CausalLanguageModeling(shifted=False)"
    if (row := first_row((labels != IGNORED) & (labels != ids))) is not None:
        raise RowError(
            row,
            f"has labels that are not its input_ids. Labels are expected {stand}; if they stand {other}. Masked "
            "language models and classes of tokens are not supported",
        )


def _is_too_much(model: nn.Module, inputs: Mapping[str, Any], row: int) -> bool:
    """Whether a model looks up an embedding that does not exist for one row of a batch."""
    size = len(inputs["input_ids"])

    def cut(value: Any) -> Any:
        is_cut = isinstance(value, Tensor) and value.ndim > 0 and len(value) == size
        return value[row : row + 1] if is_cut else value

    try:
        texts.logits_of(model, pytree.tree_map(cut, dict(inputs)))
    except IndexError:
        return True
    return False
