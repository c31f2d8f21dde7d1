"""Text without its padding.

Stock attention of models that mask padding runs over all of it, and the mask keeps torch from its fastest kernels.
Padding changes no prediction, so a text is cut to its longest valid length before the transformer sees it.
"""

from __future__ import annotations

from collections import deque

import torch

from grat_cli.attention.layer import Text
from grat_cli.errors import BadInput


class PaddedTexts:
    """The valid lengths of the texts of a run, from their masks.

    Reading one waits for the device, but a pipeline makes one mask for all of its steps, or with classifier-free
    guidance two that take turns, and each is read once.
    """

    def __init__(self, *, may_be_empty: bool = False) -> None:
        """Knows no text yet; `may_be_empty` lets samples have none."""
        self._least = 0 if may_be_empty else 1
        self._known: deque[tuple[torch.Tensor, Text]] = deque(maxlen=2)

    def of(self, mask: torch.Tensor) -> Text:
        """The text of a mask `[B, text]`.

        Raises:
            BadInput: if valid text does not come first, or there is none.
        """
        for known, text in self._known:
            if known is mask:
                return text
        # Counted, whatever the mask holds: `span_attention` does not check numbers that lie on a device.
        valid = mask.bool().sum(dim=1, dtype=torch.int32)
        first = torch.arange(mask.shape[1], device=mask.device)[None, :] < valid[:, None]
        lengths = valid.tolist()
        if not torch.equal(first, mask.bool()) or min(lengths) < self._least:
            raise BadInput(
                "the call's text mask has padding before or between valid tokens, or no valid token: "
                "pad prompts at their end, as the pipeline does"
            )
        longest = max(lengths)
        text = Text(longest, valid if min(lengths) < longest else None)
        self._known.append((mask, text))
        return text
