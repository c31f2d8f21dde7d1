"""Loading of pipelines: from the hub, a folder, or a file of a transformer and the other parts from elsewhere."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.devices import is_out_of_memory
from grat_cli.errors import BadInput, ModelUnavailable
from grat_cli.models import ModelChoice

if TYPE_CHECKING:
    import torch

OFFLOADS = ("none", "model", "sequential")


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline that is ready to run, and the commit of its weights where it is known."""

    pipe: Any
    revision: str | None


def load_model(
    choice: ModelChoice,
    *,
    device: torch.device,
    dtype: torch.dtype,
    offload: str = "none",
    image_to_image: bool = False,
    base: str | None = None,
) -> LoadedModel:
    """Loads a model and puts it on a device.

    Args:
        choice: which model.
        device: where it runs.
        dtype: of weights and activations.
        offload: `none`; `model` keeps one part at a time on the device; `sequential` one layer at a time.
        image_to_image: a `FluxImg2ImgPipeline` in place of a `FluxPipeline`.
        base: folder or hub id with the other parts of a pipeline, for a file that holds a transformer alone.

    Raises:
        ModelUnavailable: if it is missing, gated, damaged or out of reach, with what to do.
        BadInput: if offload and device do not fit.
    """
    if offload not in OFFLOADS:
        raise BadInput(f"unknown offload {offload!r}: choose from {', '.join(OFFLOADS)}")
    if offload != "none" and device.type == "cpu":
        raise BadInput("--offload moves parts of the model off a GPU, and the run is on the CPU: leave it out")
    with _without_known_warnings():
        pipe, folder = _load(choice, dtype, image_to_image, base)
    pipe.set_progress_bar_config(disable=True)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return LoadedModel(pipe, _revision(folder) if choice.kind == "hub" else None)


def _load(choice: ModelChoice, dtype: torch.dtype, image_to_image: bool, base: str | None) -> tuple[Any, Path]:
    """The pipeline on the CPU, and the folder that it was read from."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline

    pipeline = FluxImg2ImgPipeline if image_to_image else FluxPipeline
    if choice.kind != "file":
        folder = Path(choice.source) if choice.kind == "folder" else _download(pipeline, choice.source)
        with _damage_of(choice.name), _without_bars():
            return pipeline.from_pretrained(folder, dtype=dtype), folder

    if base is None:
        raise ModelUnavailable(
            f"{choice.name} holds a transformer alone: give the other parts of the pipeline with --base, "
            "a folder or a hub id such as --base black-forest-labs/FLUX.1-dev"
        )
    folder = Path(base).expanduser()
    if not folder.is_dir():
        # A component that is passed is not downloaded.
        folder = _download(pipeline, base, transformer=None)
    with _damage_of(choice.name), _without_bars():
        transformer = FluxTransformer2DModel.from_single_file(
            choice.source, config=str(folder), subfolder="transformer", dtype=dtype
        )
    with _damage_of(base), _without_bars():
        return pipeline.from_pretrained(folder, transformer=transformer, dtype=dtype), folder


def _download(pipeline: Any, hub_id: str, **passed: Any) -> Path:
    """The snapshot folder of a hub id, downloaded where it is not in the cache."""
    try:
        return Path(pipeline.download(hub_id, **passed))
    except Exception as error:
        raise ModelUnavailable(_why_not_downloaded(error, hub_id)) from error


def _why_not_downloaded(error: BaseException, hub_id: str) -> str:
    """What to do about a failed download; diffusers wraps the hub's own error, so the whole chain is read."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    demo = "or use --model demo"
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    status = next((found.response.status_code for found in chain if isinstance(found, HfHubHTTPError)), None)
    if any(isinstance(found, GatedRepoError) for found in chain) or status == 403:
        return (
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, "
            f"then log in with `hf auth login`, {demo}"
        )
    if any(isinstance(found, RepositoryNotFoundError) for found in chain) or status in (401, 404):
        return f"the hub has no model {hub_id}, or it is private: check the name, log in with `hf auth login`, {demo}"
    if any(isinstance(found, HFValidationError) for found in chain):
        return f"{hub_id!r} is not a hub id: write owner/name, {demo}"
    if any(isinstance(found, PermissionError) for found in chain) or any(
        isinstance(found, OSError) and found.errno == errno.ENOSPC for found in chain
    ):
        return f"{hub_id} cannot be stored ({_first_line(error)}): see HF_HOME, {demo}"
    return (
        f"{hub_id} is not in the local cache and cannot be downloaded ({_first_line(chain[-1])}): "
        f"go online, give a local folder, {demo}"
    )


@contextmanager
def _damage_of(name: str) -> Iterator[None]:
    """Turns what loaders raise for missing, cut off and unfitting files into ModelUnavailable."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelUnavailable(
            f"{name} is damaged, incomplete or not a Flux model ({_first_line(error)}): "
            "get its files again, or use --model demo"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _revision(folder: Path) -> str | None:
    """The commit of a snapshot in the hub's cache, `.../snapshots/<commit>`."""
    return folder.name if folder.parent.name == "snapshots" else None


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Holds back two warnings about models that are as they should be; all others pass."""
    texts = {
        # FluxPipeline is annotated with AutoencoderKL, and runs with AutoencoderTiny as well.
        "diffusers.pipelines.pipeline_utils": "Expected types for vae",
        # Image processors serve image prompts, which are not used here.
        "transformers.utils.import_utils": "requires torchvision",
    }
    filters = {logging.getLogger(name): _LeavesOut(text) for name, text in texts.items()}
    for logger, leaves_out in filters.items():
        logger.addFilter(leaves_out)
    try:
        yield
    finally:
        for logger, leaves_out in filters.items():
            logger.removeFilter(leaves_out)


class _LeavesOut(logging.Filter):
    """Drops messages that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self._text not in record.getMessage()


@contextmanager
def _without_bars() -> Iterator[None]:
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
