"""Padded text: keys that a sample of a batch must not attend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from grat_kernels.sequence import JointSequence


def check_text_valid(text_valid: torch.Tensor, plan: JointSequence) -> None:
    """Raises ValueError unless each of the numbers `[B]` is one of valid text tokens; waits for their device."""
    numbers = text_valid.tolist()
    if not all(0 <= number <= plan.text_len for number in numbers):
        raise ValueError(f"text_valid must lie between 0 and the plan's {plan.text_len} text tokens, not {numbers}")


def padded_positions(plan: JointSequence, text_valid: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Whether each position of the joint sequence is padded text, `[B, N]` bool from `text_valid` `[B]`."""
    position = torch.arange(plan.tokens, device=device) - plan.text_start
    return (position >= text_valid.to(device)[:, None]) & (position < plan.text_len)


def without_padding(tokens: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    """`tokens` `[B, N, H, D]` with zeros where `padded` `[B, N]`: a zero weight does not silence a NaN (0·NaN)."""
    return tokens.masked_fill(padded[:, :, None, None], 0)
