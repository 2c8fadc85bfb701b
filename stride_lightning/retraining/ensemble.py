"""Many copies of a model that train together: stacked parameters, one batched product for all copies."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils import _pytree as pytree
from typing_extensions import override

from stride_lightning.retraining.capture import capture
from stride_lightning.runtime.randomness import seeded

# The user cannot add a batching rule, so the warning about its cost does not help.
warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")

#: A function of one model and a batch: ``(model, batch) -> tensor``.
BatchFunction = Callable[[nn.Module, Any], Tensor]
#: One copy's objective: ``(call, shared, single) -> scalar``, where ``call(batch)`` is the copy's batch function.
Objective = Callable[[Callable[[Any], Tensor], Any, Any], Tensor]

#: Tracing pays from so many steps on.
CAPTURE_STEPS = 50
#: Only one thread may trace at a time.
_TRACING = threading.Lock()
#: Bytes for the copies that train together; on a CPU about the size of its caches.
MEMORY_BUDGET = {"cpu": 2**25, "cuda": 2**31, "mps": 2**29}


class Ensemble:
    """Copies of one model that start with the same weights and train together, each on another objective.

    The parameters of all copies are stacked, and the objective is vectorised over copies. The optimizer is torch's:
    its updates are elementwise, so on stacked parameters it updates every copy as it would update that copy alone.
    Dropout draws the same mask for all copies. The template's weights never change.

    Args:
        model: The template. The caller sets its training mode.
        optimizer: Built for the template's parameters, without state. It gets the stacked parameters instead, and
            its schedulers still work.
        objective: The objective of one copy, as a function of the results of ``function``.
        kernels: Traced steps, shared between ensembles of models of one kind.
        num_steps: Approximate number of steps; it decides whether tracing pays.

    Memory beyond the template: ``num_models x (parameters x (2 + s) + 2 x activations)`` values. ``s`` is the number of
    the optimizer's values per parameter; activations are those for the backward pass of one copy.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> def losses(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        >>> def weighted_mean(call, shared, weights):
        ...     return (call(shared) * weights).sum() / weights.sum()
        >>> ensemble = Ensemble(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, losses, weighted_mean)
        >>> batch = torch.randn(3, 2), torch.randn(3, 1)
        >>> _ = ensemble.step(batch, torch.tensor([[0.0, 1, 1], [1, 0, 1]]))
        >>> ensemble.evaluate(losses, batch).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        num_models: int,
        function: BatchFunction,
        objective: Objective,
        *,
        kernels: dict[Hashable, Any] | None = None,
        num_steps: int = 0,
    ) -> None:
        self.model, self.optimizer, self.num_steps = model, optimizer, num_steps
        self._kernels = {} if kernels is None else kernels
        trained = trained_parameters(model, optimizer)
        self.parameters = {
            name: value.detach().expand(num_models, *value.shape).clone(memory_format=torch.contiguous_format)
            for name, value in trained.items()
        }
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.fixed = {name: value.detach() for name, value in state.items() if name not in trained}
        _take_over(optimizer, {id(trained[name]): self.parameters[name] for name in trained})
        call = Call(model, function)

        def one(parameters: dict[str, Tensor], fixed: dict[str, Tensor], shared: Any, single: Any) -> Tensor:
            return objective(lambda batch: call.with_weights({**parameters, **fixed}, batch), shared, single)

        self._gradients = vmap(grad_and_value(one), in_dims=(0, None, None, 0), randomness="same")
        self._verified: set[Hashable] = set()

    def step(self, shared: Any, single: Any, *, skip: Tensor | None = None) -> Tensor:
        """One step of the optimizer for every copy; returns the objectives before it, shape ``(num_models,)``.

        Args:
            shared: The batch of all copies, a pytree of tensors.
            single: The values of each copy, a pytree of tensors whose first axis is the copies.
            skip: Copies that make no step, bool of shape ``(num_models,)``.
        """
        arguments = (self.parameters, self.fixed, shared, single)
        gradients, objectives = self._function(arguments)(*arguments)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].contiguous()  # fused optimizers ignore strides
        if skip is None or not skip.any():
            self.optimizer.step()
            return objectives
        before = [value.clone() for value in self._per_copy()]
        self.optimizer.step()
        # The first step creates the optimizer's values, which start at zero.
        for value, old in zip_longest(self._per_copy(), before):
            value[skip] = 0 if old is None else old[skip]
        return objectives

    @torch.no_grad()
    def evaluate(self, function: BatchFunction, batch: Any, *, vectorise: bool = True) -> Tensor:
        """A function of every copy and a batch, on all copies at once or one by one; the first axis is the copies."""
        call = Call(self.model, function)

        def value_of(parameters: dict[str, Tensor]) -> Tensor:
            return call.with_weights({**parameters, **self.fixed}, batch)

        if vectorise:
            return vmap(value_of, randomness="same")(self.parameters)
        names, stacked = list(self.parameters), list(self.parameters.values())
        return torch.stack([value_of(dict(zip(names, weights, strict=True))) for weights in zip(*stacked, strict=True)])

    def _function(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """The vectorised gradient, traced if that pays; a trace from another ensemble is checked first."""
        if self.num_steps < CAPTURE_STEPS:
            return self._gradients
        leaves, structure = pytree.tree_flatten(arguments)
        key = (str(structure), *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves), self.model.training)
        with _TRACING:
            if key not in self._kernels:
                self._kernels[key] = capture(self._gradients, *arguments)
                self._verified.add(key)
        kernel = self._kernels[key]
        if kernel is not None and key not in self._verified:
            # A tensor that is neither parameter nor buffer would be that of another model.
            self._verified.add(key)
            if not _agree(kernel, self._gradients, arguments):
                self._kernels[key] = kernel = None
        return self._gradients if kernel is None else kernel

    def _per_copy(self) -> list[Tensor]:
        """The parameters and the optimizer's values."""
        parameters = list(self.parameters.values())
        states = [value for one in parameters for value in self.optimizer.state.get(one, {}).values()]
        return parameters + [value for value in states if isinstance(value, Tensor) and value.ndim > 0]


class Single:
    """One copy, trained without vectorising, with the interface of an :class:`Ensemble`."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, function: BatchFunction, objective: Objective
    ) -> None:
        self.model, self.optimizer, self.function, self.objective = model, optimizer, function, objective

    def step(self, shared: Any, single: Any) -> None:
        """One step of the optimizer."""
        self.optimizer.zero_grad()
        with torch.enable_grad():
            self.objective(lambda batch: self.function(self.model, batch), shared, single).backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, function: BatchFunction, batch: Any, *, vectorise: bool = True) -> Tensor:
        """A function of the copy and a batch, with a first axis of size 1."""
        return function(self.model, batch)[None]


class Call(nn.Module):
    """A function of a model as a module, so that ``functional_call`` can give it other weights."""

    def __init__(self, model: nn.Module, function: BatchFunction) -> None:
        super().__init__()
        self.model, self.function = model, function
        self.training = model.training

    @override
    def forward(self, batch: Any) -> Tensor:
        return self.function(self.model, batch)

    def with_weights(self, state: dict[str, Tensor], batch: Any) -> Tensor:
        """The function of a batch, with other values of the model's parameters and buffers, by name."""
        return functional_call(self, {f"model.{name}": value for name, value in state.items()}, (batch,))


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of a model in an optimizer, by name."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: value for name, value in model.named_parameters() if id(value) in held and value.requires_grad}


def bytes_per_model(model: nn.Module, optimizer: torch.optim.Optimizer, function: BatchFunction, batch: Any) -> int:
    """Bytes of one copy in training: parameters, gradients, optimizer state and activations."""
    parameters = trained_parameters(model, optimizer).values()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with seeded(0), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function(model, batch)  # noqa: F841 - holds the saved tensors, so that no two share an address
    for value in (*model.parameters(), *model.buffers()):
        saved.pop(value.untyped_storage().data_ptr(), None)
    states = 2 if "betas" in optimizer.defaults else int(optimizer.defaults.get("momentum", 0) > 0)
    weights = sum(value.numel() * value.element_size() for value in parameters)
    return weights * (2 + states) + 2 * sum(saved.values())


def chunk_size(num_models: int, bytes_each: int, device: torch.device, memory_budget: int | None = None) -> int:
    """Number of models in a chunk: as many as the budget allows, with chunks of about equal size."""
    budget = MEMORY_BUDGET.get(device.type, 2**29) if memory_budget is None else memory_budget
    largest = max(1, min(num_models, budget // max(1, bytes_each)))
    return -(-num_models // -(-num_models // largest))


def keep_freed_memory() -> None:
    """Make the C library hold freed memory between steps; returning it costs page faults in every step.

    glibc raises its thresholds when a large block is freed. Otherwise page faults take a third of a step of small
    models. The block is never written to, so it costs nothing.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


def _take_over(optimizer: torch.optim.Optimizer, stacked: dict[int, Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [stacked[id(parameter)] for parameter in group["params"] if id(parameter) in stacked]
        if all(parameter.device.type == "cpu" for parameter in group["params"]):
            # One pass over memory, not three to five; the numbers are equal up to rounding.
            group["fused"] = group.get("foreach") is None and not group.get("differentiable")
    optimizer.state.clear()


def _agree(one: Callable[..., Any], other: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    values = []
    for function in (one, other):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            values.append(pytree.tree_leaves(function(*arguments)))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*values, strict=True))
