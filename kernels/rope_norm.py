"""RMS norm and rotary embedding of queries and keys, text and image joined, far field pooled: one pass over each.

After the projections, a transformer block normalises queries and keys, rotates their positions in, and joins text and
image; then far-field attention needs means of keys and values. Done one after the other that reads and writes every
tensor several times. Here each is read and written once, by a Triton kernel where one runs and else by torch, in the
same arithmetic: all in fp32, rounded to the tensors' dtype at the end. Stock diffusers rounds in between as well,
after the norm (torch.nn.RMSNorm, Flux) or before and after its weight (diffusers' RMSNorm, HunyuanVideo).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from grat_kernels import rope_norm_runs, trials
from grat_kernels.launching import triton_obstacle
from grat_kernels.plan import plan_by_key
from grat_kernels.rope_norm_check import compare
from grat_kernels.rope_norm_sections import Norms as Norms
from grat_kernels.rope_norm_sections import Projections as Projections
from grat_kernels.rope_norm_sections import compute, empty_outputs, sections_of
from grat_kernels.trials import Form, KernelFailure

if TYPE_CHECKING:
    from grat_kernels.sequence import JointSequence

# As trials know it.
NAME = "rope_norm"

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256


class Joined(NamedTuple):
    """The joint sequence as `span_attention` takes it.

    Attributes:
        query: normalised and rotated, `[B, N, H, D]`.
        key: likewise.
        value: `[B, N, H, D]`: the one given where that was joint already.
        summaries: means of key and value over the plan's blocks, `[B, R, H, D]` each; None without far field.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    summaries: tuple[torch.Tensor, torch.Tensor] | None


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel cannot run, in words, or None where it can. Never raises.

    Args:
        device: where the tensors lie.
        dtype: dtype of query, key and value.
        head_dim: channels per head.
    """
    if dtype not in _DTYPES:
        return f"it takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not 2 <= head_dim <= _MAX_HEAD_DIM or head_dim % 2:
        return f"it takes even head dimensions up to {_MAX_HEAD_DIM}, not {head_dim}"
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter cuts bfloat16 off instead of rounding: use float16 or float32 there"
    return triton_obstacle(device)


def choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    """Whether the kernel is the way to go, and why; it is tried for that. Triton's interpreter is for tests and never
    chosen."""
    if device.type != "cuda":
        return False, f"the fused kernel is for CUDA and ROCm devices, not for {device.type}"
    if (reason := obstacle(device, dtype, head_dim)) is not None:
        return False, f"the fused kernel cannot run here: {reason}"
    try:
        trials.require(NAME, [Form(device, dtype, head_dim)], compare)
    except KernelFailure as failure:
        return False, trials.pass_over(failure)
    return True, "fused kernel"


def rope_norm(
    image: Projections,
    norms: Norms,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    plan: JointSequence,
    *,
    text: Projections | None = None,
    text_norms: Norms | None = None,
    fused: bool | None = None,
) -> Joined:
    """Normalises and rotates queries and keys, joins text and image, and pools the far field.

    Args:
        image: projections of the image tokens in the plan's order; without `text`, of the whole joint sequence.
        norms: norms of queries and keys of `image`.
        rotation: cosines and sines of each channel, `[rows, D]`, as `diffusers.models.embeddings.apply_rotary_emb`
            takes them with `use_real_unbind_dim=-1`: rows for the joint sequence (Flux), or for its image tokens
            alone, and then text is not rotated (HunyuanVideo). None for no rotation.
        plan: the order of the joint sequence and the blocks of its far field.
        text: projections of the text tokens where they are apart.
        text_norms: norms of queries and keys of `text`.
        fused: whether by the Triton kernel or by torch; by default what `choose` says.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit one another or the plan, or `fused` is wanted where the
            kernel cannot run.
    """
    _check(image, norms, rotation, plan, text, text_norms)
    device, dtype, head_dim = image.query.device, image.query.dtype, image.query.shape[3]
    if fused is None:
        fused, _ = choose(device, dtype, head_dim)
    elif fused and (reason := obstacle(device, dtype, head_dim)):
        raise ValueError(f"the fused kernel cannot run here: {reason}")
    text_norms = text_norms or norms
    cosines, sines = rotation or (None, None)
    made = _operator(
        *image,
        *(text or (None, None, None)),
        norms.query,
        norms.key,
        text_norms.query,
        text_norms.key,
        cosines,
        sines,
        norms.eps,
        text_norms.eps,
        plan.key,
        plan.summaries.rows,
        fused,
    )
    query, key, value = made[0], made[1], image.value if text is None else made[2]
    return Joined(query, key, value, (made[-2], made[-1]) if plan.summaries.rows else None)


def _check(
    image: Projections,
    norms: Norms,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    plan: JointSequence,
    text: Projections | None,
    text_norms: Norms | None,
) -> None:
    """Raises ValueError as `rope_norm` says."""
    if (text is None) != (text_norms is None):
        raise ValueError("text and text_norms go together: give both or neither")
    if plan.segments.tokens != plan.text_len:
        raise ValueError(f"the plan has tokens besides image and text, which are not prepared here: {plan.segments}")
    batch, _, heads, head_dim = image.query.shape
    rows = plan.tokens if text is None else plan.image_tokens
    expected = [("image" if text else "joint", image, rows)]
    if text is not None:
        expected.append(("text", text, plan.text_len))
    for name, projections, length in expected:
        shape = (batch, length, heads, head_dim)
        if any(tensor.shape != shape for tensor in projections):
            shapes = [tuple(tensor.shape) for tensor in projections]
            raise ValueError(f"the {name} query, key and value must be {shape} for this plan, not {shapes}")
    if head_dim % 2:
        raise ValueError(f"channels are rotated in pairs: the head dimension must be even, not {head_dim}")
    if not (norms.eps > 0 and (text_norms or norms).eps > 0):
        raise ValueError("eps must be positive: a token of zeros has no direction")
    tensors = [*image, *(text or ())]
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
        raise ValueError(f"projections must share one dtype, not {[tensor.dtype for tensor in tensors]}")
    weights = [weight for pair in (norms, text_norms or norms) for weight in pair[:2] if weight is not None]
    if any(weight.shape != (head_dim,) for weight in weights):
        raise ValueError(f"norm weights must be [{head_dim}], not {[tuple(weight.shape) for weight in weights]}")
    for table in rotation or ():
        if table.shape not in ((plan.tokens, head_dim), (plan.image_tokens, head_dim)):
            raise ValueError(
                f"cosines and sines must be [{plan.tokens}, {head_dim}], or [{plan.image_tokens}, {head_dim}] to "
                f"rotate image tokens alone, not {tuple(table.shape)}"
            )
    if rotation and rotation[0].shape != rotation[1].shape:
        raise ValueError(f"cosines {tuple(rotation[0].shape)} and sines {tuple(rotation[1].shape)} differ in shape")
    devices = {tensor.device for tensor in (*tensors, *weights, *(rotation or ()))}
    if len(devices) > 1:
        raise ValueError(f"projections, norm weights, cosines and sines must share one device, not {devices}")


@torch.library.custom_op("grat::rope_norm", mutates_args=())
def _operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    text_query: torch.Tensor | None,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    text_query_weight: torch.Tensor | None,
    text_key_weight: torch.Tensor | None,
    cosines: torch.Tensor | None,
    sines: torch.Tensor | None,
    eps: float,
    text_eps: float,
    plan_key: int,
    summary_rows: int,
    fused: bool,
) -> list[torch.Tensor]:
    """The operator that torch.compile sees: query, key, value if text was apart, and summaries if there are any."""
    plan = plan_by_key(plan_key)
    text = None
    if text_query is not None and text_key is not None and text_value is not None:
        text = Projections(text_query, text_key, text_value)
    rotation = None if cosines is None or sines is None else (cosines, sines)
    sections = sections_of(
        Projections(query, key, value),
        Norms(query_weight, key_weight, eps),
        text,
        Norms(text_query_weight, text_key_weight, text_eps),
        rotation,
        plan,
    )
    outputs = empty_outputs(query, plan.tokens, summary_rows, text is not None)
    if fused:
        trials.require(NAME, [Form(query.device, query.dtype, query.shape[3])], compare)
        rope_norm_runs.launch(sections, outputs, plan)
    else:
        compute(sections, outputs, plan)
    return [tensor for tensor in outputs if tensor is not None]


@_operator.register_fake
def _(
    query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor, text_query: torch.Tensor | None, *others: Any
) -> list[torch.Tensor]:
    *_, summary_rows, _fused = others
    tokens = query.shape[1] + (0 if text_query is None else text_query.shape[1])
    outputs = empty_outputs(query, tokens, summary_rows, text_query is not None)
    return [tensor for tensor in outputs if tensor is not None]
