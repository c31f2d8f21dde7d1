"""Loading of pipelines: from the hub, a folder, or a file of a transformer and the other parts from elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, ModelUnavailable, first_line
from grat_cli.families import family_of
from grat_cli.families.base import NO_PICTURES, Family, ModelChoice, PictureKind
from grat_cli.models.catalogue import is_known, medium_of_name
from grat_cli.models.devices import is_out_of_memory
from grat_cli.models.hub import download_pipeline, revision_of, root_cause
from grat_cli.models.offloading import offload as offload_pipeline
from grat_cli.models.offloading import require_offload
from grat_cli.models.parts import (
    TOKENIZER_PATHS,
    load_class,
    read_index,
    require_plain_config,
    require_plain_part,
)
from grat_cli.models.quantization import configurations, require_quantization

if TYPE_CHECKING:
    import torch

_NEURAL_PARTS: tuple[str, ...] = (
    *("text_encoder", "text_encoder_2", "image_encoder", "transformer", "transformer_2", "vae"),
)


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline that is ready to run.

    Attributes:
        pipe: the pipeline.
        revision: the commit of its weights where it is known.
        offload: which weights wait in main memory, never `auto`; see `offloading`.
        offload_reason: why.
    """

    pipe: Any
    revision: str | None
    offload: str = "none"
    offload_reason: str = "chosen by name"


def load_model(
    choice: ModelChoice,
    *,
    device: torch.device,
    dtype: torch.dtype,
    offload: str = "none",
    quantize: str = "none",
    choose_offload: Callable[[Any], tuple[str, str]] | None = None,
    pictures: frozenset[PictureKind] = NO_PICTURES,
    base: str | None = None,
) -> LoadedModel:
    """Loads a model and puts it on a device.

    Args:
        choice: which model.
        device: where it runs.
        dtype: of weights and activations; see `Family.dtypes` for where it is not that of all parts.
        offload: see `offloading`; `auto` leaves it to `choose_offload` on a CUDA device, and is `none` elsewhere.
        quantize: see `quantization`.
        choose_offload: the kind for a pipeline that is still on the CPU, and why; `auto` needs it.
        pictures: kinds of the pictures that the pipeline is to take.
        base: folder or hub id with the other parts of a pipeline, for a file that holds a transformer alone.

    Raises:
        ModelUnavailable: if it is missing, gated, damaged or out of reach, with what to do.
        BadInput: if offload, quantization and device do not fit.
    """
    require_offload(offload, device)
    require_quantization(quantize, device, offload=offload, is_demo=choice.is_demo)
    quantized = configurations(quantize, family_of(choice).large_encoder, dtype)
    dtypes = family_of(choice).dtypes(_NEURAL_PARTS, device, dtype)
    with _without_pointless_warnings():
        pipe, folder = _load(choice, dtypes, pictures, base, quantized)
    pipe.set_progress_bar_config(disable=True)
    kind, reason = offload, "chosen by name"
    if offload == "auto":
        kind, reason = "none", f"the run is on {device.type}"
        if device.type == "cuda":
            assert choose_offload is not None, "nobody knows what the run will need"
            kind, reason = choose_offload(pipe)
        require_quantization(quantize, device, offload=kind)
    offload_pipeline(pipe, kind, device)
    return LoadedModel(pipe, revision_of(folder) if choice.kind == "hub" else None, kind, reason)


def load_autoencoder(choice: ModelChoice, *, device: torch.device, dtype: torch.dtype, base: str | None = None) -> Any:
    """A pipeline of nothing but its autoencoder, on a device; arguments and errors are those of `load_model`."""
    family = family_of(choice)
    with _without_pointless_warnings():
        pipeline = family.pipeline_of(choice)
        folder = _folder_of_parts(choice, pipeline, base)
        with _damage_of(f"vae of {choice.name}", family), _without_bars():
            kind = read_index(folder / "model_index.json").classes(choice.name, family.classes)["vae"]
            require_plain_part(folder / "vae", f"vae of {choice.name}")
            autoencoder = _load_part(load_class(*kind), folder / "vae", family.dtypes(("vae",), device, dtype)["vae"])
        parts = dict.fromkeys(signature(pipeline).parameters)
        return pipeline(**parts | {"vae": autoencoder.to(device)})


def _load(
    choice: ModelChoice,
    dtypes: Mapping[str, torch.dtype],
    pictures: frozenset[PictureKind],
    base: str | None,
    quantized: Mapping[str, Any],
) -> tuple[Any, Path]:
    """The pipeline on the CPU, and the folder that it was read from."""
    family = family_of(choice)
    pipeline = family.pipeline_of(choice, choice.needs | pictures)
    folder = _folder_of_parts(choice, pipeline, base)
    if choice.kind != "file":
        return _load_folder(pipeline, folder, choice.name, family, dtypes, quantized), folder
    assert base is not None, "a file has a base, or is refused"
    base = str(Path(base).expanduser()) if Path(base).expanduser().is_dir() else base
    if "transformer_2" in read_index(folder / "model_index.json").classes(base, family.classes):
        raise BadInput(
            f"{base} has two transformers, and {choice.name} would replace one of them: "
            "give a folder with both as --model"
        )
    transformer = _load_file(choice, base, dtypes["transformer"], quantized.get("transformer"))
    return _load_folder(pipeline, folder, base, family, dtypes, quantized, transformer=transformer), folder


def _folder_of_parts(choice: ModelChoice, pipeline: Any, base: str | None) -> Path:
    """Where a pipeline lies, or the other parts of one for a file of a transformer; downloaded where it is not here."""
    family = family_of(choice)
    if choice.kind == "folder":
        folder = Path(choice.source)
        if is_known(choice) and not folder.is_dir():
            raise ModelUnavailable(
                f"the {choice.name} of {choice.medium}s is not part of this installation: {folder} is missing\n"
                "install grat again, or choose another --model"
            )
        return folder
    if choice.kind == "hub":
        return download_pipeline(pipeline, choice.source, family)

    if base is None:
        raise ModelUnavailable(
            f"{choice.name} holds a transformer alone: give the other parts of the pipeline with --base, "
            f"a folder or a hub id such as --base {family.base}"
        )
    folder = Path(base).expanduser()
    if not folder.is_dir():
        return download_pipeline(pipeline, base, family, leave_out="transformer")
    if medium_of_name(str(folder)) not in (None, choice.medium):
        raise BadInput(f"--base {base} is of no model of {choice.medium}s: try --base {family.base}")
    return folder


def _load_file(choice: ModelChoice, base: str, dtype: torch.dtype, quantized: Any = None) -> Any:
    """A transformer from a file in diffusers' or the original layout, with the configuration of `base`."""
    from safetensors.torch import load_file

    family = family_of(choice)
    [(class_name, library)] = family.classes["transformer"].items()
    model = load_class(library, class_name)
    with _damage_of(choice.name, family), _without_bars():
        # Read here: by themselves the libraries take a file of another suffix for a pickle.
        weights = load_file(choice.source)
        embeds_guidance = any("guidance" in key for key in weights)
        config: Any = model.load_config(base, subfolder="transformer")
        require_plain_config(config, f"transformer of {base}")
        # Else weights would be left out without a word.
        setting = signature(model.__init__).parameters.get("guidance_embeds")
        if embeds_guidance != config.get("guidance_embeds", setting.default if setting else False):
            raise ModelUnavailable(
                f"{choice.name} and {base} do not fit: only one of them embeds guidance; "
                f"{family.matching_base(embeds_guidance)}"
            )
        options = {} if quantized is None else {"quantization_config": quantized}
        transformer = model.from_single_file(weights, config=base, subfolder="transformer", dtype=dtype, **options)
        lacking = [name for name, weight in transformer.named_parameters() if weight.is_meta]
        if lacking:
            raise ValueError(f"it lacks {len(lacking)} weights, such as {lacking[0]}")
        _restore_precision(transformer, family.fresh_modules(config))
    return transformer


def _restore_precision(transformer: Any, fresh: Mapping[str, torch.nn.Module]) -> None:
    """Undoes what loading a file alone does to parts of a transformer that are fp32 in any case.

    Args:
        transformer: all of which was turned to one dtype.
        fresh: its tables that are no weights, by the names of modules.
    """
    kept = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():
        if kept.intersection(name.split(".")):
            parameter.data = parameter.data.float()
    for name, module in fresh.items():
        transformer.set_submodule(name, module)


def _load_folder(
    pipeline: Any,
    folder: Path,
    name: str,
    family: Family,
    dtypes: Mapping[str, torch.dtype],
    quantized: Mapping[str, Any],
    **given: Any,
) -> Any:
    """A pipeline from a folder, strictly, part by part: the pipeline's own loader imports what the index names.

    Left to themselves the libraries go on with random weights, or a tokenizer without words, where files lack.
    """
    with _damage_of(name, family), _without_bars():
        index = read_index(folder / "model_index.json")
        kinds = index.classes(name, family.classes)
        absent = family.not_loaded | (family.optional - kinds.keys())
        taken = signature(pipeline).parameters
        possible = [part for part in family.classes if part in taken and part not in absent]
        wanted = [part for part in possible if part not in given]
        for part in wanted:
            needed = folder / part / ("config.json" if part in _NEURAL_PARTS else "")
            if part not in kinds or not needed.exists():
                raise FileNotFoundError(f"{needed if part in kinds else part} is missing")
            require_plain_part(folder / part, f"{part} of {name}")
        for part in wanted:
            library, kind = kinds[part]
            loader = load_class(library, family.read_as.get(kind, kind))
            with _damage_of(f"{part} of {name}", family):
                if part in _NEURAL_PARTS:
                    # Transformers that take turns are quantized alike.
                    kind = "transformer" if part.startswith("transformer") else part
                    given[part] = _load_part(loader, folder / part, dtypes[part], quantized.get(kind))
                elif (own := family.read_part(part, folder / part, given)) is not None:
                    given[part] = own
                else:
                    paths = dict.fromkeys(TOKENIZER_PATHS) if part.startswith("tokenizer") else {}
                    given[part] = loader.from_pretrained(folder / part, local_files_only=True, **paths)
        # What only other pipelines of the family take is not for this one.
        options = {key: value for key, value in index.options.items() if key in taken}
        return pipeline(**options, **{part: loaded for part, loaded in given.items() if part in taken})


def _load_part(loader: Any, folder: Path, dtype: torch.dtype, quantized: Any = None) -> Any:
    """A text encoder, transformer or autoencoder with every one of its weights."""
    options = {} if quantized is None else {"quantization_config": quantized}
    part, report = loader.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    lacking = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    # Encoders are often parts of larger checkpoints; of a transformer everything is used.
    left_over = sorted(report["unexpected_keys"]) if folder.name.startswith("transformer") else []
    if lacking or left_over:
        problem = "it lacks" if lacking else "its configuration has no place for"
        keys = lacking or left_over
        raise ValueError(f"{problem} {len(keys)} weights, such as {keys[0]}")
    return part


@contextmanager
def _damage_of(name: str, family: Family) -> Iterator[None]:
    """Turns what loaders raise for missing, cut off and unfitting files into ModelUnavailable."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelUnavailable(
            f"{name} is damaged, incomplete or not {family.title}'s ({first_line(root_cause(error))}): "
            "get its files again, or use --model demo"
        ) from error


@contextmanager
def _without_pointless_warnings() -> Iterator[None]:
    """Holds back warnings that are beside the point here; all others pass."""
    pointless = (
        # Either the cache has the model, or an error says that the hub is out of reach.
        ("diffusers.pipelines.pipeline_utils", "Couldn't connect to the Hub"),
        # What is missing is an error here, and says so itself.
        ("diffusers.models.modeling_utils", "Some weights of"),
        ("transformers.modeling_utils", "LOAD REPORT"),
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
