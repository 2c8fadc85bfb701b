"""Steering operators inside a network, as published: they move a hidden state, and the rest of the network runs on."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from stride_lightning.data.examples import Examples
from stride_lightning.data.reading import Reading, required
from stride_lightning.model.layers import before_layers, plain_name
from stride_lightning.steering.published.fitting import PublishedOperators, unexplained
from stride_lightning.steering.subsets import Design
from stride_lightning.tasks.language import CausalLanguageModeling

#: Depth of the hidden state that is steered by default, as a share of the network's blocks.
DEPTH = 5 / 8
#: Subsets whose effects on a sequence are made linear in each step.
LINEAR_SUBSETS = 16
#: Sequences under an operator in one forward pass.
ROWS = 64


class HiddenStateOperators(PublishedOperators):
    """One steering operator for each subset, ``z + a_k B(z)``, on a hidden state inside a frozen language model.

    Three terms are minimised, in every step on a batch of sequences: *fidelity*, the loss of a sequence steered by a
    random subset that it is in; *stability*, the divergence from the frozen model when steered by one that it is not
    in; and *linearity*, the part of the effects of some subsets on a sequence that no scores of examples explain.

    The model, in eval mode, is frozen and no part of this module. The input of ``layer`` is steered, by default of the
    block 5/8 deep. Other options are those of :class:`PublishedOperators`.

    Reference: arXiv:2606.05165 (STRIDE), steering operators on hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        task: CausalLanguageModeling,
        design: Design,
        *,
        layer: str | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(design, batch_size=batch_size, **options)
        self._frozen = [model]  # in a list: no part of this module
        self.task, self.layer = task, block_at(model, DEPTH) if layer is None else layer

    def fit_operators(self, train: Examples, device: torch.device, *, show_progress: bool = True) -> None:
        """Fit basis and operators with a Trainer; every process of a distributed run fits alike."""
        self._train, self._where = train, device
        self._generator = torch.Generator().manual_seed(self.seed)
        (batch,) = train.drawn([torch.tensor([0])], self.seed, device)
        width, where = self._width(self.task.inputs(batch)), torch.empty(0, device=device)
        self.start(width, (self.design.num_subsets, self.rank, width), self._generator, where, size=width)
        with ExitStack() as stack:
            for parameter in self._frozen[0].parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)  # else training would leave gradients in the user's model
            self.run_trainer(device, show_progress=show_progress)
        self.requires_grad_(False)
        del self._train

    def _width(self, inputs: dict[str, Any]) -> int:
        widths: list[int] = []

        def hook(_: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            widths.append(hidden_of(self.layer, args, kwargs).shape[-1])

        with before_layers(self._frozen[0], [self.layer], hook), torch.no_grad():
            self.task.outputs(self._frozen[0], inputs)
        if not widths:
            raise ValueError(f"Layer {self.layer!r} did not run in the model's forward pass. Name another.")
        return widths[0]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Fidelity, stability and linearity on a batch of places."""
        places = batch[0].cpu()
        (read,) = self._train.drawn([places], self.seed, self._where)
        inputs, targets = self.task.inputs(read), self.task.targets(read)
        members = self.design.rows(places)
        inside, outside = (self._drawn(weights) for weights in (members, 1 - members))
        with torch.no_grad():
            frozen = self.task.outputs(self._frozen[0], inputs).float()
        encoded = self.task.encode(targets, frozen.shape[-1])
        steered = self.steered(inputs, torch.cat([inside, outside]), repeats=2)
        held, drifted = steered.chunk(2)
        fidelity = self.task.loss(held, encoded).mean()
        divergence = (frozen.softmax(-1) * (frozen.log_softmax(-1) - drifted.log_softmax(-1))).sum(-1)
        stability = (divergence * self.task.output_weights(encoded)[..., 0]).sum(1).mean()
        return fidelity + self.stability * stability + self._nonlinearity(inputs, encoded)

    def _nonlinearity(self, inputs: dict[str, Any], encoded: Tensor) -> Tensor:
        """Share of some subsets' effects on the first sequence that no scores explain."""
        count = min(LINEAR_SUBSETS, self.design.num_subsets)
        subsets = torch.randperm(self.design.num_subsets, generator=self._generator)[:count]
        one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        losses = self.task.loss(self.steered(one, subsets, repeats=count), encoded[:1].expand(count, -1, -1))
        response = losses - losses.mean()
        residual = unexplained(self.design, self._generator, subsets).to(response) @ response
        return residual.square().sum() / response.square().sum().clamp(min=1e-12)

    def _drawn(self, weights: Tensor) -> Tensor:
        """One subset for each sequence, among those of weight 1; any where there is none."""
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
        return torch.multinomial(weights, 1, generator=self._generator)[:, 0]

    def steered(self, inputs: dict[str, Any], subsets: Tensor, *, repeats: int) -> Tensor:
        """Logits of the frozen model under operators, float32 of shape ``(repeats B, T, V)``.

        The B sequences are repeated, one copy of all after the other; ``subsets`` are the operators of all rows.
        """
        many = {
            name: value.repeat(repeats, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
            for name, value in inputs.items()
        }
        chosen = self.operators[subsets.to(self.operators.device)]

        def hook(_: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = hidden_of(self.layer, args, kwargs)
            moved = hidden.to(self.basis) @ self.basis @ chosen
            steered = hidden + moved.to(hidden.dtype)
            return ((steered, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": steered})

        with before_layers(self._frozen[0], [self.layer], hook):
            return self.task.outputs(self._frozen[0], many).float()

    @torch.no_grad()
    def measure(self, queries: Examples, device: torch.device, *, show_progress: bool = True) -> Tensor:
        """Effect of every operator on every query, shape ``(q, K)`` in nats; positive helps."""
        count, effects = self.design.num_subsets, []
        how = {"batch_size": max(1, ROWS // count), "description": "Measuring", "show_progress": show_progress}
        for rows in Reading(queries, self.task, self._frozen[0], device=device, **how):
            with rows.naming():
                frozen = self.task.outputs(self._frozen[0], rows.inputs).float()
                encoded = self.task.encode(required(rows.targets), frozen.shape[-1])
            losses = []
            for part in torch.arange(count).split(max(1, ROWS // len(rows))):
                steered = self.steered(rows.inputs, part.repeat_interleave(len(rows)), repeats=len(part))
                losses.append(self.task.loss(steered, encoded.repeat(len(part), 1, 1)).view(len(part), len(rows)))
            effects.append(self.task.loss(frozen, encoded)[:, None] - torch.cat(losses).T)
        return torch.cat(effects)


def hidden_of(layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that enters a block, shape ``(B, T, d)``."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise ValueError(
            f"The input of layer {layer!r} is not a hidden state of shape (B, T, d). Name a block of the network with "
            "`layers=[...]`."
        )
    return hidden


def block_at(model: nn.Module, depth: float) -> str:
    """Name of the block at a share of the depth of the model's longest list of modules.

    Example:
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2) for _ in range(8)])})
        >>> block_at(model, 5 / 8)
        'blocks.5'
    """
    lists = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks (torch.nn.ModuleList), so the one to steer cannot be told. "
            "Name it with `layers=[...]`."
        )
    name = max(lists, key=lambda name: len(lists[name]))
    return f"{name}.{min(len(lists[name]) - 1, round(depth * len(lists[name])))}"
