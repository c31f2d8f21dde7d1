"""`span_attention`: one signature over every backend, and what each backend can run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from grat_kernels import (
    flex_backend,
    gluon_backend,
    reference,
    sdpa_backend,
    self_test,
    triton_backend,
    ws_backend,
)
from grat_kernels.launching import heads_of_class
from grat_kernels.padded_text import check_text_valid
from grat_kernels.plan import HeadPlan, Plan, plan_by_key
from grat_kernels.self_test import KernelMismatch as KernelMismatch


class Backend(str, Enum):
    """How span attention is computed. `AUTO` picks; a backend chosen by name runs or says why it cannot."""

    AUTO = "auto"
    REFERENCE = "reference"
    SDPA = "sdpa"
    FLEX = "flex"
    TRITON = "triton"
    TRITON_WS = "triton-ws"
    GLUON = "gluon"


# Backends that say what they need.
_MODULES = {
    Backend.SDPA: sdpa_backend,
    Backend.FLEX: flex_backend,
    Backend.TRITON: triton_backend,
    Backend.TRITON_WS: ws_backend,
    Backend.GLUON: gluon_backend,
}
# Kernels of our own, the fastest first. One launch serves all classes of heads, and each is tested before it is used.
KERNELS = (Backend.GLUON, Backend.TRITON_WS, Backend.TRITON)
# Those that attend blocks chosen by content.
_CHOOSING = (Backend.REFERENCE, Backend.SDPA, Backend.TRITON)


@dataclass(frozen=True)
class Ability:
    """Whether a backend can run, and the reason in words, also where it can. True in a condition where it can."""

    able: bool
    reason: str

    def __bool__(self) -> bool:
        return self.able


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name where it cannot run."""


def can_run(
    backend: Backend | str,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    tokens: int | None = None,
    *,
    choosing: bool = False,
) -> Ability:
    """Whether a backend runs on a device for a dtype, head dimension and sequence length; never raises.

    Args:
        backend: a backend by name; for `AUTO` the answer names the choice.
        device: where the tensors lie.
        dtype: dtype of query, key and value.
        head_dim: channels per head.
        tokens: length of the joint sequence, where known: some backends are for small sizes only.
        choosing: whether groups choose by content what they attend (`Plan.chooses`).
    """
    backend, device = Backend(backend), torch.device(device)
    if backend is Backend.AUTO:
        choice, reason = choose_backend(device, dtype, head_dim, choosing=choosing)
        return Ability(True, f"{choice.value}: {reason}")
    if backend is Backend.REFERENCE:
        return Ability(True, "dense masks in fp32, for small sizes")
    obstacle = _obstacle(backend, device, dtype, head_dim, tokens, choosing)
    return Ability(obstacle is None, obstacle or _MODULES[backend].DESCRIPTION)


def _obstacle(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int | None, choosing: bool
) -> str | None:
    """Why a backend cannot run, or None; arguments as for `can_run`."""
    obstacle = _MODULES[backend].obstacle(device, dtype, head_dim, tokens)
    if obstacle is None and choosing and backend not in _CHOOSING:
        return "it does not attend blocks chosen by content: use triton or sdpa"
    return obstacle


def choose_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, choosing: bool = False
) -> tuple[Backend, str]:
    """The backend that `AUTO` stands for, and why; arguments as for `can_run`.

    Triton's interpreter is for tests and never chosen.
    """
    if device.type != "cuda":
        return Backend.SDPA, f"the fastest on {device.type}"
    obstacles = []
    for backend in KERNELS:
        obstacle = _obstacle(backend, device, dtype, head_dim, None, choosing)
        if obstacle is None:
            return backend, "; ".join(["the fastest that runs on this device", *obstacles[:1]])
        obstacles.append(f"{backend.value} cannot run here: {obstacle}")
    return Backend.SDPA, obstacles[-1]


def check_kernel(
    backend: Backend | str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    far: bool,
    padded: bool = False,
    choosing: bool = False,
) -> None:
    """Tests a kernel of ours now, and not at its first use, where the wait would disturb; others need no test.

    Args:
        backend: any but `AUTO`.
        device: where the tensors will lie.
        dtype: of the tensors to come.
        head_dim: channels per head.
        far: whether they will attend summaries.
        padded: whether `text_valid` will be given.
        choosing: whether groups will choose by content what they attend.

    Raises:
        KernelMismatch: if the kernel computes wrong results on this machine.
    """
    backend = Backend(backend)
    if backend in KERNELS:
        form = self_test.Form(torch.empty(0, device=device).device, dtype, head_dim, far, padded, choosing=choosing)
        self_test.check(backend.value, _MODULES[backend].attention, form)


def span_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan | HeadPlan,
    text_valid: torch.Tensor | None = None,
    scale: float | None = None,
    backend: Backend | str = Backend.AUTO,
    summaries: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attention of every query to the spans of its group (arXiv 2505.14687, section 3; far levels are this project's).

    A query without any key, such as one that attends text alone where none is valid, gets zeros. There is no backward
    pass.

    Args:
        q: queries `[B, N, H, D]`: image tokens in the plan's order, text before or after them as the plan says.
        k: keys `[B, N, H, D]`.
        v: values `[B, N, H, D]`.
        plan: what attends what, for N tokens; a `HeadPlan` for H heads.
        text_valid: valid text tokens of each sample, `[B]` integers on the device of `q`: later text keys are not
            attended. None means that all are valid. They are checked where they lie on the CPU; elsewhere that would
            wait for the device, and whoever makes them answers for them.
        scale: factor on the scores, 1/√D by default.
        backend: `AUTO` picks; any other runs or raises.
        summaries: means of keys and of values over the plan's blocks where they are known already, `[B, R, H, D]`
            each, as `rope_norm` makes them; else they are computed here.

    Returns:
        `[B, N, H, D]`, contiguous, in the dtype of `q`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another or the plan, or there cannot be so much text.
        RuntimeError: if a gradient would be wanted.
        BackendUnavailable: if the named backend cannot run these tensors, with the reason.
        KernelMismatch: if the kernel, at its first use, computes wrong results on this machine.
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"q, k and v must share one shape [B, N, H, D], not {[tuple(t.shape) for t in (q, k, v)]}")
    if q.shape[1] != plan.tokens:
        raise ValueError(f"the plan is for {plan.tokens} tokens, the tensors have {q.shape[1]}")
    if isinstance(plan, HeadPlan) and q.shape[2] != len(plan.class_of_head):
        raise ValueError(f"the plan is for {len(plan.class_of_head)} heads, the tensors have {q.shape[2]}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError("q, k and v must share one dtype and one device")
    if text_valid is not None and text_valid.shape != (q.shape[0],):
        raise ValueError(f"text_valid needs one number per sample, [{q.shape[0]}], not {list(text_valid.shape)}")
    if summaries is not None:
        _check_summaries(summaries, k, plan)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("span attention has no backward pass: call it under torch.no_grad(), or detach its inputs")
    backend = Backend(backend)
    if backend is Backend.AUTO:
        backend, _ = choose_backend(q.device, q.dtype, q.shape[3], choosing=plan.chooses)
    else:
        ability = can_run(backend, q.device, q.dtype, q.shape[3], q.shape[1], choosing=plan.chooses)
        if not ability:
            raise BackendUnavailable(f"the {backend.value} backend cannot run here: {ability.reason}")
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return _operator(q, k, v, text_valid, *(summaries or (None, None)), plan.key, scale, backend.value)


def _check_summaries(summaries: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, plan: Plan | HeadPlan) -> None:
    """Raises ValueError unless these can be the summaries of the plan for keys like `k`."""
    batch, _, heads, head_dim = k.shape
    shape = (batch, plan.summaries.rows, heads, head_dim)
    if not plan.summaries.rows:
        raise ValueError("the plan has no far field, so there are no summaries to give")
    if any(tensor.shape != shape for tensor in summaries):
        raise ValueError(f"summaries must be {shape} for this plan, not {[tuple(t.shape) for t in summaries]}")
    if any(tensor.dtype != k.dtype or tensor.device != k.device for tensor in summaries):
        raise ValueError("summaries must have the dtype and device of k and v")


@torch.library.custom_op("grat::span_attention", mutates_args=())
def _operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_valid: torch.Tensor | None,
    summary_key: torch.Tensor | None,
    summary_value: torch.Tensor | None,
    plan_key: int,
    scale: float,
    backend: str,
) -> torch.Tensor:
    """The operator that torch.compile sees; a plan travels as its key, because operators take no objects."""
    plan = plan_by_key(plan_key)
    # Here and not in `span_attention`, where compiled code cannot read numbers.
    if text_valid is not None and text_valid.device.type == "cpu":
        check_text_valid(text_valid, plan)
    summaries = None
    if summary_key is not None and summary_value is not None:
        summaries = summary_key.contiguous(), summary_value.contiguous()
    chosen = Backend(backend)
    if chosen in KERNELS:
        kernel = _MODULES[chosen].attention
        self_test.check(backend, kernel, self_test.form_of(q, k, v, plan, text_valid))
        return kernel(q, k, v, plan, text_valid, scale, summaries=summaries).contiguous()
    run = reference.attention if chosen is Backend.REFERENCE else _MODULES[chosen].attention
    if isinstance(plan, Plan):
        return run(q, k, v, plan, text_valid, scale, summaries=summaries).contiguous()
    # These take one class of heads at a time.
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for number, member in enumerate(plan.classes):
        heads = heads_of_class(plan, number, q.device)
        of_heads = None if summaries is None else (_of_heads(summaries[0], heads), _of_heads(summaries[1], heads))
        query, key, value = _of_heads(q, heads), _of_heads(k, heads), _of_heads(v, heads)
        attended = run(query, key, value, member, text_valid, scale, summaries=of_heads)
        if isinstance(heads, slice):
            out[:, :, heads] = attended
        else:
            out.index_copy_(2, heads, attended)
    return out


def _of_heads(tensor: torch.Tensor, heads: slice | torch.Tensor) -> torch.Tensor:
    """`[B, N, some heads, D]`; `index_select` copies runs of channels at once, which an index does not."""
    return tensor[:, :, heads] if isinstance(heads, slice) else tensor.index_select(2, heads)


@_operator.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_valid: torch.Tensor | None,
    summary_key: torch.Tensor | None,
    summary_value: torch.Tensor | None,
    plan_key: int,
    scale: float,
    backend: str,
) -> torch.Tensor:
    return q.new_empty(q.shape)
