"""The comparison of span attention by a kernel with its definition, on small ragged problems: see `trials`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from grat_kernels import reference
from grat_kernels.geometry import Grid, Grouping
from grat_kernels.launching import fits_descriptor
from grat_kernels.pattern import Block, Choice, CrissCross, Far, Full, Pattern, Union
from grat_kernels.plan import HeadPlan, Plan, build_head_plan, build_plan
from grat_kernels.trials import Form, failed

Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Plan | HeadPlan, torch.Tensor | None, float], torch.Tensor
]


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


def compare(backend: str, attention: Attention, form: Form) -> None:
    """Compares a kernel with the definition in one form.

    Args:
        backend: by name.
        attention: its function: query, key, value, plan, text_valid, scale.
        form: what is about to be used.

    Raises:
        KernelFailure: if rounding cannot explain the difference.
    """
    side = _INTERPRETED_SIDE if form.device.type == "cpu" else _SIDE
    for plan in _plans(side, form.far, form.by_head, form.choosing):
        arguments = _problem(plan, form)
        exact = _definition(arguments, plan, torch.float64)
        plain = _definition(arguments, plan, form.dtype)
        output = attention(*arguments[:3], plan, *arguments[3:])
        require_close(f"the {backend} kernel", output, plain, exact)


def require_close(name: str, output: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Stops the run if a kernel's output has more than twice the error of plain arithmetic and one unit in the last
    place.

    Args:
        name: of the kernel.
        output: what it computed.
        plain: the same by a plain computation in the same precision.
        exact: the same in float64.

    Raises:
        KernelFailure: naming the versions and what to do.
    """
    bound = 2 * (plain - exact).abs().max() + torch.finfo(output.dtype).eps * exact.abs().max()
    error = (output - exact).abs().max()
    if error <= bound:
        return
    dtype = str(output.dtype).removeprefix("torch.")
    found = f"an error of {float(error):.2g} where rounding explains {float(bound):.2g}"
    raise failed(f"{name} computes wrong results here: {found}, {dtype}, {output.shape[-1]} channels", output.device)


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
    else:
        query *= 4  # so that a maximum rises by so much that what is summed up is rescaled
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
