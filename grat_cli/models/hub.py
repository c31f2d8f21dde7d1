"""Pipelines from the Hugging Face hub, and what to do when one cannot be had."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from grat_cli.errors import GratError, ModelUnavailable, first_line, printable
from grat_cli.families.base import Family
from grat_cli.models.catalogue import refusal_of_pipeline
from grat_cli.models.parts import read_index

_OR_DEMO = "or use --model demo"


def download_pipeline(pipeline: Any, hub_id: str, family: Family, leave_out: str | None = None) -> Path:
    """The snapshot folder of a pipeline, downloaded where it is not in the cache.

    Args:
        pipeline: the pipeline class.
        hub_id: `owner/name`.
        family: that it is to be of.
        leave_out: a part that is not needed.

    Raises:
        ModelUnavailable: if it is missing, gated, of other classes or out of reach.
        BadInput: if it makes the other medium.
    """
    import huggingface_hub

    # Asked first because it fails at once where the hub is out of reach; downloads retry for half a minute.
    obstacle: Exception | None = None
    try:
        huggingface_hub.model_info(hub_id)
    except Exception as error:
        obstacle = error

    try:
        # A few bytes tell whether gigabytes are worth it.
        index_file = huggingface_hub.hf_hub_download(hub_id, "model_index.json", local_files_only=obstacle is not None)
        index = read_index(Path(index_file))
        if index.class_name not in family.pipelines:
            raise refusal_of_pipeline(hub_id, index.class_name, family.medium)
        index.classes(hub_id, family.classes)
        return Path(pipeline.download(hub_id, **({leave_out: None} if leave_out else {})))
    except GratError:
        raise
    except Exception as error:
        raise ModelUnavailable(_why_not(obstacle or error, hub_id, family)) from (obstacle or error)


def download_lora(hub_id: str, name: str | None, suffixes: tuple[str, ...]) -> Path:
    """A LoRA's file, downloaded where it is not in the cache.

    Args:
        hub_id: `owner/name`.
        name: of the file; None for the only one, or the one that is called as diffusers calls them.
        suffixes: that files of LoRAs have.

    Raises:
        ModelUnavailable: if it is missing, gated, one of several, or out of reach.
    """
    import huggingface_hub

    typed = f"--lora {hub_id}"
    obstacle: Exception | None = None
    try:
        files = [sibling.rfilename for sibling in huggingface_hub.model_info(hub_id).siblings or ()]
    except Exception as error:
        obstacle, files = error, []
    try:
        if obstacle is not None:
            patterns = [f"*{suffix}" for suffix in suffixes]
            kept = Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True, allow_patterns=patterns))
            files = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.suffix in suffixes)
        if name is None:
            found = sorted(file for file in files if file.endswith(suffixes))
            usual = [file for file in found if file == "pytorch_lora_weights.safetensors"]
            top = usual or [file for file in found if "/" not in file] or found
            if len(top) != 1:
                names = ", ".join(printable(file)[:80] for file in top[:5]) or "none"
                raise ModelUnavailable(
                    f"{hub_id} has {len(top)} .safetensors files ({names}): name the one that is meant, {typed}:NAME"
                )
            name = top[0]
        return Path(huggingface_hub.hf_hub_download(hub_id, name, local_files_only=obstacle is not None))
    except GratError:
        raise
    except Exception as error:
        raise ModelUnavailable(_why_no_lora(obstacle or error, hub_id, name)) from (obstacle or error)


def _why_no_lora(error: BaseException, hub_id: str, name: str | None) -> str:
    """What to do about a LoRA that cannot be downloaded."""
    from huggingface_hub import errors

    chain = _chain(error)
    kinds = tuple(type(link) for link in chain)
    statuses = {link.response.status_code for link in chain if isinstance(link, errors.HfHubHTTPError)}
    if any(issubclass(kind, errors.GatedRepoError) for kind in kinds) or 403 in statuses:
        return (
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, "
            "then log in with `hf auth login`"
        )
    if any(issubclass(kind, errors.RepositoryNotFoundError) for kind in kinds) or 401 in statuses:
        return f"the hub has no LoRA {hub_id}, or it is private: check the name, or log in with `hf auth login`"
    if any(issubclass(kind, errors.HFValidationError) for kind in kinds):
        return f"{hub_id!r} is not a hub id: write owner/name"
    if any(issubclass(kind, errors.RemoteEntryNotFoundError) for kind in kinds):
        return f"{hub_id} has no file {name}: check the name behind the colon of --lora"
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain):
        return f"{hub_id} cannot be stored ({first_line(error)}): set HF_HOME to a folder with room"
    return (
        f"the LoRA {hub_id} is not in the local cache and cannot be downloaded ({first_line(chain[-1])}): "
        "go online, or give a local file"
    )


def revision_of(folder: Path) -> str | None:
    """The commit of a snapshot in the hub's cache, `.../snapshots/<commit>`; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def present_revision(hub_id: str) -> str | None:
    """The commit of a pipeline that would be loaded: the hub's newest, out of its reach that in the cache, or None."""
    import huggingface_hub

    try:
        return huggingface_hub.model_info(hub_id).sha
    except Exception:  # loading says more of what is wrong
        cached = huggingface_hub.try_to_load_from_cache(hub_id, "model_index.json")
        return revision_of(Path(cached).parent) if isinstance(cached, str) else None


def root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain: libraries wrap the one that says what happened."""
    return _chain(error)[-1]


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


def _why_not(error: BaseException, hub_id: str, family: Family) -> str:
    """What to do about a failed download."""
    from huggingface_hub import errors

    chain = _chain(error)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    statuses = {link.response.status_code for link in chain if isinstance(link, errors.HfHubHTTPError)}
    if caused_by(errors.GatedRepoError) or 403 in statuses:
        return (
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, "
            f"then log in with `hf auth login`, {_OR_DEMO}"
        )
    if caused_by(errors.RepositoryNotFoundError) or 401 in statuses:
        return (
            f"the hub has no model {hub_id}, or it is private: check the name, log in with `hf auth login`, {_OR_DEMO}"
        )
    if caused_by(errors.HFValidationError):
        return f"{hub_id!r} is not a hub id: write owner/name, {_OR_DEMO}"
    if caused_by(errors.RemoteEntryNotFoundError):
        return (
            f"{hub_id} is not a diffusers pipeline: it has no model_index.json; of a repository of single files, "
            f"download one and give it with --model FILE --base {family.base}"
        )
    if caused_by(PermissionError) or any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain):
        return f"{hub_id} cannot be stored ({first_line(error)}): set HF_HOME to a folder with room, {_OR_DEMO}"
    return (
        f"{hub_id} is not in the local cache and cannot be downloaded ({first_line(chain[-1])}): "
        f"go online, give a local folder, {_OR_DEMO}"
    )
