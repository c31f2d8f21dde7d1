"""Loading of pipelines: from the hub, a folder, or a file of a transformer and the other parts from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, ModelUnavailable, first_line
from grat_cli.families import family_of
from grat_cli.families.base import NO_PICTURES, Family, ModelChoice, PictureKind
from grat_cli.files.json_objects import read_json
from grat_cli.files.places import expanded
from grat_cli.files.weight_headers import format_of
from grat_cli.models.catalogue import KNOWN_MODELS, is_known, medium_of_name
from grat_cli.models.devices import is_out_of_memory
from grat_cli.models.hub import download_pipeline, revision_of, root_cause
from grat_cli.models.lora import files_of_loras, refuse_loras
from grat_cli.models.lora_layers import AppliedLora, apply_loras
from grat_cli.models.offloading import offload as offload_pipeline
from grat_cli.models.offloading import require_offload
from grat_cli.models.parts import (
    TOKENIZER_PATHS,
    load_class,
    read_index,
    require_plain_config,
    require_plain_part,
)
from grat_cli.models.quantization import (
    cast,
    configurations,
    quantization_of,
    require_cast,
    require_movable,
    require_quantization,
)
from grat_cli.models.quiet import without_bars, without_pointless_warnings
from grat_cli.models.sharding import require_sharding, shard_pipeline
from grat_cli.models.single_file import holds_other_parts, read_weights, text_encoder_of, transformer_of
from grat_cli.models.weight_files import WeightFile, files_of_part, known_file, variant_of
from grat_cli.models.weights import AS_THEY_ARE, Weights

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

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
        loras: that it has.
        files: that its weights were read from, but for those that a revision tells of.
        notes: what to know of how it was loaded, a sentence each.
    """

    pipe: Any
    revision: str | None
    offload: str = "none"
    offload_reason: str = "chosen by name"
    loras: tuple[AppliedLora, ...] = ()
    files: tuple[WeightFile, ...] = ()
    notes: tuple[str, ...] = ()


def load_model(
    choice: ModelChoice,
    *,
    device: torch.device,
    dtype: torch.dtype,
    offload: str = "none",
    weights: Weights = AS_THEY_ARE,
    choose_offload: Callable[[Any], tuple[str, str]] | None = None,
    pictures: frozenset[PictureKind] = NO_PICTURES,
    are_texts_known: Callable[[Path, Mapping[str, torch.dtype]], bool] | None = None,
    shard_over: DeviceMesh | None = None,
) -> LoadedModel:
    """Loads a model and puts it on a device.

    Args:
        choice: which model.
        device: where it runs.
        dtype: of weights and activations; see `Family.dtypes` for where it is not that of all parts.
        offload: see `offloading`; `auto` leaves it to `choose_offload` on a CUDA device, and is `none` elsewhere.
        weights: how they come.
        choose_offload: the kind for a pipeline that is still on the CPU, and why; `auto` needs it.
        pictures: kinds of the pictures that the pipeline is to take.
        are_texts_known: whether all texts are encoded already, by the folder of the pipeline's parts and the dtypes of
            these; then those that encode are not loaded, and are None.
        shard_over: ranks that share the weights of transformers, all of which load them; see `sharding.shard_weights`.
            All other parts are on every rank.

    Raises:
        ModelUnavailable: if it is missing, gated, damaged or out of reach, with what to do.
        BadInput: if offload, quantization, casts, sharding, LoRAs and device do not fit.
    """
    family = family_of(choice)
    require_offload(offload, device)
    with without_pointless_warnings():
        lora_files = files_of_loras(choice, weights, pictures)
    require_quantization(weights.quantize, device, offload=offload, is_demo=choice.is_demo)
    require_cast(weights.cast, weights.quantize)
    if shard_over is not None:
        require_sharding(offload, quantize=weights.quantize, cast=weights.cast)
    how = _How(
        family.dtypes(_NEURAL_PARTS, device, dtype),
        weights,
        configurations(weights.quantize, family.large_encoder, dtype),
    )
    with without_pointless_warnings():
        pipe, folder, files = _load(choice, pictures, how, are_texts_known)
    pipe.set_progress_bar_config(disable=True)
    # Before anything is moved or hooked, so that offloading and its choice count them as part of the model.
    loras = apply_loras(pipe, choice, weights, lora_files)
    for transformer in family.transformers(pipe):
        require_cast(weights.cast, weights.quantize, is_quantized=quantization_of(transformer))
        cast(transformer, weights.cast, dtype)
    kind, reason = offload, "chosen by name"
    if offload == "auto":
        kind, reason = "none", f"the run is on {device.type}"
        if shard_over is not None:
            reason = "ranks share the weights"
        elif device.type == "cuda":
            assert choose_offload is not None, "nobody knows what the run will need"
            kind, reason = choose_offload(pipe)
        require_quantization(weights.quantize, device, offload=kind)
    for part in pipe.components.values():
        is_cast = any(part is transformer for transformer in family.transformers(pipe))
        require_movable(part, weights.cast if is_cast else "none", kind, device)
    if shard_over is None:
        offload_pipeline(pipe, kind, device)
    else:
        shard_pipeline(pipe, family.transformers(pipe), device, shard_over)
    revision = revision_of(folder) if choice.kind == "hub" else None
    notes = (*_notes(choice, weights), *(lora.note for lora in loras if lora.note is not None))
    return LoadedModel(pipe, revision, kind, reason, loras, files, notes)


def refuse_weights(choice: ModelChoice, weights: Weights, pictures: frozenset[PictureKind] = NO_PICTURES) -> None:
    """Makes sure, before anything is loaded, that a model's weights can come like that; as `lora.refuse_loras`."""
    with without_pointless_warnings():
        refuse_loras(choice, weights, pictures)


def load_autoencoder(
    choice: ModelChoice, *, device: torch.device, dtype: torch.dtype, weights: Weights = AS_THEY_ARE
) -> Any:
    """A pipeline of nothing but its autoencoder, on a device; arguments and errors are those of `load_model`."""
    family = family_of(choice)
    with without_pointless_warnings():
        pipeline = family.pipeline_of(choice)
        folder = _folder_of_parts(choice, pipeline, weights.base)
        with _damage_of(f"vae of {choice.name}", family), without_bars():
            kind = read_index(folder / "model_index.json").classes(choice.name, family.classes)["vae"]
            require_plain_part(folder / "vae", f"vae of {choice.name}", allow_pickle=weights.allow_pickle)
            how = _How(family.dtypes(("vae",), device, dtype), weights, {})
            autoencoder = _load_part(load_class(*kind), folder / "vae", "vae", how)
        parts = dict.fromkeys(signature(pipeline).parameters)
        return pipeline(**parts | {"vae": autoencoder.to(device)})


def _notes(choice: ModelChoice, weights: Weights) -> tuple[str, ...]:
    if choice.kind != "file" or format_of(Path(choice.source)) == "pickle":
        return ()
    if not holds_other_parts(Path(choice.source)):
        return ()
    return (f"{choice.name} holds a transformer and other parts: these are those of {weights.base} all the same",)


@dataclass(frozen=True)
class _How:
    """How parts are loaded.

    Attributes:
        dtypes: of each.
        weights: how they come.
        quantized: `quantization_config` of those that are quantized as they are loaded.
    """

    dtypes: Mapping[str, torch.dtype]
    weights: Weights
    quantized: Mapping[str, Any]


def _load(
    choice: ModelChoice,
    pictures: frozenset[PictureKind],
    how: _How,
    are_texts_known: Callable[[Path, Mapping[str, torch.dtype]], bool] | None,
) -> tuple[Any, Path, tuple[WeightFile, ...]]:
    """The pipeline on the CPU, the folder that it was read from, and the files of its weights."""
    family = family_of(choice)
    pipeline = family.pipeline_of(choice, choice.needs | pictures)
    base = _source_of(how.weights.base, choice)
    folder = _folder_of_parts(choice, pipeline, base)
    known = are_texts_known is not None and are_texts_known(folder, how.dtypes)
    given: dict[str, Any] = dict.fromkeys(family.text_parts) if known else {}
    if choice.kind != "file":
        pipe, files = _load_folder(pipeline, folder, choice.name, family, how, **given)
        return pipe, folder, files
    assert base is not None, "a file has a base, or is refused"
    if "transformer_2" in read_index(folder / "model_index.json").classes(base, family.classes):
        raise BadInput(
            f"{base} has two transformers, and {choice.name} would replace one of them: "
            "give a folder with both as --model"
        )
    transformer = _load_file(choice, base, how)
    with _damage_of(choice.name, family):
        own = known_file(Path(choice.source), "transformer")
    pipe, files = _load_folder(pipeline, folder, base, family, how, transformer=transformer, **given)
    return pipe, folder, (own, *files)


def _source_of(base: str | None, choice: ModelChoice) -> str | None:
    """What `--base` means: a known model by its name, a folder, or a hub id."""
    if base is None:
        return None
    if base in KNOWN_MODELS[choice.medium]:
        return KNOWN_MODELS[choice.medium][base].source
    return str(expanded(base)) if os.path.isdir(expanded(base)) else base


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
    folder = expanded(base)
    if not folder.is_dir():
        return download_pipeline(pipeline, base, family, leave_out="transformer")
    if medium_of_name(str(folder)) not in (None, choice.medium):
        raise BadInput(f"--base {base} is of no model of {choice.medium}s: try --base {family.base}")
    return folder


def _load_file(choice: ModelChoice, base: str, how: _How) -> Any:
    """A transformer from a file in whichever layout, with the configuration of `base`."""
    family = family_of(choice)
    [(class_name, library)] = family.classes["transformer"].items()
    model = load_class(library, class_name)
    dtype, quantized = how.dtypes["transformer"], how.quantized.get("transformer")
    with _damage_of(choice.name, family), without_bars():
        # Read here: by themselves the libraries take a file of another suffix for a pickle.
        weights = read_weights(Path(choice.source), dtype, allow_pickle=how.weights.allow_pickle)
        embeds_guidance = any("guidance" in key for key in weights)
        config: Any = model.load_config(base, subfolder="transformer")
        require_plain_config(config, f"transformer of {base}")
        if config.pop("quantization_config", None):
            raise BadInput(
                f"the transformer of {how.weights.base} is quantized, and its configuration fits no other file: "
                f"give another --base, such as {family.base}"
            )
        # Else weights would be left out without a word.
        setting = signature(model.__init__).parameters.get("guidance_embeds")
        if embeds_guidance != config.get("guidance_embeds", setting.default if setting else False):
            raise ModelUnavailable(
                f"{choice.name} and {base} do not fit: only one of them embeds guidance; "
                f"{family.matching_base(embeds_guidance)}"
            )
        transformer = transformer_of(model, weights, config, base, dtype, quantized, called=how.weights.base)
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
    pipeline: Any, folder: Path, name: str, family: Family, how: _How, **given: Any
) -> tuple[Any, tuple[WeightFile, ...]]:
    """A pipeline from a folder, strictly, part by part: the pipeline's own loader imports what the index names.

    Left to themselves the libraries go on with random weights, or a tokenizer without words, where files lack.
    """
    from_elsewhere = {part for part, loaded in given.items() if loaded is not None}
    with _damage_of(name, family), without_bars():
        index = read_index(folder / "model_index.json")
        kinds = index.classes(name, family.classes)
        absent = family.not_loaded | (family.optional - kinds.keys())
        taken = signature(pipeline).parameters
        possible = [part for part in family.classes if part in taken and part not in absent]
        wanted = [part for part in possible if part not in given]
        other_encoder = how.weights.text_encoder
        for part in wanted:
            needed = folder / part / ("config.json" if part in _NEURAL_PARTS else "")
            if part not in kinds or not needed.exists():
                raise FileNotFoundError(f"{needed if part in kinds else part} is missing")
            without_weights = part == family.large_encoder and other_encoder is not None
            require_plain_part(
                folder / part,
                f"{part} of {name}",
                allow_pickle=how.weights.allow_pickle,
                has_weights=part in _NEURAL_PARTS and not without_weights,
            )
        for part in wanted:
            library, kind = kinds[part]
            loader = load_class(library, family.read_as.get(kind, kind))
            if part == family.large_encoder and other_encoder is not None:
                with _damage_of(Path(other_encoder).name, family):
                    given[part] = _load_encoder(loader, expanded(other_encoder), folder / part, part, how)
                continue
            with _damage_of(f"{part} of {name}", family):
                if part in _NEURAL_PARTS:
                    given[part] = _load_part(loader, folder / part, part, how)
                elif (own := family.read_part(part, folder / part, given)) is not None:
                    given[part] = own
                else:
                    paths = dict.fromkeys(TOKENIZER_PATHS) if part.startswith("tokenizer") else {}
                    given[part] = loader.from_pretrained(folder / part, local_files_only=True, **paths)
        # What only other pipelines of the family take is not for this one.
        options = {key: value for key, value in index.options.items() if key in taken}
        pipe = pipeline(**options, **{part: loaded for part, loaded in given.items() if part in taken})
        of_folder = [part for part in possible if part in _NEURAL_PARTS and part not in from_elsewhere]
        other = {} if other_encoder is None else {family.large_encoder: other_encoder}
        return pipe, _files_of(folder, of_folder, other)


def _files_of(folder: Path, parts: Sequence[str], other: Mapping[str, str]) -> tuple[WeightFile, ...]:
    """Those that parts are read from, or would be where what they compute is known already; none of a revision's.

    Args:
        folder: of the parts.
        parts: in order.
        other: files that stand for those of a part.
    """
    files: list[WeightFile] = []
    for part in parts:
        if part in other:
            files.append(known_file(expanded(other[part]), part))
        elif revision_of(folder) is None:
            files += files_of_part(folder / part)
    return tuple(files)


def _load_part(loader: Any, folder: Path, part: str, how: _How) -> Any:
    """A text encoder, transformer or autoencoder with every one of its weights."""
    # Transformers that take turns are quantized alike.
    quantized = how.quantized.get("transformer" if part.startswith("transformer") else part)
    options: dict[str, Any] = {} if quantized is None else {"quantization_config": quantized}
    if quantized is not None and read_json(folder / "config.json").get("quantization_config"):
        raise BadInput(f"--quantize {how.weights.quantize}: {part} is quantized already: leave it out")
    stored = variant_of(folder)
    if stored.variant is not None:
        options["variant"] = stored.variant
    loaded, report = loader.from_pretrained(
        folder,
        dtype=how.dtypes[part],
        use_safetensors=not stored.is_pickle,
        ignore_mismatched_sizes=True,  # they are told in the report, and refused
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    # Encoders are often parts of larger checkpoints; of a transformer everything is used.
    _require_complete(report, strictly=part.startswith("transformer"))
    return loaded


def _load_encoder(loader: Any, path: Path, folder: Path, part: str, how: _How) -> Any:
    """The large text encoder with the weights of a file, and the configuration of a folder."""
    encoder, report = text_encoder_of(
        loader,
        path,
        folder,
        how.dtypes[part],
        allow_pickle=how.weights.allow_pickle,
        quantized=how.quantized.get(part),
    )
    _require_complete(report)
    return encoder


def _require_complete(report: Mapping[str, Any], *, strictly: bool = False) -> None:
    """Raises ValueError if a part lacks weights, or strictly also if weights are left over."""
    amiss = {
        "it lacks {} weights": report["missing_keys"],
        "{} of its weights are of other shapes than its configuration says": report["mismatched_keys"],
        "its configuration has no place for {} weights": report["unexpected_keys"] if strictly else (),
    }
    for problem, keys in amiss.items():
        if keys:
            raise ValueError(f"{problem.format(len(keys))}, such as {min(map(_key, keys))}")


def _key(entry: Any) -> str:
    """A name of a loading report, which gives those of another shape with both shapes."""
    return str(entry[0] if isinstance(entry, tuple) else entry)


@contextmanager
def _damage_of(name: str, family: Family) -> Iterator[None]:
    """Turns what loaders raise for missing, cut off and unfitting files into ModelUnavailable."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    damage = SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError
    try:
        yield
    except (*damage, UnpicklingError) as error:
        if is_out_of_memory(error):
            raise
        # An unpickler's words advise to do without its safety.
        root = root_cause(error)
        of_pickle = "a pickle in it is damaged, or holds more than tensors"
        why = of_pickle if isinstance(root, UnpicklingError) else first_line(root)
        raise ModelUnavailable(
            f"{name} is damaged, incomplete or not {family.title}'s ({why}): get its files again, or use --model demo"
        ) from error
