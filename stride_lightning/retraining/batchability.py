"""Whether models of a kind can train together, and the reason if not."""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from stride_lightning.model.layers import is_of_checkpointing
from stride_lightning.model.weights import borrowed
from stride_lightning.retraining.ensemble import Call
from stride_lightning.retraining.modules import overridden, tree_of
from stride_lightning.retraining.optimizers import CannotBatch
from stride_lightning.runtime.checks import first_line
from stride_lightning.runtime.randomness import seeded
from stride_lightning.tasks.likelihoods import Task, columns

#: Hooks of a LightningModule that may change gradients or steps; only a Trainer calls them.
GRADIENT_HOOKS = (
    *("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad"),
)
#: All hooks by which it may change its training.
_HOOKS = (
    *GRADIENT_HOOKS,
    *("configure_callbacks", "lr_scheduler_step", "setup", "on_fit_start", "on_fit_end"),
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start"),
    *("on_train_batch_end", "on_train_epoch_end", "on_train_end"),
)
_CHECKPOINTING = "it runs activation checkpointing, which torch.func does not vectorise"


def _tolerance(value: Tensor) -> float:
    """Largest difference between two computations of the same number that counts as rounding."""
    return max(1e-3, 8 * torch.finfo(value.dtype).eps)


def vectorised_attention() -> AbstractContextManager[Any]:
    """Use the form of attention that ``torch.func`` vectorises everywhere; it holds for the whole process."""
    return sdpa_kernel(SDPBackend.MATH)


def check_hooks(model: nn.Module) -> None:
    """Refuse, by :class:`CannotBatch`, a model that changes its training by more than its loss."""
    if any(parameter._backward_hooks for parameter in model.parameters()) or any(
        module._backward_hooks or module._backward_pre_hooks for module in model.modules()
    ):
        raise CannotBatch("it has hooks on gradients")
    if tree_of(model) is None:
        return
    if not model.automatic_optimization:
        raise CannotBatch("it uses manual optimization (automatic_optimization=False)")
    if hooks := overridden(model, _HOOKS):
        raise CannotBatch(f"it has hooks that only a Trainer calls: {', '.join(hooks)}")


class OtherLoss(CannotBatch):
    """The reason why models do not train on a task's loss, so that only ``training_step`` knows theirs."""


def loss_factor(model: nn.Module, task: Task, batch: Any, prepared: tuple[Any, Tensor], num_batches: int = 64) -> float:
    """The factor between the task's mean loss and the loss that ``training_step`` returns.

    It is 1 for cross-entropy and 2 for ``mse_loss`` (the task's loss is half the squared error). Values and gradients
    are compared on the batch and on single examples, at the model's weights and at larger ones, where examples differ
    more; values are also compared for many values of ``batch_idx``. Every kind of example should occur in the batch;
    ``prepared`` are its inputs and encoded targets.

    Raises:
        OtherLoss: If there is no such factor: label smoothing, class weights, auxiliary losses.
    """
    if tree_of(model) is None:
        return 1.0
    size = len(prepared[1])
    parts = [list(range(size)), *([i] for i in range(min(4, size)) if size > 1)]
    numbers = range(0, num_batches, max(1, num_batches // 12))
    compared = [*enumerate(parts), *((number, parts[-1]) for number in numbers)]
    factor = None
    with tried_out(model), without_trainer(cast("L.LightningModule", model)):
        for scale in (1.0, 4.0):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():  # flags are parameters of some modules, too
                        parameter.mul_(scale)
            for number, rows in compared:
                (inputs, encoded), part = (_rows(value, rows, size) for value in (prepared, batch))
                try:
                    with seeded(0), torch.enable_grad():  # seeded for dropout
                        task_loss = task.loss(columns(task.outputs(model, inputs)), encoded).mean()
                except Exception as error:  # such as packed sequences, which cannot be cut
                    raise CannotBatch(f"it fails on a part of a batch ({first_line(error)})") from error
                try:
                    with seeded(0), torch.enable_grad():
                        step_loss = loss_of_step(model, part, number)
                except Exception as error:
                    raise OtherLoss(
                        f"its training_step cannot be called without a Trainer ({type(error).__name__}: {error})"
                    ) from error
                if scale > 1 and not torch.isfinite(task_loss):
                    continue
                if factor is None:
                    factor = _ratio(step_loss.detach(), task_loss.detach())
                with torch.enable_grad():
                    same = _same_loss(model, step_loss, task_loss * factor, gradients=len(rows) > 1)
                if not same:
                    raise OtherLoss(
                        f"its training_step returns another loss than the mean of the {task.name} loss over examples "
                        f"(does it have {'a mean over all tokens of the batch, ' if task.has_tokens else ''}label "
                        "smoothing, weights or auxiliary losses?)"
                    )
    assert factor is not None
    return factor


def _ratio(one: Tensor, other: Tensor) -> float:
    """One loss divided by another, without the rounding: factors are 1, 2 or 1 / noise_std^2."""
    ratio = float(one / other) if other else 1.0
    plain, rounding = float(f"{ratio:.3g}"), 20 * torch.finfo(other.dtype).eps
    return plain if abs(plain - ratio) < rounding * abs(ratio) else ratio


def _same_loss(model: nn.Module, one: Tensor, other: Tensor, *, gradients: bool) -> bool:
    """Whether two losses are equal up to rounding, and with ``gradients`` also their gradients in the parameters."""
    rounding = 8 * max(torch.finfo(one.dtype).eps, torch.finfo(other.dtype).eps)
    if not abs(one - other) <= max(2e-5, rounding) * max(abs(one), abs(other)) + rounding:
        return False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not gradients or not trained:
        return True
    if not (one.requires_grad and other.requires_grad):
        return False
    try:
        ones, others = (torch.autograd.grad(loss, trained, materialize_grads=True) for loss in (one, other))
    except RuntimeError as error:
        if is_of_checkpointing(error):
            raise CannotBatch(_CHECKPOINTING) from error
        raise
    largest = max(float(gradient.abs().max()) for gradient in others if gradient.numel())
    gaps = [float((a - b).abs().max()) for a, b in zip(ones, others, strict=True) if a.numel()]
    return max(gaps) <= max(1e-4, rounding) * largest + rounding


def mixed_places(kinds: Tensor | None, num_examples: int, size: int) -> Tensor:
    """Places of a batch with one example of each kind, as far as they fit, and further examples."""
    places = torch.randperm(num_examples, generator=torch.Generator().manual_seed(0))
    if kinds is not None:
        first_of: dict[float, int] = {}
        for place in places.tolist():
            first_of.setdefault(float(kinds[place]), place)
        one_of_each = torch.tensor(list(first_of.values())[: max(2, size // 2)])
        places = torch.cat([one_of_each, places[~torch.isin(places, one_of_each)]])
    return places[:size]


def check_separate(model: nn.Module, task: Task, inputs: Any, size: int) -> None:
    """Refuse, by :class:`CannotBatch`, a model that mixes the examples of a training batch, as BatchNorm does."""
    if size < 2:
        return
    half = list(range(size // 2))
    with tried_out(model), torch.no_grad():

        def first_half(rows: list[int]) -> Tensor:
            with seeded(0):
                return task.outputs(model, _rows(inputs, rows, size))[: len(half)]

        try:
            # With dropout, only batches of the same size draw the same masks.
            pairs = [[first_half(rows) for rows in (list(range(size)), [i % len(half) for i in range(size)])]]
            switch_dropout_off(model)
            if not _differs_by_seed(model, task, inputs):
                pairs.append([first_half(rows) for rows in (list(range(size)), half)])
        except Exception as error:
            raise CannotBatch(f"it fails on half a batch ({type(error).__name__}: {error})") from error
    for one, other in pairs:
        if one.shape != other.shape or not torch.allclose(one, other, rtol=_tolerance(one), atol=_tolerance(one) / 10):
            named = _named(model, nn.modules.batchnorm._BatchNorm)
            raise CannotBatch(f"in training mode an example's output depends on the others in its batch{named}")


def check_vectorises(
    model: nn.Module, task: Task, prepared: tuple[Any, Tensor], set_mode: Callable[[nn.Module], Any] = lambda _: None
) -> None:
    """Refuse, by :class:`CannotBatch`, a model that ``torch.func`` cannot vectorise, or only with wrong gradients.

    The test takes inputs and encoded targets of a training batch, in the modes that ``set_mode`` sets.
    """
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    call = Call(model, lambda model, batch: task.loss(columns(task.outputs(model, batch[0])), batch[1]))
    with tried_out(model), torch.enable_grad():
        set_mode(model)
        state = {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}

        def total(parameters: dict[str, Tensor]) -> Tensor:
            return call.with_weights({**state, **parameters}, prepared).sum()

        gradient = torch.func.grad(total)
        one = {name: state[name] for name in names}
        stacked = pytree.tree_map(lambda value: torch.stack([value, 0.9 * value]), one)
        try:
            with seeded(0):
                both = vmap(gradient, randomness="same")(stacked)
            with borrowed(model, None, None), torch.no_grad():  # an LSTM can be vectorised only with its gradient
                vmap(total, randomness="same")(stacked)
        except Exception as error:
            if is_of_checkpointing(error):
                raise CannotBatch(_CHECKPOINTING) from error
            named = _named(model, nn.modules.batchnorm._BatchNorm, nn.RNNBase)
            raise CannotBatch(f"torch.func cannot vectorise it{named}: {first_line(error).rstrip('.')}") from error
        for index, scale in enumerate((1.0, 0.9)):
            with seeded(0):
                alone = gradient({name: scale * value for name, value in one.items()})
            largest = max(float(value.abs().max()) for value in alone.values() if value.numel())
            gaps = [float((both[name][index] - alone[name]).abs().max()) for name in names if alone[name].numel()]
            if not max(gaps) <= max(_tolerance(value) for value in one.values()) * largest:
                raise CannotBatch("torch.func vectorises it with wrong gradients")


def draws_random_numbers(
    model: nn.Module, task: Task, inputs: Any, set_mode: Callable[[nn.Module], Any] = lambda _: None
) -> bool:
    """Whether two passes of a batch in training mode differ, as with dropout."""
    with tried_out(model), torch.no_grad():
        set_mode(model)
        return _differs_by_seed(model, task, inputs)


class _NoTrainer:
    """Takes the place of a Trainer: with none, Lightning would report epoch 0."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"it reads {name} of the Trainer")


@contextmanager
def tried_out(model: nn.Module) -> Iterator[None]:
    """The model in its training modes, with shifted weights: a layer that starts at zero makes all losses equal."""
    modes = {module: module.training for module in model.modules()}
    state, generator = model.state_dict(), torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if name in state and value.is_floating_point():
            spread = float(value.detach().float().std()) if value.numel() > 1 else 0.0
            state[name] = value.detach() + (spread or 0.1) * torch.randn(value.shape, generator=generator).to(value)
    with borrowed(model, state, None):
        for module, training in modes.items():
            module.training = training
        yield


@contextmanager
def without_trainer(model: L.LightningModule) -> Iterator[None]:
    """In the block, code that reads the model's Trainer fails; otherwise it would see epoch 0."""
    before, model._trainer = model._trainer, cast("Any", _NoTrainer())
    try:
        yield
    finally:
        model._trainer = before


def _differs_by_seed(model: nn.Module, task: Task, inputs: Any) -> bool:
    with seeded(0):
        outputs = task.outputs(model, inputs)
    with seeded(1):
        return not torch.equal(outputs, task.outputs(model, inputs))


def switch_dropout_off(model: nn.Module) -> None:
    """Put dropout layers in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


def _rows(batch: Any, rows: list[int], size: int) -> Any:
    """Some examples of a batch; the batch may be nested."""

    def pick(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.ndim > 0 and len(value) == size else value

    if isinstance(batch, UserDict):  # from the tokenizers of transformers
        part = copy.copy(batch)
        part.data = pytree.tree_map(pick, batch.data)
        return part
    return pytree.tree_map(pick, batch)


def loss_of_step(model: nn.Module, batch: Any, number: int = 0) -> Tensor:
    """The loss that ``training_step`` returns for a batch, with or without a ``batch_idx`` among its arguments."""
    training_step: Any = model.training_step
    wanted = len(inspect.signature(training_step).parameters)
    result = training_step(*(batch, number)[:wanted])
    loss = result.get("loss") if isinstance(result, dict) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"training_step returned {type(loss).__name__}, expected a loss")
    return loss.reshape(())


def _named(model: nn.Module, *kinds: type[nn.Module]) -> str:
    names = [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if isinstance(module, kinds)]
    return f", likely by {', '.join(names[:3])}" if names else ""
