"""The start-up test of the compiled kernels: on its first use here, each must agree with the definition.

A compiler, a driver or a GPU that nobody has tried may break a kernel without a sound. So before a kernel's first use
in a process, for each device, dtype, head dimension and form (each is compiled by itself), it computes a small ragged
problem, and a result that rounding cannot explain stops the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from grat_kernels import reference
from grat_kernels.geometry import Grid, Grouping
from grat_kernels.launching import fits_descriptor
from grat_kernels.pattern import Block, Choice, CrissCross, Far, Full, Pattern, Union
from grat_kernels.plan import HeadPlan, Plan, build_head_plan, build_plan

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Plan | HeadPlan, torch.Tensor | None, float], torch.Tensor
]


class KernelMismatch(RuntimeError):
    """A kernel disagrees with the definition on this machine; the text says where and what to do."""


class Form(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        far: whether the plan has summaries.
        padded: whether text is masked per sample.
        by_head: whether heads attend differently.
        in_place: whether the tensors can be read through tensor descriptors.
        choosing: whether groups choose by content what they attend; of a plan with summaries.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    far: bool = False
    padded: bool = False
    by_head: bool = False
    in_place: bool = True
    choosing: bool = False


def form_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan | HeadPlan, text_valid: torch.Tensor | None
) -> Form:
    """The form that serves a call; arguments as for `span_attention`."""
    return Form(
        query.device,
        query.dtype,
        query.shape[3],
        plan.summaries.rows > 0,
        text_valid is not None and plan.text_len > 0,
        isinstance(plan, HeadPlan),
        all(fits_descriptor(tensor) for tensor in (query, key, value)),
        plan.chooses,
    )


_passed: set[tuple[str, Form]] = set()


def check(backend: str, attention: Attention, form: Form) -> None:
    """Compares a kernel with the definition, at its first use in this process and for each form.

    It waits for the device then. Inside a CUDA graph's capture, where nothing may wait, it does nothing and leaves the
    test to the next call.

    Args:
        backend: by name.
        attention: its function: query, key, value, plan, text_valid, scale.
        form: what is about to be used.

    Raises:
        KernelMismatch: if rounding cannot explain the difference.
    """
    if (backend, form) in _passed:
        return
    if form.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    with torch.no_grad(), torch.autocast(form.device.type, enabled=False):
        side = _INTERPRETED_SIDE if form.device.type == "cpu" else _SIDE
        for plan in _plans(side, form.far, form.by_head, form.choosing):
            arguments = _problem(plan, form)
            exact = _definition(arguments, plan, torch.float64)
            plain = _definition(arguments, plan, form.dtype)
            output = attention(*arguments[:3], plan, *arguments[3:])
            require_close(f"the {backend} kernel", output, plain, exact)
    _passed.add((backend, form))


def require_close(name: str, output: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Stops the run if a kernel's output has more than twice the error of plain arithmetic and one unit in the last
    place.

    Args:
        name: of the kernel.
        output: what it computed.
        plain: the same by a plain computation in the same precision.
        exact: the same in float64.

    Raises:
        KernelMismatch: naming the versions and what to do.
    """
    bound = 2 * (plain - exact).abs().max() + torch.finfo(output.dtype).eps * exact.abs().max()
    error = (output - exact).abs().max()
    if error <= bound:
        return
    dtype = str(output.dtype).removeprefix("torch.")
    raise KernelMismatch(
        f"{name} computes wrong results here: an error of {float(error):.2g} where rounding explains "
        f"{float(bound):.2g} ({dtype}, {output.shape[-1]} channels; {', '.join(_machine(output.device))}).\n"
        "Choose another one, such as --backend sdpa, and report this line with what grat env prints."
    )


def _machine(device: torch.device) -> list[str]:
    """What may be to blame: device, driver, and versions."""
    names = []
    if device.type == "cuda":
        names.append(torch.cuda.get_device_name(device))
        driver = Path("/proc/driver/nvidia/version")
        found = re.search(r"\d+(\.\d+)+", driver.read_text()) if driver.is_file() else None
        names += [f"driver {found[0]}"] if found else []
        names.append(f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}")
    else:
        names.append(f"{device.type} (Triton's interpreter)")
    for package in ("torch", "triton", "grat-cli"):
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            names.append(f"{package} of no known version")
    return names


# Side of a group: two full tiles of a GPU; in the interpreter, whose time goes by the operation, one of its tiles.
_SIDE, _INTERPRETED_SIDE = 16, 8
# Between the masses of two blocks, of which one is chosen before the other.
_APART = 0.7


@lru_cache(maxsize=8)
def _plans(side: int, far: bool, by_head: bool, choosing: bool) -> tuple[Plan | HeadPlan, ...]:
    """Small plans with full and partial tiles of every kind, and one with full tiles of tokens alone."""

    def plan(grid: Grid, pattern: Pattern, text_len: int) -> Plan | HeadPlan:
        grouping = Grouping(grid, (side, side))
        if by_head:
            return build_head_plan(((grouping, Full()), (grouping, pattern)), (1, 0), text_len)
        return build_plan(grouping, pattern, text_len)

    ragged = Grid((side + side // 4, 2 * side + 3))
    if choosing:
        choice = Choice(2, 3, (side // 4, side // 4))
        # Blocks of one size, so that what they hold decides.
        whole = Grid((side + side // 2, 2 * side + side // 2))
        return (plan(whole, Union(Block(0), Far([(0, (side // 2, side // 2))], choice)), side + 3),)
    if far:
        return (plan(ragged, Union(Block(0), Far([(0, (2, 2))])), side + 3),)
    return plan(ragged, Block(0), side + 3), plan(Grid((side, 2 * side)), CrissCross(), 8 * side)


def _problem(
    plan: Plan | HeadPlan, form: Form
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
    """Query, key, value `[2, N, 2, D]`, text_valid `[2]` and the scale."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, plan.tokens, 2, form.head_dim) if form.in_place else (2, 2, plan.tokens, form.head_dim)
    tensors = [
        torch.randn(shape, generator=generator, device="cpu").to(form.device, form.dtype)
        for _ in ("query", "key", "value")
    ]
    query, key, value = tensors if form.in_place else (tensor.transpose(1, 2) for tensor in tensors)
    if form.choosing:
        _tell_blocks_apart(query, key, plan)
    text_valid = torch.tensor([plan.text_len, plan.text_len // 3], device=form.device) if form.padded else None
    return query, key, value, text_valid, 1 / math.sqrt(form.head_dim)


def _tell_blocks_apart(query: torch.Tensor, key: torch.Tensor, plan: Plan | HeadPlan) -> None:
    """Gives each block its own place in the order in which it is chosen, so far from others that rounding cannot change
    it, and every other head and sample the opposite order. Changes `query` and `key` `[2, N, 2, D]`.
    """
    (candidates,) = (member.candidates for member in plan.classes if member.candidates)
    counts = torch.from_numpy(plan.summaries.counts[plan.summaries.rows_of(candidates.level)])
    # A step that shares no divisor with the number of blocks visits all of them.
    step = next(step for step in range(len(counts) // 2, 0, -1) if math.gcd(step, len(counts)) == 1)
    places = torch.arange(len(counts)) * step % len(counts) - len(counts) / 2
    opposite = torch.tensor([[1, -1], [-1, 1]])[:, None, :]
    places = _APART * places.repeat_interleave(counts)[:, None] * opposite
    query *= 0.5  # what is random weighs less
    query[..., 0] = math.sqrt(query.shape[3])
    key[:, plan.image_start : plan.image_stop, :, 0] = places.to(key.device, key.dtype)


def _definition(
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float],
    plan: Plan | HeadPlan,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The definition's output `[2, N, 2, D]` in float64, computed in `dtype`."""
    query, key, value, text_valid, scale = arguments
    outputs = query.new_empty(query.shape, dtype=torch.float64)
    heads_of = plan.heads_of if isinstance(plan, HeadPlan) else lambda number: [0, 1]
    for number, member in enumerate(plan.classes):
        heads = heads_of(number)
        own_query, own_key, own_value = (tensor[:, :, heads].to(torch.float64) for tensor in (query, key, value))
        outputs[:, :, heads] = reference.attention(
            own_query, own_key, own_value, member, text_valid, scale, compute_dtype=dtype
        )
    return outputs
