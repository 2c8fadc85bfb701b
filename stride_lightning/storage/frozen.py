"""What a fit leaves frozen: records name it by hashes, and hold it only once it is about to train after all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stride_lightning.model.digests import hash_of_digests, model_digests, state_tensors
from stride_lightning.model.layers import plain_name
from stride_lightning.runtime.distributed import rank
from stride_lightning.storage.records import find_records, read_info

#: Kind of the records that hold weights as they were before they were unfrozen.
FROZEN_KIND = "tracin-frozen"
#: Buffers up to so many bytes are recorded even while they are the same: any forward pass may change them.
_SMALL_BUFFER = 2**16


class FrozenRest:
    """What a fit leaves as it was when it began: no gradient is required of it, and its values are the same.

    Small buffers never belong to it.

    Args:
        model: The model when the fit begins.
        named: Digests by plain name of what earlier records of the run name, in case it trains from now on.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        >>> _ = model[0].requires_grad_(False)
        >>> rest = FrozenRest(model)
        >>> sorted(rest.without_it(model))
        ['1.bias', '1.weight']
        >>> _ = nn.init.ones_(model[0].bias)
        >>> sorted(rest.without_it(model))
        ['0.bias', '1.bias', '1.weight']
    """

    def __init__(self, model: nn.Module, named: Mapping[str, str] | None = None) -> None:
        named = named or {}
        # Each where it stands, because sharding puts other parameters there.
        places = {
            plain_name(f"{prefix}.{name}".lstrip(".")): (module, name, value)
            for prefix, module in model.named_modules()
            for name, value in module._parameters.items()
        }
        self._frozen = {
            plain: (module, name)
            for plain, (module, name, value) in places.items()
            if value is not None and (plain in named or not value.requires_grad)
        }
        self._digests: dict[str, str] = {}
        if rank() == 0:  # which alone writes records
            stays = {name for name, value in state_tensors(model).items() if _may_stay(value)}
            digests = model_digests(model, stays | named.keys())
            self._digests = {key: digest for key, digest in digests.items() if key in stays or named.get(key) == digest}

    def digests(self, model: nn.Module, now: Mapping[str, str] | None = None) -> dict[str, str]:
        """Digests of the rest by plain name, at the present weights; ``now`` are theirs, if they are known."""
        now, tensors = model_digests(model, self._digests) if now is None else now, state_tensors(model)
        return {
            name: digest
            for name, digest in self._digests.items()
            if now.get(name) == digest and not tensors[name].requires_grad
        }

    def without_it(self, model: nn.Module) -> dict[str, Tensor]:
        """All other tensors of the model's state by plain name: what trains, and what has changed."""
        rest = self.digests(model)
        return {name: value.detach() for name, value in state_tensors(model).items() if name not in rest}

    def is_unfrozen(self) -> bool:
        """Whether a gradient is required of a parameter of the rest by now."""
        return bool(self._unfrozen())

    def _unfrozen(self) -> list[str]:
        places = self._frozen.items()
        return [
            plain
            for plain, (module, name) in places
            if (value := module._parameters.get(name)) is not None and value.requires_grad
        ]

    def unfreeze(self, model: nn.Module) -> dict[str, Tensor]:
        """Forget the parameters that train from now on; returns those among them that are still as they were."""
        names = self._unfrozen()
        for name in names:
            del self._frozen[name]
        first = {name: self._digests.pop(name) for name in names if name in self._digests}
        if not first:
            return {}
        now, tensors = model_digests(model, first), state_tensors(model)
        return {name: tensors[name].detach() for name, digest in first.items() if now.get(name) == digest}


def _may_stay(tensor: Tensor) -> bool:
    is_parameter = isinstance(tensor, nn.Parameter)
    is_large = tensor.numel() * tensor.element_size() > _SMALL_BUFFER
    return not tensor.requires_grad and (is_parameter or is_large)


def frozen_info(digests: Mapping[str, str]) -> dict[str, Any]:
    """Plain values by which a record names what is frozen: one hash, and the digests by name."""
    return {"hash": hash_of_digests(digests), "digests": dict(digests)}


def frozen_records(folder: Path, run: str | None = None) -> dict[Path, dict[str, Any]]:
    """Plain values of the records in a folder that hold weights as they were before they were unfrozen; of one run."""
    infos = {path: read_info(path) for path in find_records(folder)}
    held = {path: info for path, info in infos.items() if info.get("kind") == FROZEN_KIND}
    return {path: info for path, info in held.items() if run is None or info["run"] == run}


def frozen_elsewhere(
    record: Path, info: Mapping[str, Any], model: nn.Module, model_digests: Callable[[], Mapping[str, str]]
) -> dict[Path, list[str]]:
    """Names of frozen weights that the model has others of by now, by the record that holds them.

    Args:
        record: A record of weights; the others lie in its folder.
        info: Its plain values.
        model: The model, for the message.
        model_digests: The model's digests by plain name, if they are needed.

    Raises:
        ValueError: If the model has another frozen base, naming what differs.
    """
    frozen = info["frozen"]["digests"]
    ours = model_digests() if frozen else {}
    others = [name for name, digest in frozen.items() if ours.get(name) != digest]
    holders: dict[Path, list[str]] = {}
    for path, held in frozen_records(record.parent).items() if others else ():
        names = [name for name in others if held["digests"].get(name) == frozen[name]]
        others = [name for name in others if name not in names]
        if names:
            holders[path] = names
    if others:
        here = hash_of_digests({name: ours[name] for name in frozen if name in ours})
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(
            f"{record}: the frozen base is another. The record holds what the fit trained; the {len(frozen)} frozen "
            f"tensors are taken from the model, and {type(model).__name__} has other values of {shown} (SHA-256 of "
            f"all: {info['frozen']['hash'][:16]} in the record, {here[:16]} in the model). Build the model on the base "
            "that the fit started from."
        )
    return holders
