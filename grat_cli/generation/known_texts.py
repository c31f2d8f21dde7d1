"""Texts of requests that have been encoded before, on this machine and by the same encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import CannotWrite
from grat_cli.estimates.stages import Stage
from grat_cli.families.guidance import encoded_negative
from grat_cli.generation.request import Progress, Request
from grat_cli.models.text_cache import Embedded, encoders_identity, is_kept, text_cache, text_key

if TYPE_CHECKING:
    import torch


def negative_of(request: Request, stages: Sequence[Stage]) -> str | None:
    """The negative prompt that is encoded for all stages of an output; None where none is."""
    negatives = (encoded_negative(request.model, stage.preset, request.negative_prompt) for stage in stages)
    return next((negative for negative in negatives if negative is not None), None)


class KnownTexts:
    """Embeddings by request, read from the user's cache and kept there.

    Attributes:
        all_known: whether those of all requests were there when the model was loaded, which then has no encoders.
    """

    def __init__(self, texts: Sequence[tuple[Request, str | None]], device: torch.device, progress: Progress) -> None:
        """Nothing is read yet.

        Args:
            texts: requests that differ in prompt, negative prompt and pictures alone, and what is encoded as negative
                prompt of each.
            device: where encoders run.
            progress: told of what cannot be kept.
        """
        self._texts, self._device, self._progress = texts, device, progress
        self._identity: Mapping[str, Any] | None = None
        self._found: dict[str, Embedded] = {}
        self.all_known = False

    def look(self, folder: Path, dtypes: Mapping[str, torch.dtype]) -> bool:
        """Looks for all texts, and returns whether all are known.

        Args:
            folder: of the pipeline's parts.
            dtypes: of these.
        """
        request, _ = self._texts[0]
        if not request.text_cache:
            return False
        try:
            self._identity = encoders_identity(folder, request.model, dtypes, request.weights, self._device)
        except OSError:  # loading says more of what is wrong
            return False
        self.all_known = all([self.find(*text) is not None for text in self._texts])
        return self.all_known

    def find(self, request: Request, negative: str | None) -> Embedded | None:
        """The text of a request; None where it is not known."""
        key = self._key(request, negative)
        if key is None:
            return None
        if key not in self._found and (held := text_cache().read(key)) is not None:
            self._found[key] = held
        return self._found.get(key)

    def keep(self, request: Request, negative: str | None, text: Embedded) -> None:
        """Keeps a text for the next time. A run does not end because there is no room for them."""
        key = self._key(request, negative)
        if key is None:
            return
        try:
            text_cache().write(key, text)
        except CannotWrite as error:
            reason = str(error).partition(": use --overwrite")[0]
            self._progress.note(f"{reason}: the prompt is encoded again the next time; --no-text-cache does without")

    def _key(self, request: Request, negative: str | None) -> str | None:
        """The name of its entry; None where embeddings are not kept."""
        if self._identity is None or not is_kept(request.model, request.kinds, request.weights):
            return None
        pipeline = request.family.pipeline_of(request.model, request.model.needs | request.kinds)
        return text_key({**self._identity, "pipeline": pipeline.__name__}, request.prompt, negative)
