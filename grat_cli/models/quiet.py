"""What libraries say while a model is loaded, and what of it is beside the point here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_pointless_warnings() -> Iterator[None]:
    """Holds back warnings that are beside the point here; all others pass."""
    pointless = (
        # Either the cache has the model, or an error says that the hub is out of reach.
        ("diffusers.pipelines.pipeline_utils", "Couldn't connect to the Hub"),
        # What is missing is an error here, and says so itself.
        ("diffusers.models.modeling_utils", "Some weights of"),
        ("diffusers.models.modeling_utils", "An error occurred while trying to fetch"),
        ("transformers.modeling_utils", "LOAD REPORT"),
        ("transformers.modeling_utils", "This checkpoint seem corrupted"),
        # The configuration is that of a folder, and not the file's own.
        ("transformers.modeling_gguf_pytorch_utils", "Can't find a way to retrieve missing config"),
        ("transformers.configuration_utils", "Can't find a way to retrieve missing config"),
        # Said of an empty list of modules, after loading a single file.
        ("diffusers.models.modeling_utils", "kept in float32: []"),
        # They are, again.
        ("diffusers.models.modeling_utils", "that should be kept in float32"),
        # Of every guider that is made.
        ("diffusers.guiders.guider_utils", "experimental feature"),
        # Image processors have a twin that does without.
        ("transformers.utils.import_utils", "requires torchvision"),
    )
    filters = [(logging.getLogger(name), _LeavesOut(text)) for name, text in pointless]
    for logger, leaves_out in filters:
        logger.addFilter(leaves_out)
    try:
        with warnings.catch_warnings():
            # A pickle that cannot be read for it is an error.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            yield
    finally:
        for logger, leaves_out in filters:
            logger.removeFilter(leaves_out)


class _LeavesOut(logging.Filter):
    """Drops messages that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self._text not in record.getMessage()


@contextmanager
def without_bars() -> Iterator[None]:
    """Loading from disk shows no progress bars of its own. Downloads, which take minutes, keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
