"""Where prompts are cut that are longer than a text encoder takes: seen as pipelines read them, whatever the family.

Pipelines cut without a word, or in words of a library's own; here tokenizers are watched while they do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

_SHOWN = 40  # characters before the cut
_OF_PIPELINES = "The following part of your input was truncated"
_OF_TOKENIZERS = "Token indices sequence length is longer"


@dataclass(frozen=True)
class Cut:
    """A text that an encoder did not read to its end.

    Attributes:
        encoder: class of the encoder.
        text: as the tokenizer got it, with what a template puts around it.
        end: characters of it that were read.
        tokens: that were read.
        whole: tokens of all of it.
    """

    encoder: str
    text: str
    end: int
    tokens: int
    whole: int

    def end_in(self, prompt: str) -> int | None:
        """Characters of a prompt that were read; None where it was all of them, or the text is of another one."""
        prompt = prompt.strip()  # as templates and pipelines do
        begin = self.text.find(prompt)
        if begin < 0:
            begin = 0
            # As pipelines tidy prompts up, of which the spaces are the common part.
            if " ".join(self.text.split())[:_SHOWN] != " ".join(prompt.split())[:_SHOWN]:
                return None
        end = max(0, self.end - begin)
        return end if end < len(prompt) else None


def notes(cuts: Sequence[Cut], prompt: str, negative: str | None) -> list[str]:
    """A sentence for each encoder and prompt that was cut.

    Args:
        cuts: that were seen.
        prompt: as typed.
        negative: likewise, or None.
    """
    said = []
    for what, typed in (("prompt", prompt), ("negative prompt", negative or "")):
        for cut in cuts if typed else ():
            end = cut.end_in(typed)
            if end is None:
                continue
            read = " ".join(cut.text[cut.end - end : cut.end].split())
            shown = f"up to “{'…' if len(read) > _SHOWN else ''}{read[-_SHOWN:].lstrip()}”" if read else "none of it"
            said.append(f"the {what} is cut: {cut.encoder} reads {cut.tokens} of its {cut.whole} tokens, {shown}")
    return list(dict.fromkeys(said))


@contextmanager
def watched(pipe: Any, longest: int | None = None) -> Iterator[list[Cut]]:
    """Sees what the tokenizers of a pipeline cut; what libraries print of that is held back.

    Args:
        pipe: that encodes prompts within the block.
        longest: tokens of a text of which the pipeline takes embeddings, where that is fewer than its tokenizer takes.

    Yields:
        The cuts so far.
    """
    from transformers import PreTrainedTokenizerBase

    cuts: list[Cut] = []
    with ExitStack() as stack:
        stack.enter_context(_without(_OF_TOKENIZERS, logging.getLogger(PreTrainedTokenizerBase.__module__)))
        for kind in type(pipe).__mro__:
            stack.enter_context(_without(_OF_PIPELINES, logging.getLogger(kind.__module__)))
        for name, part in pipe.components.items():
            tokenizer = getattr(part, "tokenizer", part)  # of a processor
            if isinstance(tokenizer, PreTrainedTokenizerBase):
                encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"), None)
                encoder = encoder or pipe.components.get("text_encoder")
                stack.enter_context(_watching(tokenizer, type(encoder).__name__, longest, cuts))
        yield cuts


@contextmanager
def _watching(tokenizer: Any, encoder: str, longest: int | None, cuts: list[Cut]) -> Iterator[None]:
    """Lets a tokenizer tell what it cuts: by a class of its own, which a call looks itself up in."""
    own = type(tokenizer)
    if getattr(own, "is_watched", False):  # of a processor and by itself
        yield
        return

    class Watched(own):
        is_watched = True

        def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
            made = super().__call__(text, *args, **options)
            if not args:
                most = options.get("max_length") if options.get("truncation") is True else None
                most = min((limit for limit in (most, longest) if limit is not None), default=None)
                for one in [text] if isinstance(text, str) else text if isinstance(text, list) else []:
                    if most is not None and isinstance(one, str):
                        cuts.extend(_cut(super().__call__, self, one, most, options, encoder))
            return made

    Watched.__name__, Watched.__qualname__ = own.__name__, own.__qualname__
    tokenizer.__class__ = Watched
    try:
        yield
    finally:
        tokenizer.__class__ = own


def _cut(call: Any, tokenizer: Any, text: str, most: int, options: dict[str, Any], encoder: str) -> list[Cut]:
    """What a tokenizer cuts of a text at so many tokens: nothing, or one."""
    special = options.get("add_special_tokens", True)
    whole = call(text, add_special_tokens=special, truncation=False, padding=False)["input_ids"]
    if len(whole) <= most:
        return []
    added = tokenizer.num_special_tokens_to_add(pair=False) if special else 0
    bare = call(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
    kept = max(0, most - added)
    end = len(tokenizer.decode(bare[:kept], skip_special_tokens=False))
    if tokenizer.is_fast:
        places = call(
            text,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_offsets_mapping=True,
        )["offset_mapping"]
        end = places[kept - 1][1] if kept else 0
    return [Cut(encoder, text, end, kept, len(bare))]


@contextmanager
def _without(text: str, logger: logging.Logger) -> Iterator[None]:
    """Holds back what a logger says with a text."""

    def passes(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
