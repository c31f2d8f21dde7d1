"""Where tensors are kept between steps: on their device as they are, there in 8 bits, or in main memory."""

from __future__ import annotations

from typing import Protocol

import torch

from grat_cli.presets.over_steps import Keep

_LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
_LEAST_SCALE = torch.finfo(torch.float32).tiny


class Kept(Protocol):
    """A tensor that is kept.

    Attributes:
        nbytes: that it takes, wherever it is.
    """

    nbytes: int

    def get(self) -> torch.Tensor:
        """It, on its device and in its dtype; it must not be changed."""
        ...

    def plus(self, slope: Kept | None, factor: float) -> torch.Tensor:
        """It, and a multiple of another; what is returned must not be changed."""
        ...

    def fetch(self) -> None:
        """Sets it out, to be there when it is asked for."""
        ...


class Keeper:
    """Keeps tensors."""

    def __init__(self) -> None:
        self._buffers: dict[torch.device, _Buffers] = {}

    def keep(self, where: Keep, tensor: torch.Tensor, room: Kept | None = None, *, copies: bool = False) -> Kept:
        """Keeps one.

        Args:
            where: see `presets.OverSteps`.
            tensor: what.
            room: one that is needed no longer, whose place may be taken.
            copies: whether somebody may change the tensor from now on.
        """
        if where == "fp8" and tensor.dtype.itemsize > 1:
            return _In8Bits(tensor)
        if where == "host" and tensor.is_cuda:
            if tensor.device not in self._buffers:
                self._buffers[tensor.device] = _Buffers(tensor.device)
            host = room.host if isinstance(room, _InMainMemory) else None
            return _InMainMemory(tensor, self._buffers[tensor.device], host)
        return _AsItIs(tensor.clone() if copies else tensor)

    def clear(self) -> None:
        """Lets go of memory that serves all of them."""
        for buffers in self._buffers.values():
            buffers.finish()
        self._buffers.clear()


class _AsItIs:
    """On its device, as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.nbytes = tensor.nbytes

    def get(self) -> torch.Tensor:
        return self._tensor

    def plus(self, slope: Kept | None, factor: float) -> torch.Tensor:
        return self._tensor if slope is None else torch.add(self._tensor, slope.get(), alpha=factor)

    def fetch(self) -> None:
        pass


class _In8Bits:
    """On its device as e4m3, with a scale for each row of the last axis: of a token, or of a token and head.

    Outputs and slopes alike: on pictures of the bundled model, 256x256, that costs about .001 of SSIM or less.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._dtype = tensor.dtype
        self._scale = (tensor.abs().amax(-1, keepdim=True).float() / _LARGEST_FP8).clamp_(min=_LEAST_SCALE)
        self._rounded = (tensor / self._scale).to(torch.float8_e4m3fn)
        self.nbytes = self._rounded.nbytes + self._scale.nbytes

    def get(self) -> torch.Tensor:
        return (self._rounded.float() * self._scale).to(self._dtype)

    def plus(self, slope: Kept | None, factor: float) -> torch.Tensor:
        made = self.get()
        return made if slope is None else made.add_(slope.get(), alpha=factor)

    def fetch(self) -> None:
        pass


class _InMainMemory:
    """In pinned main memory, copied beside what the device computes. Not yet run on a GPU.

    Nothing waits on the host, so that it may be many layers ahead of the device. Memory of the device is bounded all
    the same: copies go through few buffers, whose next use waits, on the device, for the one before.
    """

    def __init__(self, tensor: torch.Tensor, buffers: _Buffers, host: torch.Tensor | None) -> None:
        self._buffers = buffers
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.host = host
        self.nbytes = host.nbytes
        self._fetched: _Buffer | None = None
        self._buffers.send(tensor, host)

    def fetch(self) -> None:
        if self._fetched is None or self._fetched.holds is not self:
            self._fetched = self._buffers.fetch(self.host, self)

    def _arrived(self) -> _Buffer:
        self.fetch()
        assert self._fetched is not None
        torch.cuda.current_stream(self._buffers.device).wait_event(self._fetched.ready)
        return self._fetched

    def get(self) -> torch.Tensor:
        buffer = self._arrived()
        made = buffer.tensor.clone()
        self._leave(buffer)
        return made

    def plus(self, slope: Kept | None, factor: float) -> torch.Tensor:
        if not isinstance(slope, _InMainMemory):
            return self.get()
        slope.fetch()
        own, other = self._arrived(), slope._arrived()
        made = torch.add(own.tensor, other.tensor, alpha=factor)
        self._leave(own)
        slope._leave(other)
        return made

    def _leave(self, buffer: _Buffer) -> None:
        """The buffer may be filled anew as soon as the device has come so far."""
        buffer.free.record(torch.cuda.current_stream(self._buffers.device))
        buffer.holds = self._fetched = None


class _Buffer:
    """Memory of the device that copies go through.

    Attributes:
        tensor: it.
        ready: when it has been filled.
        free: when it may be filled.
        holds: whose content it has, or is about to have.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.empty(shape, dtype=dtype, device=device)
        self.ready, self.free = torch.cuda.Event(), torch.cuda.Event()
        self.holds: _InMainMemory | None = None


class _Buffers:
    """Those of one device, and the stream that copies."""

    # Output and slope of the layer under way and of the next one; and two more of a layer that is not called after all.
    _OF_A_SHAPE = 6

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._of_shape: dict[tuple[torch.Size, torch.dtype], list[_Buffer]] = {}

    def _next(self, tensor: torch.Tensor) -> _Buffer:
        """The one that was used longest ago; whoever had set something out to it has to do so anew."""
        buffers = self._of_shape.setdefault((tensor.shape, tensor.dtype), [])
        if len(buffers) < self._OF_A_SHAPE:
            buffer = _Buffer(tensor.shape, tensor.dtype, self.device)
            # Its memory may be in use by what was freed on the host, but not yet on the device.
            buffer.free.record(torch.cuda.current_stream(self.device))
        else:
            buffer = buffers.pop(0)
        buffers.append(buffer)
        buffer.holds = None
        return buffer

    def finish(self) -> None:
        """Whatever the device does from now on, it does after all copies: memory of buffers may be another's then."""
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def send(self, tensor: torch.Tensor, host: torch.Tensor) -> None:
        """Copies a tensor to main memory."""
        buffer, current = self._next(tensor), torch.cuda.current_stream(self.device)
        current.wait_event(buffer.free)
        current.wait_event(buffer.ready)  # of what was set out to it and never asked for
        buffer.tensor.copy_(tensor)
        buffer.ready.record(current)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(buffer.ready)
            host.copy_(buffer.tensor, non_blocking=True)
            buffer.free.record(self._stream)

    def fetch(self, host: torch.Tensor, holds: _InMainMemory) -> _Buffer:
        """Copies a tensor from main memory; what was sent there before arrives before."""
        buffer = self._next(host)
        buffer.holds = holds
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(buffer.free)
            buffer.tensor.copy_(host, non_blocking=True)
            buffer.ready.record(self._stream)
        return buffer
