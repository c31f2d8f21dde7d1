"""What `grat bench` is asked for: its options as typed, and what can be refused of them before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

from grat_cli.bench.results import Level
from grat_cli.bench.sizes import TOKEN_SIDE, Size, grid_sizes, picture_sizes
from grat_cli.errors import BadInput
from grat_cli.fidelity.variants import Request, parse_modes, parse_peers, parse_variants
from grat_cli.generation.selection import DTYPES, require_choice, require_device
from grat_cli.models.lora import parse_loras
from grat_cli.models.weights import Weights
from grat_cli.presets import cache_from_text
from grat_cli.presets.schema import BACKENDS

LEVELS: tuple[Level, ...] = get_args(Level)
WEIGHTS = ("own", "random")
_COMPARE: Mapping[str, str] = {
    "attention": "full,na,grat-b",
    "step": "full,grat-b,grat-far",
    "image": "full,grat-b,grat-x,grat-far",
    "video": "full,planes,lines,b,bx,far",
    "highres": "off,direct,cascade",
}
_MAX_SECONDS: Mapping[str, float | None] = {
    "attention": 60.0,
    "step": 600.0,
    "image": None,
    "video": None,
    "highres": None,
}

# Which options say something to which level; the others are refused rather than ignored.
_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "cache": ("image", "video"),
    "peers": ("attention",),
    "heads": ("attention",),
    "head_dim": ("attention",),
    "grid": ("attention", "step"),
    "text": ("attention", "step"),
    "reps": ("attention", "step"),
    "model": ("step", "image", "video", "highres"),
    "layers": ("step",),
    "weights": ("step",),
    "prompts": ("image", "video", "highres"),
    "frames": ("video",),
    "steps": ("image", "video", "highres"),
    "no_recall": ("image", "video"),
    "preset": ("highres",),
    "lora": ("image", "video", "highres"),
    "fuse_lora": ("image", "video", "highres"),
}
_LEAST: Mapping[str, int] = {"text": 0, "heads": 1, "head_dim": 1, "reps": 1, "steps": 1}


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """The options of `grat bench` as typed, each by the option's name; None where one was not given.

    Attributes:
        command: the whole line, for the record.
    """

    level: str
    compare: str | None
    cache: str | None
    peers: str | None
    model: str | None
    prompts: str | None
    preset: str | None
    res: str | None
    frames: int | None
    grid: str | None
    text: int | None
    heads: int | None
    head_dim: int | None
    layers: str | None
    weights: str | None
    backend: str
    reps: int | None
    steps: int | None
    no_recall: bool | None
    max_seconds: float | None
    device: str
    dtype: str
    command: str
    lora: list[str] | None = None
    fuse_lora: bool | None = None

    def check(self) -> None:
        """Refuses what is wrong whatever the model.

        Raises:
            BadInput: naming the option.
            ModelUnavailable: if a LoRA is not there.
        """
        require_choice("--level", self.level, LEVELS)
        for name, levels in _ONLY_FOR.items():
            if getattr(self, name) is not None and self.level not in levels:
                raise BadInput(
                    f"{_option(name)} says nothing to --level {self.level}: it is for {' and '.join(levels)}"
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"{_option(name)} {value}: expected {least} or more")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise BadInput(f"--max-seconds {self.max_seconds:g}: expected more than 0")
        require_device(self.device)
        require_choice("--dtype", self.dtype, DTYPES)
        require_choice("--backend", self.backend, BACKENDS)
        if self.weights is not None:
            require_choice("--weights", self.weights, WEIGHTS)
        _ = self.modes if self.level == "highres" else self.variants
        _ = self.peer_names
        _ = self.added
        if self.level == "attention":
            _ = self.sizes()

    @property
    def compared(self) -> str:
        """What to compare, by default what shows most at the level."""
        return self.compare if self.compare is not None else _COMPARE[self.level]

    @cached_property
    def variants(self) -> tuple[Request, ...]:
        """Of `--compare`, and full attention and each of these once more with each of `--cache`.

        Raises:
            BadInput: as `parse_variants` and `cache_from_text`.
        """
        caches = self.cache.split(",") if self.cache is not None else ()
        for cache in caches:
            cache_from_text(cache, "--cache")
        plain = parse_variants(self.compared, self.level)
        names = [request.name for request in plain]
        without = dict.fromkeys(["full", *(request.name for request in plain if request.cache is None)])
        more = [f"{name}+{cache}" for cache in caches for name in without]
        return parse_variants(",".join([*names, *more]), self.level)

    @property
    def variants_beside_full(self) -> tuple[Request, ...]:
        """Those beside full attention, which whole runs and steps always measure."""
        return tuple(request for request in self.variants if not request.is_full)

    @property
    def modes(self) -> tuple[str, ...]:
        """The ways to make large pictures in `--compare`.

        Raises:
            BadInput: as `parse_modes`.
        """
        return parse_modes(self.compared)

    @property
    def peer_names(self) -> tuple[str, ...]:
        """Of `--peers`.

        Raises:
            BadInput: as `parse_peers`.
        """
        return parse_peers(self.peers) if self.peers is not None else ()

    @property
    def added(self) -> Weights:
        """LoRAs, which whole runs have in every row.

        Raises:
            BadInput, ModelUnavailable: as `parse_loras`.
        """
        return Weights(loras=parse_loras(self.lora or ()), fuse_loras=bool(self.fuse_lora))

    def sizes(self, token_side: int = TOKEN_SIDE) -> list[Size]:
        """Those of `--res`, then those of `--grid`.

        Args:
            token_side: pixels that a token stands for along each axis.

        Raises:
            BadInput: if one is no size.
        """
        return [*picture_sizes(self.res, self.text, token_side), *grid_sizes(self.grid, self.text)]

    @property
    def most_seconds(self) -> float | None:
        """For one row; None for no limit."""
        return _MAX_SECONDS[self.level] if self.max_seconds is None else self.max_seconds


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
