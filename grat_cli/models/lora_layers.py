"""LoRAs in a loaded pipeline.

diffusers turns the layouts in which they are spread (kohya's, its own, those of the models' makers) into names of a
pipeline's modules, and peft adds them to these. Both go on with what does not fit, so here every weight is held against
the module that it is for; and a file says what it likes, so that of its own configuration only the factors are taken.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grat_cli.errors import BadInput, ModelUnavailable, first_line
from grat_cli.families import family_of
from grat_cli.families.base import ModelChoice
from grat_cli.files.fingerprint import fingerprint
from grat_cli.models.lora import own_name, read_header, shown
from grat_cli.models.weights import Lora, Noise, Weights

if TYPE_CHECKING:
    import torch

_PARTS = ("transformer", "transformer_2", "text_encoder")
_TRANSFORMERS: Mapping[Noise, tuple[str, ...]] = {
    "all": ("transformer",),
    "high": ("transformer",),
    "low": ("transformer_2",),
    "both": ("transformer", "transformer_2"),
}
# Whose first input channels are those of models that take nothing beside the latents.
_INPUT = "x_embedder"
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<half>lora_[AB])\.(?P<kind>weight|bias)")
_LITERAL = re.compile(r"\^?[\w.]+", re.ASCII)
# Share of a LoRA's layers that a model of its kind may lack, such as those for guidance.
_MOST_ABSENT = 1 / 3
_LARGEST_RANK, _LARGEST_ALPHA, _MOST_LAYERS = 65_536, 1e6, 100_000


@dataclass(frozen=True, kw_only=True)
class AppliedLora:
    """A LoRA that a pipeline has.

    Attributes:
        name: of its file, or hub id and weight's name; never a path.
        scale: how strongly it works.
        sha256: of `fingerprint`.
        bytes: of the file.
        fused: whether it was added to the weights themselves.
        noise: which transformers have it.
        parts: of the pipeline that have it.
        layers: to which it adds.
        left_out: weights of the file that have no place in the model.
        example: the name of one of them.
    """

    name: str
    scale: float
    sha256: str
    bytes: int
    fused: bool
    noise: Noise = "all"
    parts: tuple[str, ...] = ("transformer",)
    layers: int = 0
    left_out: int = 0
    example: str = ""

    def told(self) -> dict[str, Any]:
        """As reports have it."""
        told = {"name": self.name, "scale": self.scale, "sha256": self.sha256, "bytes": self.bytes, "fused": self.fused}
        return told | {"noise": self.noise, "layers": self.layers, "left_out": self.left_out}

    @property
    def note(self) -> str | None:
        """What to know of it, or None."""
        if not self.left_out:
            return None
        return (
            f"{self.name}: {self.left_out} of its weights have no place in the model and are left out, such as "
            f"{self.example}"
        )


def apply_loras(pipe: Any, choice: ModelChoice, weights: Weights, files: Sequence[Path]) -> tuple[AppliedLora, ...]:
    """Adds LoRAs to a pipeline on the CPU that nothing has hooked yet.

    Args:
        pipe: the pipeline.
        choice: its model.
        weights: how its weights come.
        files: of the LoRAs, of `lora.files_of_loras`.

    Raises:
        BadInput: if one is of another model, or cannot be fused.
        ModelUnavailable: if one is damaged.
    """
    if not weights.loras:
        return ()
    if weights.fuse_loras and any(getattr(part, "hf_quantizer", None) for part in _parts(pipe).values()):
        raise BadInput(f"--fuse-lora: {choice.name} is quantized, and a sum would be rounded to few bits: leave it out")
    applied, scales = [], dict[str, dict[str, float]]()
    with _quiet() as unread:
        for number, (lora, file) in enumerate(zip(weights.loras, files, strict=True)):
            adapter = f"lora_{number}"
            one = _add(pipe, choice, lora, file, adapter, weights.fuse_loras, unread)
            for part in one.parts:
                scales.setdefault(part, {})[adapter] = lora.scale
            applied.append(one)
        for part, by_adapter in scales.items():
            _activate(_parts(pipe)[part], by_adapter, fuse=weights.fuse_loras)
    return tuple(applied)


def _parts(pipe: Any) -> dict[str, Any]:
    return {name: part for name in _PARTS if (part := getattr(pipe, name, None)) is not None}


def _add(
    pipe: Any, choice: ModelChoice, lora: Lora, path: Path, adapter: str, fuse: bool, unread: list[str]
) -> AppliedLora:
    """Puts one LoRA into the parts of a pipeline that it is for, under the name of an adapter, with a scale of 1."""
    from safetensors.torch import load_file

    title, takes_text = family_of(choice).title, "text_encoder" in pipe._lora_loadable_modules
    name = own_name(lora)

    # 1. The file, whose tensors become those of a pipeline of diffusers.
    header = read_header(path, name, takes_text)
    try:
        known, raw = fingerprint(path), load_file(path)
    except OSError as error:
        raise ModelUnavailable(f"{name} cannot be read ({first_line(error)}): get it again") from error
    unread.clear()
    unread += _without_place(raw)
    read, alphas = _converted(type(pipe), raw, name, title)
    del raw
    if not read or not any("lora" in key for key in read):
        raise BadInput(f"{name} is no LoRA of {title}: diffusers finds none of its layouts in it")

    # 2. Each tensor against the module that it is for.
    factors = _Factors.of(header.adapter, alphas, name)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    own = _of_part(read, "transformer")
    left = [key for key in read if not key.startswith(("transformer.", "text_encoder."))]
    for part in _TRANSFORMERS[lora.noise]:
        fitting, others = _fitting(_parts(pipe)[part], own, factors.of_part("transformer"), name, choice.name)
        parts |= {part: fitting} if fitting else {}
    left += [f"transformer.{key}" for key in others]
    own = _of_part(read, "text_encoder")
    if own and getattr(pipe, "text_encoder", None) is not None:
        own = _text_layout(own, pipe.text_encoder)
        fitting, others = _fitting(pipe.text_encoder, own, factors.of_part("text_encoder"), name, choice.name)
        parts |= {"text_encoder": fitting} if fitting else {}
    left += [f"text_encoder.{key}" for key in (others if "text_encoder" in parts else own)]
    if not parts:
        raise BadInput(
            f"{name} is of another model than {choice.name}: none of its {len(read)} weights has a place there, "
            f"such as {shown(next(iter(read)))}"
        )
    left += [*unread, *factors.unused(parts)]

    # 3. Into the modules.
    layers = 0
    for part, own in parts.items():
        module = _parts(pipe)[part]
        try:
            if part == "text_encoder":
                prefixed = {f"{part}.{key}": tensor for key, tensor in own.items()}
                pipe.load_lora_into_text_encoder(
                    prefixed, None, module, prefix=part, adapter_name=adapter, low_cpu_mem_usage=True
                )
            else:
                module.load_lora_adapter(dict(own), prefix=None, adapter_name=adapter, low_cpu_mem_usage=True)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise BadInput(f"{name} does not fit {choice.name}: {first_line(error)}") from error
        layers += _require_whole(module, own, adapter, name)
        if fuse:
            _refuse_few_bits(module, own, choice.name)
    return AppliedLora(
        name=name,
        scale=lora.scale,
        sha256=known.sha256,
        bytes=known.bytes,
        fused=fuse,
        noise=lora.noise,
        parts=tuple(parts),
        layers=layers,
        left_out=len(left),
        example=shown(left[0]) if left else "",
    )


def _require_alphas(alphas: Mapping[str, Any], name: str) -> None:
    """Raises ModelUnavailable unless those of a file, tensors or numbers, are such as can be."""
    for key, alpha in alphas.items():
        if key.endswith(".alpha") and (
            getattr(alpha, "numel", lambda: 1)() != 1 or not 0 <= float(alpha) <= _LARGEST_ALPHA
        ):
            raise ModelUnavailable(f"{name} is damaged: {shown(key)} is no number that can be")


def _converted(
    pipeline: Any, raw: dict[str, torch.Tensor], name: str, title: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Tensors by the names of diffusers, each behind that of its part of the pipeline; and alphas by theirs."""
    from inspect import signature

    with_alphas = "return_alphas" in signature(pipeline.lora_state_dict).parameters
    # Conversions divide by powers of two until an alpha fits, which one below zero never does.
    _require_alphas(raw, name)
    try:
        read = pipeline.lora_state_dict(raw, **({"return_alphas": True} if with_alphas else {}))
    except Exception as error:
        raise BadInput(f"{name} is no LoRA of {title}, as far as diffusers can tell ({_reason(error)})") from error
    tensors, alphas = (read[0], read[1] or {}) if with_alphas else (read, {})
    # Of what conversions let through, those of other families are still among the tensors.
    alphas |= {key: tensor for key, tensor in tensors.items() if key.endswith(".alpha")}
    _require_alphas({f"{key.removesuffix('.alpha')}.alpha": alpha for key, alpha in alphas.items()}, name)
    rest = {key: tensor for key, tensor in tensors.items() if key not in alphas}
    return rest, {key: float(alpha) for key, alpha in alphas.items()}


def _without_place(raw: Mapping[str, Any]) -> list[str]:
    """Names of differences of whole weights, beside a LoRA, that conversions drop without a word."""
    return [
        key
        for key in raw
        if (key.endswith(".diff") and "head.head" not in key) or (key.endswith(".diff_b") and "norm" in key)
    ]


def _reason(error: Exception) -> str:
    """What it says in one line: of a lacking key or a wrong assumption alone its name."""
    return f"{type(error).__name__}: {first_line(error)}"[:160].rstrip(": ")


def _of_part(read: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """Tensors of a part of the pipeline, by names within it, in the layout of peft."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    own = {key.removeprefix(f"{part}."): tensor for key, tensor in read.items() if key.startswith(f"{part}.")}
    if part == "transformer" and not any("lora_A" in key for key in own):
        return convert_unet_state_dict_to_peft(own)
    return own


def _text_layout(own: dict[str, torch.Tensor], encoder: Any) -> dict[str, torch.Tensor]:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    try:
        own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    except ValueError:  # of no known layout, and so nothing fits
        return own
    modules = dict(encoder.named_modules())
    return {key if "text_model" in modules else key.removeprefix("text_model."): own[key] for key in own}


def _fitting(
    module: Any, own: Mapping[str, torch.Tensor], factors: _Factors, name: str, model: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors of a LoRA that have a place in a module, with their factors multiplied in; and the names of the others.

    Args:
        module: a transformer or text encoder.
        own: tensors by their names in it.
        factors: of them.
        name: of the LoRA, for messages.
        model: likewise.

    Raises:
        BadInput: if the module has other widths than they are for.
        ModelUnavailable: if they are damaged.
    """
    import torch

    modules = dict(module.named_modules())
    halves: dict[str, dict[str, str]] = {}
    left, absent = [], set[str]()
    for key in own:
        match = _TENSOR.fullmatch(key)
        if match and _widths(modules.get(match["module"])) is not None:
            halves.setdefault(match["module"], {})[f"{match['half']}.{match['kind']}"] = key
            continue
        left.append(key)
        absent |= {match["module"]} if match else set()
    if len(absent) > _MOST_ABSENT * (len(absent) + len(halves)):
        raise BadInput(
            f"{name} is of another model than {model}: {len(absent)} of its {len(absent) + len(halves)} layers have no "
            f"place there, such as {shown(min(absent))}"
        )
    fitting = {}
    for place, keys in halves.items():
        if not {"lora_A.weight", "lora_B.weight"} <= keys.keys():
            raise ModelUnavailable(f"{name} is incomplete: of {shown(place)} it has one half; get it again")
        down, up = own[keys["lora_A.weight"]], own[keys["lora_B.weight"]]
        found = _widths(modules[place])
        assert found is not None, "it has a place"
        if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1] or not 1 <= len(down) <= _LARGEST_RANK:
            raise ModelUnavailable(f"{name} is damaged: the halves of {shown(place)} do not fit each other")
        if place == _INPUT and down.shape[1] > found[0]:
            raise BadInput(
                f"{name} widens the input of the model from {found[0]} to {down.shape[1]} channels, as a LoRA of a "
                "model with control does, which is not supported: give a whole model of that kind as --model"
            )
        if place == _INPUT and down.ndim == 2 and down.shape[1] < found[0]:
            down = torch.nn.functional.pad(down, (0, found[0] - down.shape[1]))
        if (down.shape[1], up.shape[0]) != found:
            raise BadInput(
                f"{name} is of another model than {model}: its {shown(place)} takes {down.shape[1]} channels "
                f"to {up.shape[0]}, that of the model {found[0]} to {found[1]}"
            )
        factor = factors.factor(place, len(down))
        tensors = {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up if factor == 1 else up.float() * factor}
        if "lora_B.bias" in keys:
            tensors[f"{place}.lora_B.bias"] = own[keys["lora_B.bias"]] * factor
        if not all(tensor.is_floating_point() and tensor.float().isfinite().all() for tensor in tensors.values()):
            raise ModelUnavailable(f"{name} is damaged: {shown(place)} holds what are no finite numbers")
        fitting |= tensors
    return fitting, left


def _widths(module: Any) -> tuple[int, int] | None:
    """Channels that a layer takes and makes; None of what is no layer that a LoRA adds to."""
    for names in (("in_features", "out_features"), ("in_channels", "out_channels")):
        if all(isinstance(getattr(module, name, None), int) for name in names) and hasattr(module, "weight"):
            return getattr(module, names[0]), getattr(module, names[1])
    return None


def _require_whole(module: Any, own: Mapping[str, torch.Tensor], adapter: str, name: str) -> int:
    """Makes sure that every layer has what is for it, and returns how many these are. Nothing is trained here."""
    places = {match["module"] for key in own if (match := _TENSOR.fullmatch(key))}
    modules = dict(module.named_modules())
    for place in places:
        layer = modules[place]
        if adapter not in getattr(layer, "lora_A", ()) or any(weight.is_meta for weight in layer.parameters()):
            raise BadInput(f"{name}: peft adds no LoRA to {shown(place)}, a {type(layer).__name__}")
        for half in (layer.lora_A[adapter], layer.lora_B[adapter]):
            half.requires_grad_(False)
            # Peft takes the dtype of the weights, but where these are the bytes of quantized ones.
            if not layer.base_layer.weight.is_floating_point():
                half.to(module.dtype)
    return len(places)


def _refuse_few_bits(module: Any, own: Mapping[str, torch.Tensor], model: str) -> None:
    """Raises BadInput unless products can be added to weights as they are."""
    import torch

    modules = dict(module.named_modules())
    for place in {match["module"] for key in own if (match := _TENSOR.fullmatch(key))}:
        weight = modules[place].base_layer.weight
        if type(weight) is not torch.nn.Parameter or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BadInput(f"--fuse-lora: {model} is quantized, and a sum would be rounded to few bits: leave it out")


def _activate(module: Any, scales: Mapping[str, float], *, fuse: bool) -> None:
    """Gives the LoRAs of a part of a pipeline their scales, and adds them to its weights if they are to be fused."""
    from diffusers.loaders.lora_base import fuse_text_encoder_lora
    from diffusers.utils.peft_utils import recurse_remove_peft_layers, set_weights_and_activate_adapters

    set_weights_and_activate_adapters(module, list(scales), list(scales.values()))
    module.requires_grad_(False)
    if not fuse:
        return
    if hasattr(module, "unload_lora"):
        module.fuse_lora(adapter_names=list(scales))
        module.unload_lora()
    else:
        fuse_text_encoder_lora(module, adapter_names=list(scales))
        recurse_remove_peft_layers(module)
        del module.peft_config
        module._hf_peft_config_loaded = False


class _Adapter(BaseModel):
    """What of the configuration that a LoRA was saved with says how strongly it works."""

    model_config = ConfigDict(extra="allow")

    r: Annotated[int, Field(ge=1, le=_LARGEST_RANK)] | None = None
    lora_alpha: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    alpha_pattern: Annotated[dict[str, Annotated[float, Field(ge=-1e6, le=1e6)]], Field(max_length=_MOST_LAYERS)] = {}
    use_rslora: bool = False


# Beside these and what peft leaves as it is, a configuration changes what its layers compute.
_OF_TRAINING = frozenset(
    (
        *("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "lora_bias", "target_modules", "peft_type"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "auto_mapping", "peft_version"),
        *("base_model_name_or_path", "revision", "inference_mode", "init_lora_weights", "lora_dropout"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_core"),
    )
)


@dataclass(frozen=True)
class _Factors:
    """By what the products of a LoRA are multiplied, layer by layer, before its scale.

    Attributes:
        alphas: by name of a layer, behind that of its part of the pipeline.
        adapters: by name of a part, the configuration that it was saved with.
    """

    alphas: Mapping[str, float] = field(default_factory=dict)
    adapters: Mapping[str, _Adapter] = field(default_factory=dict)

    @classmethod
    def of(cls, saved: str, alphas: Mapping[str, float], name: str) -> _Factors:
        """Of a file.

        Args:
            saved: the configuration in its header, as JSON; or empty.
            alphas: of its tensors.
            name: for messages.

        Raises:
            ModelUnavailable: if the configuration is damaged.
            BadInput: if it asks for more than a LoRA.
        """
        own = {_plain(key.removesuffix(".alpha")): alpha for key, alpha in alphas.items()}
        if not saved:
            return cls(own)
        from peft import LoraConfig

        usual = LoraConfig().to_dict()
        adapters = {}
        try:
            content = json.loads(saved)
            if not isinstance(content, dict):
                raise ValueError("it is no object")
            for part in ("transformer", "text_encoder"):
                settings = {
                    key.removeprefix(f"{part}."): value for key, value in content.items() if key.startswith(f"{part}.")
                }
                if not settings:
                    continue
                for key, value in settings.items():
                    if key not in _OF_TRAINING and value and value != usual.get(key):
                        raise BadInput(f"{name} was trained with {shown(key)[:40]}, which is not supported")
                adapters[part] = _Adapter.model_validate(settings)
                if strange := [key for key in adapters[part].alpha_pattern if not _LITERAL.fullmatch(key)]:
                    raise BadInput(
                        f"{name} gives its alphas by the pattern {shown(strange[0])}, and not by names of "
                        "layers, which is not supported"
                    )
        except (ValueError, ValidationError, RecursionError) as error:
            raise ModelUnavailable(f"{name} is damaged: its lora_adapter_metadata cannot be read") from error
        return cls(own, adapters)

    def of_part(self, part: str) -> _Factors:
        """Of a part of the pipeline, by the names within it."""
        own = {key.removeprefix(f"{part}."): alpha for key, alpha in self.alphas.items() if key.startswith(f"{part}.")}
        return _Factors(own, {part: self.adapters[part]} if part in self.adapters else {})

    def unused(self, parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Names of alphas that belong to no layer, given the tensors of each part that has some."""
        layers = {"transformer" if part == "transformer_2" else part: own for part, own in parts.items()}
        used = {_plain(f"{part}.{key.removesuffix('.lora_A.weight')}") for part, own in layers.items() for key in own}
        return [f"{layer}.alpha" for layer in self.alphas if layer not in used]

    def factor(self, place: str, rank: int) -> float:
        """Of a layer of a part, whose halves are of a rank."""
        for adapter in self.adapters.values():
            alpha = next(
                (
                    alpha
                    for key, alpha in adapter.alpha_pattern.items()
                    if place == key.removeprefix("^") or (key[0] != "^" and place.endswith(f".{key}"))
                ),
                adapter.lora_alpha,
            )
            return 1.0 if alpha is None else alpha / (math.sqrt(rank) if adapter.use_rslora else rank)
        return self.alphas.get(place.removeprefix("text_model."), float(rank)) / rank


def _plain(layer: str) -> str:
    """A layer's name without that of a module which text encoders have had between."""
    return layer.replace("text_encoder.text_model.", "text_encoder.", 1)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Holds back what diffusers and peft say of weights that they leave out, and lists these."""
    unread: list[str] = []
    listens = _Listens(unread)
    names = ("loaders.lora_conversion_utils", "loaders.lora_pipeline", "loaders.lora_base", "loaders.peft")
    loggers = [logging.getLogger(f"diffusers.{name}") for name in (*names, "utils.peft_utils")]
    for logger in loggers:
        logger.addFilter(listens)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield unread
    finally:
        for logger in loggers:
            logger.removeFilter(listens)


class _Listens(logging.Filter):
    """Drops messages, and keeps the names of weights that conversions could not place."""

    def __init__(self, unread: list[str]) -> None:
        super().__init__()
        self._unread = unread

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if said.startswith("Unsupported keys"):
            self._unread += re.findall(r"'([^']+)'", said)
        return False
