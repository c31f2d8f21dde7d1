"""What the hub tells of a pipeline before anything large is downloaded: its configurations, and numbers of weights.

`get_safetensors_metadata` of huggingface_hub looks at the top of a repository alone, where pipelines keep no weights;
what it makes of each header, `parse_safetensors_file_metadata`, is asked for here part by part: a few KB of each file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from grat_cli.errors import GratError, first_line
from grat_cli.families.base import Medium, ModelChoice
from grat_cli.models.catalogue import choose_model
from grat_cli.models.weight_files import names_read

_CONFIGURATIONS = re.compile(r"model_index\.json|[a-z][a-z_0-9]{0,40}/config\.json")
_LARGEST_CONFIGURATION, _MOST_CONFIGURATIONS, _MOST_FILES = 1 << 20, 16, 200


@dataclass(frozen=True)
class OnHub:
    """A pipeline on the hub.

    Attributes:
        choice: with its configurations as its folder.
        parameters: weights of each part that has any.
    """

    choice: ModelChoice
    parameters: Mapping[str, int]


def ask_hub(hub_id: str, medium: Medium) -> OnHub | str:
    """What the hub tells of a pipeline; where it cannot be asked, why not, in a few words.

    Args:
        hub_id: `owner/name`.
        medium: what it is to make.

    Raises:
        ModelUnavailable, BadInput: as `choose_model`, of what there is on the hub.
    """
    import huggingface_hub

    try:
        info: Any = huggingface_hub.model_info(hub_id, files_metadata=True, timeout=10)
        sizes = {str(file.rfilename): file.size or 0 for file in info.siblings or ()}
        wanted = [name for name in sizes if _CONFIGURATIONS.fullmatch(name)][:_MOST_CONFIGURATIONS]
        if "model_index.json" not in wanted:
            return "it is no pipeline of diffusers"
        if any(sizes[name] > _LARGEST_CONFIGURATION for name in wanted):
            return "its configurations are absurdly large"
        folder = {
            str(Path(huggingface_hub.hf_hub_download(hub_id, name, revision=info.sha)).parents[name.count("/")])
            for name in wanted
        }.pop()
        api = huggingface_hub.HfApi()
        parameters: dict[str, int] = {}
        for part, files in _files_of_parts(sizes).items():
            headers = [api.parse_safetensors_file_metadata(hub_id, file, revision=info.sha) for file in files]
            parameters[part] = sum(sum(header.parameter_count.values()) for header in headers)
    except GratError:
        raise
    except Exception as error:  # whatever stands between here and the hub
        return first_line(error)
    return OnHub(replace(choose_model(folder, medium), name=hub_id, reason="hub id"), parameters)


def _files_of_parts(names: Mapping[str, int]) -> dict[str, list[str]]:
    """The files of weights that would be read, by part."""
    parts: dict[str, list[str]] = {}
    for name in names:
        place = PurePosixPath(name)
        if len(place.parts) == 2:
            parts.setdefault(place.parts[0], []).append(place.name)
    read = {part: [f"{part}/{file}" for file in names_read(files)] for part, files in parts.items()}
    return {part: files[:_MOST_FILES] for part, files in read.items() if files}
