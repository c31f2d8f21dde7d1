"""What step caches keep between two steps, as plain data and tensors that a file holds, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MOST_DEPTH = 6
_LARGEST_NUMBER = 10**9
# Set anew by every call before it is read.
_OF_ONE_CALL = frozenset({"head_block_output", "head_block_input"})


class Snapshot:
    """What caches keep between two steps."""

    def __init__(self, states: Sequence[tuple[int, int, str, dict[str, Any]]]) -> None:
        self._states = states
        self.nbytes = sum(tensor.nbytes for *_, values in states for tensor in _tensors_in(values))

    def data(self) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """As plain data, and the tensors that it names."""
        tensors: dict[str, torch.Tensor] = {}
        states = [
            {
                "transformer": transformer,
                "holder": holder,
                "context": context,
                "values": {name: _frozen(value, tensors) for name, value in values.items()},
            }
            for transformer, holder, context, values in self._states
        ]
        return states, tensors


def kept(state: Any) -> dict[str, Any]:
    """What of a state of diffusers' is kept between two calls, by name."""
    return {name: value for name, value in vars(state).items() if name not in _OF_ONE_CALL}


def copied(value: Any) -> Any:
    """Containers anew, around the same tensors; numbers in tensors, which may be changed in place, anew as well."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone() if value.ndim == 0 else value
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return value


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors of more than a number on a device, and the device itself where it stands for one."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device) if value.ndim else value
    if isinstance(value, torch.device):
        return device
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    return type(value)(moved(part, device) for part in value) if type(value) in (list, tuple) else value


def _frozen(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as plain data; its tensors go into a table."""
    import torch

    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": True}
    if isinstance(value, dict):
        return {"mapping": [[key, _frozen(part, tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_frozen(part, tensors) for part in value]}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise TypeError(f"a cache keeps a {type(value).__name__}")


def thawed(value: Any, tensors: Mapping[str, torch.Tensor], depth: int = 0) -> Any:
    """What `_frozen` was given; raises ValueError for what it does not make."""
    import torch

    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        if not abs(value) <= _LARGEST_NUMBER:
            raise ValueError("a number is too large")
        return value
    if not isinstance(value, dict) or len(value) != 1 or depth > _MOST_DEPTH:
        raise ValueError("it is no state of a cache")
    ((kind, held),) = value.items()
    if kind == "tensor":
        tensor = tensors[held]
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError("a tensor is not finite")
        return tensor
    if kind == "dtype" and held in ("float32", "bfloat16", "float16"):
        return getattr(torch, held)
    if kind == "device":
        return torch.device("cpu")
    if kind == "mapping":
        return {int(key): thawed(part, tensors, depth + 1) for key, part in held}
    if kind in ("list", "tuple"):
        parts = [thawed(part, tensors, depth + 1) for part in held]
        return parts if kind == "list" else tuple(parts)
    raise ValueError("it is no state of a cache")
