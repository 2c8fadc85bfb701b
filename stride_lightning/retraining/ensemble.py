"""Many copies of a model that train together: stacked parameters, one batched product for all."""

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

# What an operation without a batching rule costs is measured by the user, who cannot add the rule.
warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")

#: What is computed of one model and a batch: ``(model, batch) -> tensor``.
BatchFunction = Callable[[nn.Module, Any], Tensor]
#: One copy's objective: ``(call, shared, single) -> scalar``, where ``call(batch)`` is the copy's batch function.
Objective = Callable[[Callable[[Any], Tensor], Any, Any], Tensor]

#: Steps from which tracing pays.
CAPTURE_STEPS = 50
#: Tracing is not for several threads at once.
_TRACING = threading.Lock()
#: Bytes that the copies trained together may take: on a CPU about what its caches hold.
MEMORY_BUDGET = {"cpu": 2**25, "cuda": 2**31, "mps": 2**29}


class Ensemble:
    """Copies of one model that start alike and train together, each on an objective of its own.

    The parameters of all copies are stacked, the objective is vectorised over copies, and the optimizer is torch's
    own: its updates are elementwise, so that on stacked parameters it does to every copy what it would do to that copy
    alone. Dropout draws the same mask for all copies. The template's own weights never change.

    Args:
        model: The template. Its training mode is the caller's affair.
        optimizer: Built for the template's parameters, without state; it is taken over for the stacked ones, and
            schedulers that hold it go on working.
        objective: That of a copy, a function of what ``function`` computes of a model and a batch.
        kernels: Traced steps, shared between ensembles that train models of one kind.
        num_steps: About how many steps will be made, to decide whether tracing pays.

    Memory beyond the template: ``num_models x (parameters x (2 + s) + 2 x activations)`` values, with ``s`` the
    optimizer's values per parameter and the activations that the backward pass of one copy needs.

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
        """One step of the optimizer for every copy; each one's objective before it, shape ``(num_models,)``.

        Args:
            shared: Batch that all copies see, a pytree of tensors.
            single: What differs between copies, a pytree of tensors whose first axis is the copies.
            skip: Copies that make no step, bool of shape ``(num_models,)``.
        """
        arguments = (self.parameters, self.fixed, shared, single)
        gradients, objectives = self._function(arguments)(*arguments)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].contiguous()  # fused optimizers go through memory, whatever the strides
        if skip is None or not skip.any():
            self.optimizer.step()
            return objectives
        before = [value.clone() for value in self._per_copy()]
        self.optimizer.step()
        # The first step makes the optimizer's values, which begin with zeros.
        for value, old in zip_longest(self._per_copy(), before):
            value[skip] = 0 if old is None else old[skip]
        return objectives

    @torch.no_grad()
    def evaluate(self, function: BatchFunction, batch: Any) -> Tensor:
        """A function of every copy and a batch, the copies along the first axis."""
        call = Call(self.model, function)
        values_of = vmap(lambda parameters: call.with_weights({**parameters, **self.fixed}, batch), randomness="same")
        return values_of(self.parameters)

    def _function(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """The vectorised gradient, traced if that pays; what was traced with other weights is tried out first."""
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
            # A tensor that is neither parameter nor buffer would be another model's.
            self._verified.add(key)
            if not _agree(kernel, self._gradients, arguments):
                self._kernels[key] = kernel = None
        return self._gradients if kernel is None else kernel

    def _per_copy(self) -> list[Tensor]:
        """Parameters, and the optimizer's values beside them."""
        parameters = list(self.parameters.values())
        states = [value for one in parameters for value in self.optimizer.state.get(one, {}).values()]
        return parameters + [value for value in states if isinstance(value, Tensor) and value.ndim > 0]


class Single:
    """One copy, trained without vectorising: stands where an :class:`Ensemble` of one would."""

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
    def evaluate(self, function: BatchFunction, batch: Any) -> Tensor:
        """A function of the copy and a batch, with an axis of one before it."""
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
        """The function of a batch under other values of the model's parameters and buffers, by name."""
        return functional_call(self, {f"model.{name}": value for name, value in state.items()}, (batch,))


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of a model that an optimizer changes, by name."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: value for name, value in model.named_parameters() if id(value) in held and value.requires_grad}


def bytes_per_model(model: nn.Module, optimizer: torch.optim.Optimizer, function: BatchFunction, batch: Any) -> int:
    """Bytes that one copy takes while it trains: parameters, gradients, optimizer state and activations."""
    parameters = trained_parameters(model, optimizer).values()
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with seeded(0), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function(model, batch)  # noqa: F841 - keeps what was saved alive, so that no address comes twice
    for value in (*model.parameters(), *model.buffers()):
        saved.pop(value.untyped_storage().data_ptr(), None)
    states = 2 if "betas" in optimizer.defaults else int(optimizer.defaults.get("momentum", 0) > 0)
    weights = sum(value.numel() * value.element_size() for value in parameters)
    return weights * (2 + states) + 2 * sum(saved.values())


def chunk_size(num_models: int, bytes_each: int, device: torch.device, memory_budget: int | None = None) -> int:
    """How many models train together: all within the budget, cut so that chunks are of about one size."""
    budget = MEMORY_BUDGET.get(device.type, 2**29) if memory_budget is None else memory_budget
    largest = max(1, min(num_models, budget // max(1, bytes_each)))
    return -(-num_models // -(-num_models // largest))


def keep_freed_memory() -> None:
    """Let the C library keep memory between steps instead of returning it and faulting it in again.

    glibc raises its thresholds when a large block is freed; without that a third of a step of small models is spent on
    page faults. The block is never written to, so it costs nothing.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


def _take_over(optimizer: torch.optim.Optimizer, stacked: dict[int, Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [stacked[id(parameter)] for parameter in group["params"] if id(parameter) in stacked]
        if all(parameter.device.type == "cpu" for parameter in group["params"]):
            # One pass over memory instead of three to five; the same numbers to rounding.
            group["fused"] = group.get("foreach") is None and not group.get("differentiable")
    optimizer.state.clear()


def _agree(one: Callable[..., Any], other: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    values = []
    for function in (one, other):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            values.append(pytree.tree_leaves(function(*arguments)))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(*values, strict=True))
