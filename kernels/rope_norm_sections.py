"""What `rope_norm` reads and writes, text and image apart, and what it computes, by torch: the kernel's definition."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from grat_kernels.summaries import summarise

if TYPE_CHECKING:
    from grat_kernels.plan import JointSequence


class Projections(NamedTuple):
    """Query, key and value as projected, `[B, rows, H, D]` each, of any strides."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Norms(NamedTuple):
    """RMS norms of queries and keys.

    Attributes:
        query: weight of the norm of queries, `[D]`; None for a norm without weights.
        key: likewise.
        eps: added to the mean square; positive.
    """

    query: torch.Tensor | None
    key: torch.Tensor | None
    eps: float


class Outputs(NamedTuple):
    """What is written, all contiguous.

    Attributes:
        query: `[B, N, H, D]`.
        key: `[B, N, H, D]`.
        value: `[B, N, H, D]`; None where the one given is joint already.
        summary_key: `[B, R, H, D]`; None without far field.
        summary_value: likewise.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor | None
    summary_key: torch.Tensor | None
    summary_value: torch.Tensor | None


def empty_outputs(query: torch.Tensor, tokens: int, summary_rows: int, text_apart: bool) -> Outputs:
    """Tensors to write to: of the joint sequence of `tokens`, and of `summary_rows` summaries."""
    batch, _, heads, head_dim = query.shape

    def empty(rows: int) -> torch.Tensor:
        return query.new_empty(batch, rows, heads, head_dim)

    return Outputs(
        empty(tokens),
        empty(tokens),
        empty(tokens) if text_apart else None,
        empty(summary_rows) if summary_rows else None,
        empty(summary_rows) if summary_rows else None,
    )


class Section(NamedTuple):
    """Text or image: a part of the joint sequence that is treated alike.

    Attributes:
        start: its first position in the joint sequence.
        length: its tokens.
        projections: tensors that hold it.
        row: position in the joint sequence of row 0 of `projections`.
        norms: of its queries and keys.
        rotation: cosines and sines, `[rows, D]` each; None for no rotation.
        rotation_row: position in the joint sequence of row 0 of `rotation`.
    """

    start: int
    length: int
    projections: Projections
    row: int
    norms: Norms
    rotation: tuple[torch.Tensor, torch.Tensor] | None
    rotation_row: int


def sections_of(
    image: Projections,
    norms: Norms,
    text: Projections | None,
    text_norms: Norms,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    plan: JointSequence,
) -> tuple[Section, Section]:
    """The text section, then the image section."""
    rotates_text = rotation is not None and rotation[0].shape[0] == plan.tokens
    return (
        Section(
            plan.text_start,
            plan.text_len,
            image if text is None else text,
            0 if text is None else plan.text_start,
            text_norms,
            rotation if rotates_text else None,
            0,
        ),
        Section(
            plan.image_start,
            plan.image_tokens,
            image,
            0 if text is None else plan.image_start,
            norms,
            rotation,
            0 if rotates_text else plan.image_start,
        ),
    )


def compute(sections: tuple[Section, Section], outputs: Outputs, plan: JointSequence) -> None:
    """By torch, on any device: the definition of the kernel."""
    for section in sections:
        positions = slice(section.start, section.start + section.length)
        rows = slice(positions.start - section.row, positions.stop - section.row)
        rotation = section.rotation
        if rotation is not None:
            turns = slice(positions.start - section.rotation_row, positions.stop - section.rotation_row)
            rotation = rotation[0][turns], rotation[1][turns]
        query, key, value = section.projections
        outputs.query[:, positions] = _normalised_and_rotated(
            query[:, rows], section.norms.query, section.norms.eps, rotation
        )
        outputs.key[:, positions] = _normalised_and_rotated(
            key[:, rows], section.norms.key, section.norms.eps, rotation
        )
        if outputs.value is not None:
            outputs.value[:, positions] = value[:, rows]
    if outputs.summary_key is not None and outputs.summary_value is not None:
        value = sections[1].projections.value if outputs.value is None else outputs.value
        outputs.summary_key.copy_(summarise(outputs.key, plan))
        outputs.summary_value.copy_(summarise(value, plan))


def _normalised_and_rotated(
    tokens: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Tokens `[B, n, H, D]`, normalised and rotated by cosines and sines `[n, D]`, in fp32 or wider."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide = wide * weight
    if rotation is None:
        return wide
    real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    cosines, sines = (table.to(wide.dtype)[:, None] for table in rotation)
    return wide * cosines + turned * sines
