"""`span_attention`: one signature over every backend."""

from __future__ import annotations

import math

import torch

from grat_kernels import reference
from grat_kernels.backends import KERNELS, MODULES, Backend, BackendUnavailable, can_run, check_kernel, tried_backend
from grat_kernels.launching import heads_of_class
from grat_kernels.padded_text import check_text_valid
from grat_kernels.plan import HeadPlan, Plan, plan_by_key
from grat_kernels.self_test import form_of


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
        backend: `AUTO` picks, and passes over what fails its test, with a warning; any other runs or raises.
        summaries: means of keys and of values over the plan's blocks where they are known already, `[B, R, H, D]`
            each, as `rope_norm` makes them; else they are computed here.

    Returns:
        `[B, N, H, D]`, contiguous, in the dtype of `q`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another or the plan, or there cannot be so much text.
        RuntimeError: if a gradient would be wanted.
        BackendUnavailable: if the named backend cannot run these tensors, with the reason.
        KernelFailure: if the kernel that is named, at its first use, computes wrong results on this machine, or none.
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
    if backend is not Backend.AUTO:
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
    if chosen is Backend.AUTO:
        chosen, _ = tried_backend([form_of(q, k, v, plan, text_valid)])
    elif chosen in KERNELS:
        check_kernel(chosen, [form_of(q, k, v, plan, text_valid)])
    if chosen in KERNELS:
        return MODULES[chosen].attention(q, k, v, plan, text_valid, scale, summaries=summaries).contiguous()
    run = reference.attention if chosen is Backend.REFERENCE else MODULES[chosen].attention
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
def _(q: torch.Tensor, *_others: object) -> torch.Tensor:
    return q.new_empty(q.shape)
