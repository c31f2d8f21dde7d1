"""Runs the source of the Gluon kernel on the CPU, against a model of what the hardware does at the same time.

The kernel's own functions are executed, with stand-ins for the Gluon language. Each role of each program is a thread,
of which one runs at a time, in an order drawn from a seed; copies into shared memory and matrix products happen at
any moment, again drawn, between their start and the wait for them. What the hardware would answer by a wrong number
or by hanging is an error here: see `ProtocolError`.

Not modelled: layouts and registers, which the compiler checks, and the threads within a role, which act as one.
"""

from __future__ import annotations

import builtins
import functools
import operator
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from large_tensors import zeros_on_demand

from grat_kernels import gluon_backend

# The kernel's modules, of which the last one holds the kernel itself.
MODULES = ("gluon_softmax", "gluon_work", "gluon_producer", "hopper_consumer", "blackwell_roles", "gluon_kernel")
SOURCES = {name: Path(gluon_backend.__file__).with_name(f"{name}.py").read_text() for name in MODULES}
ELEMENT_BYTES = 2
REGISTER_FILE = 64 * 1024
THREADS_PER_WARP = 32
WARPS_PER_GROUP = 4
# Larger tensors are used in place: they are mostly untouched, and a copy would touch all of them.
COPIED_BYTES = 2**30


class ProtocolError(AssertionError):
    """The kernel did what the hardware punishes: a deadlock, a race in shared memory, a barrier miscounted."""


class _Stopped(BaseException):
    """Ends the threads of a simulation that has failed elsewhere."""


# Values ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataType:
    """A dtype of the Gluon language; `element` stands for float16 and bfloat16, computed without rounding."""

    name: str
    numpy: Any

    @property
    def element_ty(self) -> DataType:
        """What a pointer to it points to."""
        return self


INT32, INT64 = DataType("int32", np.int64), DataType("int64", np.int64)
FLOAT32, ELEMENT, BOOLEAN = DataType("float32", np.float32), DataType("element", np.float32), DataType("int1", np.bool_)
_RANK = {BOOLEAN: 0, INT32: 1, INT64: 2, ELEMENT: 3, FLOAT32: 4}


class Array:
    """A tensor or scalar in registers. Integers of 32 bits that overflow are an error."""

    def __init__(self, data: Any, dtype: DataType) -> None:
        self.data = np.asarray(data, dtype.numpy)
        self.dtype = dtype
        self.type = SimpleNamespace(layout=SimpleNamespace(parent=None))
        if dtype is INT32 and self.data.size and np.abs(self.data).max() >= 2**31:
            raise ProtocolError("an integer of 32 bits overflows")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def to(self, dtype: DataType) -> Array:
        return Array(self.data, dtype)

    def __getitem__(self, key: Any) -> Array:
        return Array(self.data[key], self.dtype)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __add__(self, other: Any) -> Any:
        return NotImplemented if isinstance(other, Pointers) else _binary(operator.add, self, other)

    def __floordiv__(self, other: Any) -> Array:
        return _binary(operator.floordiv, self, other)

    def __mod__(self, other: Any) -> Array:
        return _binary(operator.mod, self, other)

    def __truediv__(self, other: Any) -> Array:
        return _binary(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Array:
        return _binary(operator.truediv, other, self)

    def __sub__(self, other: Any) -> Array:
        return _binary(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Array:
        return _binary(operator.sub, other, self)

    def __mul__(self, other: Any) -> Array:
        return _binary(operator.mul, self, other)

    def __and__(self, other: Any) -> Array:
        return _binary(operator.and_, self, other)

    def __or__(self, other: Any) -> Array:
        return _binary(operator.or_, self, other)

    def __lt__(self, other: Any) -> Array:
        return _binary(operator.lt, self, other, BOOLEAN)

    def __le__(self, other: Any) -> Array:
        return _binary(operator.le, self, other, BOOLEAN)

    def __gt__(self, other: Any) -> Array:
        return _binary(operator.gt, self, other, BOOLEAN)

    def __ge__(self, other: Any) -> Array:
        return _binary(operator.ge, self, other, BOOLEAN)

    __radd__, __rmul__ = __add__, __mul__


def _array(value: Any, like: Array | None = None) -> Array:
    if isinstance(value, Array):
        return value
    if isinstance(value, bool):
        return Array(value, BOOLEAN)
    if isinstance(value, int):
        return Array(value, like.dtype if like is not None and like.dtype is not BOOLEAN else INT32)
    if isinstance(value, float):
        return Array(value, like.dtype if like is not None and like.dtype in (FLOAT32, ELEMENT) else FLOAT32)
    raise TypeError(f"{type(value).__name__} is no value in registers")


def _binary(function: Callable[[Any, Any], Any], left: Any, right: Any, dtype: DataType | None = None) -> Array:
    left = _array(left, right if isinstance(right, Array) else None)
    right = _array(right, left)
    common = left.dtype if _RANK[left.dtype] > _RANK[right.dtype] else right.dtype
    with np.errstate(all="ignore"):
        return Array(function(left.data, right.data), dtype or common)


class Pointers:
    """Addresses in bytes, with the dtype of what lies there."""

    def __init__(self, addresses: np.ndarray, dtype: DataType) -> None:
        self.addresses = np.asarray(addresses, np.int64)
        self.dtype = dtype

    def __add__(self, offset: Any) -> Pointers:
        return Pointers(self.addresses + _array(offset).data * _size(self.dtype), self.dtype)

    __radd__ = __add__

    def __getitem__(self, key: Any) -> Pointers:
        return Pointers(self.addresses[key], self.dtype)


def _size(dtype: DataType) -> int:
    return ELEMENT_BYTES if dtype is ELEMENT else 4


@dataclass
class Allocation:
    """A tensor in global memory: a flat buffer, and how often each entry was written."""

    start: int
    dtype: DataType
    content: np.ndarray
    writes: np.ndarray


class GlobalMemory:
    """Global memory, in which every access must hit a tensor of its dtype."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self._at: dict[int, Allocation] = {}

    def pointer_to(self, tensor: torch.Tensor, content: torch.Tensor | None = None) -> Pointers:
        """A pointer to the start of `tensor`, whose storage is taken in once; `content` replaces its elements."""
        storage = tensor.untyped_storage()
        dtype = {torch.int32: INT32, torch.float32: FLOAT32}.get(tensor.dtype, ELEMENT)
        if storage.data_ptr() not in self._at:
            flat = torch.empty(0, dtype=tensor.dtype).set_(storage)
            values = flat
            if storage.nbytes() <= COPIED_BYTES:
                values = flat.to(torch.float32 if dtype is not INT32 else torch.int64).clone()
            if content is not None:
                values.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(content)
            # Far apart, so that no offset leads from one tensor into the next, and beyond 32 bits.
            start = (len(self.allocations) + 1) << 40
            writes = zeros_on_demand((len(values),), torch.uint8)
            allocation = Allocation(start, dtype, values.numpy(), writes.numpy())
            self.allocations.append(allocation)
            self._at[storage.data_ptr()] = allocation
        start = self._at[storage.data_ptr()].start
        return Pointers(np.asarray(start + tensor.storage_offset() * _size(dtype)), dtype)

    def find(self, pointers: Pointers, mask: np.ndarray) -> list[tuple[Allocation, np.ndarray, np.ndarray]]:
        """Tensors that the unmasked pointers hit: tensor, which pointers, their indices in it."""
        hits = []
        owners = np.where(mask, pointers.addresses >> 40, 0)
        for owner in np.unique(owners[mask]).tolist():
            if not 1 <= owner <= len(self.allocations):
                raise ProtocolError("an address outside of all tensors")
            allocation = self.allocations[owner - 1]
            which = owners == owner
            offsets = pointers.addresses[which] - allocation.start
            indices = offsets // _size(allocation.dtype)
            if allocation.dtype is not pointers.dtype or (offsets % _size(allocation.dtype)).any():
                raise ProtocolError("an address of another dtype")
            if indices.min() < 0 or indices.max() >= len(allocation.content):
                raise ProtocolError("an address out of bounds")
            hits.append((allocation, which, indices))
        return hits

    def load(self, pointers: Pointers, mask: Any = None, other: float = 0.0) -> np.ndarray:
        used = np.broadcast_to(True if mask is None else mask.data, pointers.addresses.shape)
        result = np.full(pointers.addresses.shape, other, pointers.dtype.numpy)
        for allocation, which, indices in self.find(pointers, used):
            result[which] = allocation.content[indices]
        return result

    def store(self, pointers: Pointers, value: Array, mask: Array) -> None:
        if value.dtype is not pointers.dtype:
            raise ProtocolError(f"{value.dtype.name} is stored as {pointers.dtype.name}")
        used = np.broadcast_to(mask.data, pointers.addresses.shape)
        values = np.broadcast_to(value.data, pointers.addresses.shape)
        for allocation, which, indices in self.find(pointers, used):
            np.add.at(allocation.writes, indices, 1)
            allocation.content[indices] = values[which]


@dataclass(frozen=True)
class Descriptor:
    """A matrix in global memory that the tensor memory accelerator reads block by block."""

    base: Pointers
    shape: tuple[int, int]
    row_stride: int
    block_shape: list[int]
    layout: Any = None
    dtype: DataType = ELEMENT


# Shared memory -----------------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """A piece of shared memory that is filled and read as a whole, with what is under way in it."""

    content: np.ndarray
    name: str
    version: int = 0
    loading: int = 0
    readers: int = 0
    unfenced: bool = False

    def begin_write(self) -> None:
        if self.readers:
            raise ProtocolError(f"{self.name} is overwritten while matrix products read it")
        self.version += 1

    def check_readable(self) -> None:
        if self.loading:
            raise ProtocolError(f"{self.name} is read while it is being loaded")

    def begin_read(self) -> tuple[Slot, int]:
        """By a matrix product, which ends it by `finish_read` with the version."""
        self.check_readable()
        self.readers += 1
        return self, self.version

    def finish_read(self, version: int) -> None:
        self.check_readable()
        if self.version != version:
            raise ProtocolError(f"{self.name} was overwritten before a matrix product had read it")
        if self.unfenced:
            raise ProtocolError(f"{self.name} was written by threads and is read without a fence")
        self.readers -= 1


@dataclass
class View:
    """A slot, some rows of it, or its transpose."""

    slot: Slot
    content: np.ndarray
    dtype: DataType
    simulation: Simulation

    @property
    def shape(self) -> list[int]:
        return list(self.content.shape)

    def permute(self, order: Sequence[int]) -> View:
        return View(self.slot, self.content.transpose(order), self.dtype, self.simulation)

    def slice(self, start: int, length: int) -> View:
        if start + length > self.content.shape[0]:
            raise ProtocolError(f"rows past the end of {self.slot.name}")
        return View(self.slot, self.content[start : start + length], self.dtype, self.simulation)

    def store(self, value: Array) -> None:
        self.simulation.pause()
        self.slot.begin_write()
        self.content[...] = value.data

    def load(self, layout: Any) -> Array:
        self.simulation.pause()
        self.slot.check_readable()
        return Array(self.content.copy(), self.dtype)


class SharedArray:
    """Slots in a row."""

    def __init__(self, shape: Sequence[int], dtype: DataType, simulation: Simulation) -> None:
        self.shape, self.dtype = list(shape), dtype
        # Shared memory starts with what the last program left there.
        left = -1 if dtype is INT32 else np.nan
        self.views = []
        for number in range(shape[0]):
            content = np.full(shape[1:], left, dtype.numpy)
            slot = Slot(content, f"slot {number} of {'x'.join(map(str, shape))}")
            self.views.append(View(slot, content, dtype, simulation))

    def index(self, number: Any) -> View:
        number = operator.index(number)
        if not 0 <= number < len(self.views):
            raise ProtocolError(f"there is no slot {number}")
        return self.views[number]


@dataclass
class TensorSlot:
    """A piece of tensor memory, which matrix products write and read in the order in which they were started.

    Weights lie where scores did, two in the place of one; each that is written leaves nothing of the other.
    """

    name: str
    scores: np.ndarray
    weights: np.ndarray
    writers: int = 0
    readers: int = 0

    def check_free(self) -> None:
        if self.writers or self.readers:
            raise ProtocolError(f"{self.name} is used while matrix products are under way in it")


@dataclass
class TensorView:
    """Some columns of a slot of tensor memory, as one dtype."""

    slot: TensorSlot
    dtype: DataType
    columns: slice
    simulation: Simulation

    @property
    def content(self) -> np.ndarray:
        return (self.slot.weights if self.dtype is ELEMENT else self.slot.scores)[:, self.columns]

    @property
    def shape(self) -> list[int]:
        return list(self.content.shape)

    def _reinterpret(self, dtype: DataType, shape: list[int], layout: Any) -> TensorView:
        assert shape == self.shape
        return TensorView(self.slot, dtype, self.columns, self.simulation)

    def slice(self, start: int, length: int) -> TensorView:
        columns = slice(self.columns.start + start, self.columns.start + start + length)
        if columns.stop > self.columns.stop:
            raise ProtocolError(f"columns past the end of {self.slot.name}")
        return TensorView(self.slot, self.dtype, columns, self.simulation)

    def load(self, layout: Any) -> Array:
        self.simulation.pause()
        self.slot.check_free()
        return Array(self.content.copy(), self.dtype)

    def store(self, value: Array) -> None:
        self.simulation.pause()
        self.slot.check_free()
        if value.dtype is not self.dtype:
            raise ProtocolError(f"{value.dtype.name} is stored as {self.dtype.name}")
        self.write(value.data)

    def write(self, data: np.ndarray) -> None:
        self.content[...] = data
        start, stop = self.columns.start, self.columns.stop
        if self.dtype is ELEMENT:
            self.slot.scores[:, start // 2 : -(-stop // 2)] = np.nan
        else:
            self.slot.weights[:, 2 * start : 2 * stop] = np.nan


class TensorArray:
    """Slots of tensor memory in a row."""

    def __init__(self, shape: Sequence[int], dtype: DataType, simulation: Simulation) -> None:
        self.shape, self.dtype, self.layout = list(shape), dtype, None
        self.views = []
        for number in range(shape[0]):
            scores, weights = (np.full(shape[1:], np.nan, np.float32) for _ in range(2))
            slot = TensorSlot(f"tensor memory {number} of {'x'.join(map(str, shape))}", scores, weights)
            self.views.append(TensorView(slot, dtype, slice(0, shape[2]), simulation))

    def index(self, number: Any) -> TensorView:
        return self.views[operator.index(number)]


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes have come (PTX ISA, mbarrier)."""

    count: int = 0
    pending: int = 0
    announced: int = 0
    phase: int = 0

    def start(self, count: int) -> None:
        if self.count:
            raise ProtocolError("a barrier is initialised twice")
        self.count = self.pending = count

    def arrive(self, count: int = 1) -> None:
        if not self.count:
            raise ProtocolError("a barrier is used before it is initialised")
        if count > self.pending:
            raise ProtocolError("more arrivals at a barrier than it counts")
        self.pending -= count
        self._advance()

    def expect(self, transferred: int) -> None:
        self.announced += transferred
        self.arrive()

    def complete(self, transferred: int) -> None:
        if transferred > self.announced:
            raise ProtocolError("more bytes arrive at a barrier than were announced")
        self.announced -= transferred
        self._advance()

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity

    def _advance(self) -> None:
        if self.pending == 0 and self.announced == 0:
            self.phase += 1
            self.pending = self.count


class BarrierArray:
    """Barriers in a row."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = list(shape)
        self.barriers = [Barrier() for _ in range(shape[0])]

    def index(self, number: Any) -> Barrier:
        number = operator.index(number)
        if not 0 <= number < len(self.barriers):
            raise ProtocolError(f"there is no barrier {number}")
        return self.barriers[number]


@dataclass
class Product:
    """A matrix product under way, or its result."""

    left: Any
    right: View
    accumulator: Array | None
    versions: list[tuple[Slot, int]]
    result: Array | None = None

    def finish(self) -> None:
        for slot, version in self.versions:
            slot.finish_read(version)
        left = self.left.content if isinstance(self.left, View) else self.left.data
        with np.errstate(all="ignore"):
            product = left @ self.right.content
            self.result = Array(product if self.accumulator is None else self.accumulator.data + product, FLOAT32)


@dataclass
class TensorProduct:
    """A matrix product under way whose result goes to tensor memory."""

    left: View | TensorView
    right: View
    target: TensorView
    use_accumulator: bool
    versions: list[tuple[Slot, int]]

    def finish(self) -> None:
        for slot, version in self.versions:
            slot.finish_read(version)
        if isinstance(self.left, TensorView):
            self.left.slot.readers -= 1
        with np.errstate(all="ignore"):
            product = self.left.content @ self.right.content
            self.target.write(self.target.content + product if self.use_accumulator else product)
        self.target.slot.writers -= 1


@dataclass
class Commit:
    """Arrives at a barrier once what a role has started before has ended."""

    barrier: Barrier

    def finish(self) -> None:
        self.barrier.arrive()


# Threads -----------------------------------------------------------------------------------------------------------


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass
class CopyGroup:
    """Copies of rows that were committed together: what ends each, and the slots that they write."""

    ends: list[Callable[[], None]]
    slots: list[Slot]

    def finish(self) -> None:
        for end in self.ends:
            end()
        self.ends = []


@dataclass
class Role:
    """A thread of the simulation: one role of one program."""

    name: str
    program: int
    weight: float
    condition: Callable[[], bool] | None = None
    waits_for: str = ""
    finished: bool = False
    turn: threading.Lock = field(default_factory=_locked)
    products: list[Product | TensorProduct | Commit] = field(default_factory=list)
    copies: CopyGroup = field(default_factory=lambda: CopyGroup([], []))
    groups: list[CopyGroup] = field(default_factory=list)
    written: list[Slot] = field(default_factory=list)

    @property
    def pending_groups(self) -> list[CopyGroup]:
        return [group for group in self.groups if group.ends]


class Simulation:
    """One launch of the kernel.

    Args:
        seed: of the order in which things happen.
        programs: programs that run at the same time and share the work.
        sources: of the kernel's modules, for tests that break them.
    """

    def __init__(self, seed: int, programs: int = 2, sources: dict[str, str] | None = None) -> None:
        self.random = random.Random(seed)
        self.programs = programs
        self.memory = GlobalMemory()
        self.roles: list[Role] = []
        self.current: Role | None = None
        self.in_flight: list[Callable[[], None]] = []
        self.failure: BaseException | None = None
        self._end = _locked()
        # Some roles and the asynchronous work may be slow as a whole.
        self._speeds = [self.random.choice([0.03, 0.3, 1.0, 1.0]) for _ in range(4)]
        self.kernel = self._load(sources or SOURCES)

    def run(self, launch: gluon_backend.Launch, contents: dict[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Runs all programs to their end.

        Args:
            launch: as the backend makes it, for tensors on the CPU.
            contents: what lies in a tensor instead of its own rounded elements.

        Raises:
            ProtocolError: if anything is amiss.
        """
        for tensor, content in (contents or {}).items():
            self.memory.pointer_to(tensor, content)
        arguments = [self._argument(value) for value in launch.arguments]
        constants = {name: value for name, value in launch.options.items() if name.isupper()}
        self.warps, self.registers = launch.options["num_warps"], launch.options["maxnreg"]
        for program in range(self.programs):
            self._start(f"role 0 of program {program}", program, 0, lambda: self.kernel(*arguments, **constants))
        self._choose().turn.release()
        self._end.acquire()
        if self.failure:
            raise self.failure

    def written(self, tensor: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What lies in a contiguous tensor after the run, and how often each of its elements was written."""
        pointer = self.memory.pointer_to(tensor)
        allocation = self.memory.allocations[(int(pointer.addresses) >> 40) - 1]
        return allocation.content.reshape(tensor.shape), allocation.writes.reshape(tensor.shape)

    # Scheduling

    def pause(self, condition: Callable[[], bool] | None = None, waits_for: str = "") -> None:
        """Lets others run, and comes back once `condition` holds."""
        role = self.current
        assert role is not None
        role.condition, role.waits_for = condition, waits_for
        chosen = self._choose()
        if chosen is not role:
            chosen.turn.release()
            role.turn.acquire()
        if self.failure:
            raise _Stopped
        self.current = role
        role.condition = None

    def _start(self, name: str, program: int, kind: int, body: Callable[[], None]) -> Role:
        role = Role(name, program, self._speeds[kind])

        def run() -> None:
            role.turn.acquire()
            if self.failure:
                return
            self.current = role
            try:
                body()
                if role.copies.ends or role.groups or any(isinstance(one, Product) for one in role.products):
                    raise ProtocolError(f"{role.name} ends without waiting for what it started")
                role.finished = True
                together = [other for other in self.roles if other.program == role.program]
                if all(other.finished for other in together):
                    if any(isinstance(one, TensorProduct) for other in together for one in other.products):
                        raise ProtocolError(f"program {role.program} ends while its matrix products are under way")
                    for other in together:
                        other.products.clear()
                while self.in_flight and all(role.finished for role in self.roles):
                    self._finish_one()
                following = None if all(role.finished for role in self.roles) else self._choose()
            except _Stopped:
                return
            except BaseException as error:
                self._fail(error)
                return
            (self._end if following is None else following.turn).release()

        self.roles.append(role)
        threading.Thread(target=run, daemon=True).start()
        return role

    def _choose(self) -> Role:
        """Ends some of what is under way, and picks who runs next."""
        while True:
            ready = [role for role in self.roles if not role.finished and (role.condition is None or role.condition())]
            choices: list[Role | None] = [*ready]
            weights = [role.weight for role in ready]
            if self.in_flight or any(role.products or role.pending_groups for role in self.roles):
                choices.append(None)
                weights.append(self._speeds[3])
            if not choices:
                waiting = ", ".join(f"{role.name} for {role.waits_for}" for role in self.roles if not role.finished)
                raise ProtocolError(f"deadlock: {waiting}")
            chosen = self.random.choices(choices, weights)[0]
            if chosen is not None:
                return chosen
            self._finish_one()

    def _finish_one(self) -> None:
        """Something asynchronous ends: a copy in any order, of products and copied rows of a role the oldest."""
        ends: list[Callable[[], Any]] = []
        if self.in_flight:
            number = self.random.randrange(len(self.in_flight))
            ends.append(lambda: self.in_flight.pop(number)())
        for role in self.roles:
            if role.products:
                ends.append(lambda role=role: role.products.pop(0).finish())
            if pending := role.pending_groups:
                ends.append(pending[0].finish)
        self.random.choice(ends)()

    def _fail(self, error: BaseException) -> None:
        """Ends the simulation: every thread wakes up and stops."""
        self.failure = error
        for role in self.roles:
            if role.turn.locked():
                role.turn.release()
        self._end.release()

    # The Gluon language

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.memory.pointer_to(value)
        if isinstance(value, int):
            return Array(value, INT32)
        if isinstance(value, float):
            return Array(value, FLOAT32)
        if value is None:
            return None
        return Descriptor(
            self.memory.pointer_to(value.base), tuple(value.shape), value.strides[0], list(value.block_shape)
        )

    def _load(self, sources: dict[str, str]) -> Callable[..., None]:
        modules = {
            "triton.experimental": SimpleNamespace(gluon=SimpleNamespace(jit=_jit)),
            "triton.experimental.gluon": SimpleNamespace(language=self._language()),
            "triton.experimental.gluon.language.nvidia.ampere": SimpleNamespace(async_copy=self._async_copy()),
            "triton.experimental.gluon.language.nvidia.blackwell": SimpleNamespace(
                TensorMemoryLayout=lambda *arguments, **options: "layout",
                get_tmem_reg_layout=lambda *arguments: "layout",
                allocate_tensor_memory=lambda dtype, shape, layout: TensorArray(shape, dtype, self),
                tcgen05_mma=self._multiply_in_tensor_memory,
                tcgen05_commit=self._commit,
            ),
            "triton.experimental.gluon.language.nvidia.hopper": SimpleNamespace(
                fence_async_shared=self._fence,
                mbarrier=self._mbarrier(),
                tma=SimpleNamespace(async_copy_global_to_shared=self._copy_block),
                warpgroup_mma=self._multiply,
                warpgroup_mma_wait=self._wait_for_products,
            ),
        }

        def stand_in(name: str, *details: Any) -> Any:
            return modules.get(name) or __import__(name, *details)

        # Each module imports those before it only.
        for name in MODULES:
            namespace: dict[str, Any] = {"__builtins__": {**vars(builtins), "__import__": stand_in}}
            exec(compile(sources[name], f"{name}.py", "exec"), namespace)
            modules[f"grat_kernels.{name}"] = SimpleNamespace(**namespace)
        return modules["grat_kernels.gluon_kernel"].span_attention_kernel

    def _language(self) -> SimpleNamespace:
        def full(shape: Sequence[int], value: Any, dtype: DataType, layout: Any) -> Array:
            return Array(np.full(shape, _array(value).data), dtype)

        def where(condition: Array, left: Any, right: Any) -> Any:
            if isinstance(right, Pointers):
                return Pointers(np.where(condition.data, left.addresses, right.addresses), right.dtype)
            return Array(np.where(condition.data, _array(left).data, _array(right).data), right.dtype)

        def load(pointers: Pointers) -> Array:
            return Array(self.memory.load(pointers), pointers.dtype)

        def atomic_add(pointers: Pointers, value: int, sem: str) -> Array:
            self.pause()
            before = load(pointers)
            for allocation, _, indices in self.memory.find(pointers, np.asarray(True)):
                allocation.content[indices] += value
            return before

        def exp2(value: Array) -> Array:
            with np.errstate(all="ignore"):
                return Array(np.exp2(value.data), FLOAT32)

        def allocate(dtype: DataType, shape: Sequence[int], layout: Any) -> Any:
            if layout == "barrier":
                return BarrierArray(shape)
            return SharedArray(shape, dtype, self)

        def assembly(text: str, constraints: str, values: list[Array], **options: Any) -> Array:
            # Two pieces are written in assembly: one returns its operand, one the product of its two.
            return functools.reduce(operator.mul, values)

        def layout(*arguments: Any, **options: Any) -> str:
            return "layout"

        return SimpleNamespace(
            constexpr=lambda value: value,
            int32=INT32, int64=INT64, float32=FLOAT32,
            NVMMADistributedLayout=layout, DotOperandLayout=layout, SliceLayout=layout, BlockedLayout=layout,
            SwizzledSharedLayout=layout,
            allocate_shared_memory=allocate,
            program_id=lambda axis: self.current.program,  # type: ignore[union-attr]
            arange=lambda start, stop, layout: Array(np.arange(start, stop), INT32),
            full=full,
            zeros=lambda shape, dtype, layout: Array(np.zeros(shape), dtype),
            cast=lambda value, dtype: _array(value).to(dtype),
            where=where, load=load, atomic_add=atomic_add, exp2=exp2,
            store=lambda pointers, value, mask: self.memory.store(pointers, value, mask),
            maximum=lambda left, right: _binary(np.maximum, left, right),
            max=lambda value, axis: Array(value.data.max(axis), value.dtype),
            min=lambda value, axis: Array(value.data.min(axis), value.dtype),
            sum=lambda value, axis: Array(value.data.sum(axis), value.dtype),
            static_range=range,
            convert_layout=lambda value, layout: value,
            inline_asm_elementwise=assembly,
            warp_specialize=self._specialise,
            barrier=lambda: None,
        )  # fmt: skip

    def _specialise(self, roles: list[tuple[Any, tuple]], warps: list[int], registers: list[int]) -> None:
        starter = self.current
        assert starter is not None
        # Warps get registers in groups of four, the idle ones in the last group too.
        groups = sum(-(-count // WARPS_PER_GROUP) for count in (self.warps, *warps))
        share = REGISTER_FILE // (groups * WARPS_PER_GROUP * THREADS_PER_WARP) // 8 * 8
        assert share == self.registers
        left_over = share + sum(share - count for count in registers)
        assert all(count % 8 == 0 and 24 <= count <= 256 for count in (*registers, left_over))
        started = []
        for number, (function, arguments) in enumerate(roles[1:], start=1):
            name = f"role {number} of program {starter.program}"
            body = lambda function=function, arguments=arguments: function(*arguments)  # noqa: E731
            started.append(self._start(name, starter.program, number, body))
        function, arguments = roles[0]
        function(*arguments)
        self.pause(lambda: all(role.finished for role in started), "the other roles")

    def _mbarrier(self) -> SimpleNamespace:
        def wait(barrier: Barrier, phase: Any) -> None:
            parity = operator.index(phase)
            if parity not in (0, 1):
                raise ProtocolError(f"{parity} is no parity")
            self.pause(lambda: barrier.passed(parity), "a barrier")

        def arrive(barrier: Barrier, count: int) -> None:
            self.pause()
            barrier.arrive(count)

        def expect(barrier: Barrier, transferred: int) -> None:
            self.pause()
            barrier.expect(transferred)

        return SimpleNamespace(
            MBarrierLayout=lambda: "barrier",
            init=lambda barrier, count: barrier.start(count),
            wait=wait, arrive=arrive, expect=expect,
        )  # fmt: skip

    def _copy_block(self, blocks: Descriptor, coordinates: list[Any], barrier: Barrier, target: View) -> None:
        self.pause()
        row, column = (operator.index(value) for value in coordinates)
        if row < 0 or column < 0 or target.shape != blocks.block_shape:
            raise ProtocolError(f"no block {target.shape} at {row}, {column}")
        target.slot.begin_write()
        target.slot.loading += 1
        # Nothing may be read of it before it has come.
        target.content[...] = np.nan

        def finish() -> None:
            rows, columns = row + np.arange(blocks.block_shape[0]), column + np.arange(blocks.block_shape[1])
            inside = (rows < blocks.shape[0])[:, None] & (columns < blocks.shape[1])[None, :]
            pointers = blocks.base + Array(rows[:, None] * blocks.row_stride + columns[None, :], INT64)
            target.content[...] = self.memory.load(pointers, Array(inside, BOOLEAN))
            target.slot.loading -= 1
            # Written by the path that matrix products read by.
            target.slot.unfenced = False
            barrier.complete(target.content.size * ELEMENT_BYTES)

        self.in_flight.append(finish)

    def _async_copy(self) -> SimpleNamespace:
        def copy(target: View, pointers: Pointers, mask: Array) -> None:
            self.pause()
            role = self.current
            assert role is not None
            if target.shape != list(pointers.addresses.shape) or target.content.shape[0] == 0:
                raise ProtocolError(f"{pointers.addresses.shape} addresses for a slot of {target.shape}")
            target.slot.begin_write()
            target.slot.loading += 1
            target.slot.unfenced = True
            target.content[...] = np.nan
            values = self.memory.load(pointers, mask)

            def finish() -> None:
                target.content[...] = values
                target.slot.loading -= 1

            role.copies.ends.append(finish)
            role.copies.slots.append(target.slot)

        def commit() -> None:
            role = self.current
            assert role is not None
            role.groups.append(role.copies)
            role.copies = CopyGroup([], [])

        def wait(outstanding: int) -> None:
            self.pause()
            role = self.current
            assert role is not None
            while len(role.groups) > outstanding:
                group = role.groups.pop(0)
                group.finish()
                # A fence covers what the role has waited for, not what has come by chance.
                role.written += group.slots

        return SimpleNamespace(async_copy_global_to_shared=copy, commit_group=commit, wait_group=wait)

    def _fence(self) -> None:
        role = self.current
        assert role is not None
        for slot in role.written:
            slot.unfenced = False
        role.written.clear()

    def _multiply(
        self, left: Any, right: View, accumulator: Array, use_acc: bool = True, is_async: bool = False
    ) -> Any:
        self.pause()
        role = self.current
        assert role is not None
        assert is_async
        versions = [operand.slot.begin_read() for operand in (left, right) if isinstance(operand, View)]
        if use_acc and not isinstance(accumulator, Array):
            raise ProtocolError("an accumulator is used before its matrix product has ended")
        product = Product(left, right, accumulator if use_acc else None, versions)
        role.products.append(product)
        return product

    def _multiply_in_tensor_memory(
        self, left: View | TensorView, right: View, target: TensorView, use_acc: Any, mbarriers: list[Barrier]
    ) -> None:
        self.pause()
        role = self.current
        assert role is not None
        versions = [operand.slot.begin_read() for operand in (left, right) if isinstance(operand, View)]
        if isinstance(left, TensorView):
            left.slot.readers += 1
        target.slot.writers += 1
        role.products.append(TensorProduct(left, right, target, bool(use_acc), versions))
        role.products += [Commit(barrier) for barrier in mbarriers]

    def _commit(self, barrier: Barrier) -> None:
        self.pause()
        role = self.current
        assert role is not None
        role.products.append(Commit(barrier))

    def _wait_for_products(self, num_outstanding: int, deps: tuple[Any, ...]) -> Any:
        self.pause()
        role = self.current
        assert role is not None
        while len(role.products) > num_outstanding:
            role.products.pop(0).finish()
        results = []
        for value in deps:
            if isinstance(value, Product):
                if value.result is None:
                    raise ProtocolError("a result is taken before its matrix product has ended")
                value = value.result
            results.append(value)
        return results[0] if len(results) == 1 else tuple(results)


def _jit(function: Any = None, **options: Any) -> Any:
    return function if function is not None else _jit
