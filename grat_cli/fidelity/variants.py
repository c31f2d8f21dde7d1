"""What the names of `--compare` stand for: dense attention, patterns of groups, windows around each token, presets.

A name may carry parameters, each after a colon: `grat-b:radius=2`, `na:window=49`, `grat-far:block=8x8:group=16x16`.
Those of `--variant` are understood as well: `b` is short for `grat-b`, `lines` for `grat-x:share=2`. In whole runs, a
preset by name or from a file stands for its attention and schedule: `demo-far`, `./tuned.yaml`. There, each may have a
step cache after a plus sign: `far+first-block`, `demo-tuned+taylor:cache_interval=3:max_order=2`, `full+taylor`; and
full attention may take fewer steps: `full:steps=10`.
The names of `--peers` stand here as well, so that a mistake in either is seen without loading torch.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from grat_cli.errors import BadInput, choices, nearest
from grat_kernels import (
    Block,
    CrissCross,
    Far,
    Full,
    Grid,
    Grouping,
    HeadPlan,
    Pattern,
    Plan,
    SlidingTile,
    Union,
    build_head_plan,
    build_plan,
)
from grat_kernels.analysis import reach

if TYPE_CHECKING:
    from grat_cli.presets import Cache, Preset

Role = Literal["full", "pattern", "baseline", "peer", "noise floor"]
# The parameters that each name takes.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "full": ("steps",),
    "full-list": ("group",),
    "na": ("window",),
    "clear": ("window",),
    "grat-b": ("radius", "group"),
    "grat-x": ("share", "group"),
    "grat-bx": ("radius", "share", "group"),
    "grat-far": ("radius", "block", "group"),
    "grat-choose": ("exact", "fine", "block", "means", "radius", "group"),
    "sta": ("window", "group"),
    "grat-heads": ("radius", "group"),
}
NAMES: tuple[str, ...] = tuple(PARAMETERS)
# The names that presets go by, and what they are short for; what they fix cannot be given again.
SHORT_NAMES: Mapping[str, tuple[str, Mapping[str, tuple[int, ...]]]] = {
    "b": ("grat-b", {}),
    "x": ("grat-x", {}),
    "planes": ("grat-x", {"share": (1,)}),
    "lines": ("grat-x", {"share": (2,)}),
    "bx": ("grat-bx", {}),
    "far": ("grat-far", {}),
    "choose": ("grat-choose", {}),
}
_OF_VIDEOS = ("planes", "lines")
_OF_TOKENS = ("na", "clear")
# Not a name but what a preset is: its attention and schedule, in runs that have steps and layers.
PRESET = "preset"
_LEVELS_OF_PRESETS: tuple[str, ...] = ("image", "video")
_LEVELS_OF_STEPS = _LEVELS_OF_PRESETS
# What presets say by rules is measured alone at the level of one attention.
_LEVELS_OF_HEADS: tuple[str, ...] = ("attention",)
# What `--compare` names at `--level highres`: ways to make pictures beyond the trained size.
MODES: Mapping[str, str] = {
    "off": "From noise, as at the trained size.",
    "direct": "From noise, with positions and attention fitted to the size.",
    "cascade": "The base, redone at growing sizes.",
}
PEERS: tuple[str, ...] = ("natten", "flex", "flashinfer", "sage", "pisa")

# Groups and far blocks of grids large enough for them, by number of axes. On a smaller axis both are halved until
# there are this many groups: with fewer, a pattern is nearly full attention. On three axes fewer are enough, because
# densities multiply: of 4x4x4 groups, the 3x3x3 around each are a quarter.
_GROUPS: Mapping[int, tuple[int, ...]] = {1: (256,), 2: (16, 16), 3: (4, 8, 8)}
_BLOCKS: Mapping[int, tuple[int, ...]] = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
_ENOUGH_GROUPS: Mapping[int, int] = {1: 6, 2: 6, 3: 4}

# Of what is chosen by content: blocks that are attended token by token, and blocks by means within them.
_CHOSEN: Mapping[int, tuple[int, int]] = {1: (8, 32), 2: (8, 32), 3: (16, 64)}

_EXAMPLES = {
    "window": "49",
    "radius": "2",
    "share": "2",
    "block": "8x8",
    "means": "4x4",
    "group": "16x16",
    "exact": "8",
    "fine": "32",
    "steps": "10",
}
_SINGLE = ("share", "exact", "fine", "steps")


@dataclass(frozen=True)
class Request:
    """A name of `--compare`, read but not yet fitted to a grid.

    Attributes:
        name: as typed.
        kind: one of `NAMES`, or `PRESET`.
        parameters: numbers by parameter, one or one per axis.
        preset: the preset, as it was read.
        cache: what steps take over from those before them; None for nothing.
    """

    name: str
    kind: str
    parameters: Mapping[str, tuple[int, ...]]
    preset: Preset | None = None
    cache: Cache | None = None

    @property
    def is_full(self) -> bool:
        """Whether it is full attention and nothing else, which others are compared with."""
        return self.kind == "full" and not self.parameters and self.cache is None


@dataclass(frozen=True)
class Variant:
    """What a request means on one grid.

    Attributes:
        name: as typed.
        kind: one of `NAMES`, or `PRESET`.
        role: of its row in a result.
        description: the pattern in words.
        grid: image tokens per axis.
        grouping: groups and token order; None for `full`, `na` and `clear`, which know no groups, and for presets.
        pattern: which groups attend which; None likewise, and where heads differ.
        attention: the attention section of a preset that means the same; None where presets cannot say it.
        window: tokens per axis for `na`, the radius (`window`,) for `clear`, else None.
        head_patterns: patterns that heads take in turn, where they differ.
        preset: what says which attention runs when; None where it is one attention throughout.
        obstacle: why it does not exist on this grid; None where it does.
        cache: what steps take over from those before them; None for nothing.
        steps: of a run; None for as many as all others.
    """

    name: str
    kind: str
    role: Role
    description: str
    grid: Grid
    grouping: Grouping | None = None
    pattern: Pattern | None = None
    attention: Mapping[str, Any] | None = None
    window: tuple[int, ...] | None = None
    head_patterns: tuple[Pattern, ...] = ()
    preset: Preset | None = None
    obstacle: str | None = None
    cache: Cache | None = None
    steps: int | None = None

    def plan(self, text_len: int, text_first: bool, heads: int = 1) -> Plan | HeadPlan | None:
        """The plan of a joint sequence; None for what is not one plan: windows, dense attention and presets.

        Raises:
            ValueError: if heads are to differ and there are too few.
        """
        if self.grouping is None:
            return None
        if self.pattern is not None:
            return build_plan(self.grouping, self.pattern, text_len, text_first)
        if heads < len(self.head_patterns):
            raise ValueError(f"{len(self.head_patterns)} patterns by head need as many heads, not {heads}")
        classes = tuple((self.grouping, pattern) for pattern in self.head_patterns)
        return build_head_plan(classes, tuple(head % len(classes) for head in range(heads)), text_len, text_first)

    def attended_pairs(self, text_len: int, text_first: bool, heads: int = 1) -> float:
        """Query-key pairs of the joint sequence that are computed, a summary counted as one key; mean over heads.

        Those of a preset depend on the run: `AttentionSchedule` tells.
        """
        assert self.preset is None
        tokens = self.grid.tokens + text_len
        if (plan := self.plan(text_len, text_first, heads)) is not None:
            return plan.attended_pairs
        if self.window is None:
            return tokens**2
        count = na_pairs if self.kind == "na" else clear_pairs
        return count(self.grid, self.window) + self.grid.tokens * text_len + text_len * tokens

    def reach(self) -> float:
        """Largest distance, in tokens on the grid, from a query to an image token it attends exactly, or may
        choose to."""
        if self.preset is not None:
            return max(self._reaches_of_preset(self.preset))
        if self.grouping is not None:
            patterns = self.head_patterns or (self.pattern,)
            return max(reach(build_plan(self.grouping, pattern)) for pattern in patterns if pattern is not None)
        if self.kind == "na" and self.window is not None:
            # At a border the window shifts inward whole: its far end is a whole window away.
            return math.hypot(*(width - 1 for width in self.window))
        if self.kind == "clear" and self.window is not None:
            offsets = clear_offsets(self.grid, self.window)
            return float(np.sqrt((offsets**2).sum(1).max()))
        return self._diagonal

    @property
    def chooses(self) -> bool:
        """Whether groups choose by content what they attend."""
        if self.preset is not None:
            return self.preset.chooses
        return self.pattern is not None and self.pattern.choice is not None

    @property
    def _diagonal(self) -> float:
        return math.hypot(*(extent - 1 for extent in self.grid.shape))

    def _reaches_of_preset(self, preset: Preset) -> Iterator[float]:
        if preset.schedule.dense_steps:
            yield self._diagonal
        for attention in preset.attentions:
            pattern = attention.pattern()
            dense = isinstance(pattern, Full)
            yield self._diagonal if dense else reach(build_plan(Grouping(self.grid, attention.group), pattern))


def parse_variants(text: str, level: str | None = None, option: str = "--compare") -> tuple[Request, ...]:
    """Reads the value of `--compare`, or of another option, such as `full,na:window=49,grat-b`.

    Args:
        text: the value.
        level: what they are for; None allows what any level does.
        option: that it was typed for.

    Raises:
        BadInput: for a name or parameter that does not exist or is for another level, a value that is no number, a
            preset that is not valid, or a name given twice.
    """
    requests = tuple(_request(item.strip(), level, option) for item in text.split(","))
    for number, request in enumerate(requests):
        if request.name in (earlier.name for earlier in requests[:number]):
            raise BadInput(f"{option} names {request.name} twice: leave one out")
    return requests


def parse_peers(text: str) -> tuple[str, ...]:
    """Reads the value of `--peers`, such as `natten,flex`.

    Raises:
        BadInput: naming the nearest for a name that does not exist.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in PEERS:
            raise BadInput(f"--peers {name}: {choices(name, PEERS)}" if name else "--peers: a name is empty")
    return names


def parse_modes(text: str) -> tuple[str, ...]:
    """Reads the value of `--compare` at `--level highres`, such as `off,cascade`.

    Raises:
        BadInput: naming the nearest for a name that does not exist.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in MODES:
            raise BadInput(f"--compare {name}: {choices(name, MODES)}")
    return names


def _request(text: str, level: str | None, option: str) -> Request:
    if not text:
        raise BadInput(f"{option}: a name is empty")
    without, cache = _split_cache(text)
    if cache:
        return _cached_request(text, without, cache, level, option)
    word, *items = text.split(":")
    if word not in (*NAMES, *SHORT_NAMES):
        return _preset_request(text, level, option)
    if word == "grat-heads" and level not in (None, *_LEVELS_OF_HEADS):
        raise BadInput(f"{option} {text} says nothing to --level {level}: there, rules of a preset are for some heads")
    kind, fixed = SHORT_NAMES.get(word, (word, {}))
    parameters: dict[str, tuple[int, ...]] = {}
    for item in items:
        name, _, value = item.partition("=")
        known = tuple(known for known in PARAMETERS[kind] if known not in fixed)
        if name not in known:
            takes = choices(name, known) if known else "it takes no parameters"
            raise BadInput(f"{option} {text}: {word} has no parameter {name!r}: {takes}")
        if name == "steps" and level not in (None, *_LEVELS_OF_STEPS):
            raise BadInput(f"{option} {text}: runs have steps, at --level {' and '.join(_LEVELS_OF_STEPS)}")
        if name in parameters:
            raise BadInput(f"{option} {text}: {name} is given twice")
        if not re.fullmatch(r"\d{1,6}(x\d{1,6})*", value, re.ASCII):
            raise BadInput(f"{option} {text}: expected {name}={_EXAMPLES[name]}")
        parameters[name] = tuple(int(part) for part in value.split("x"))
    for name in _SINGLE:
        if len(parameters.get(name, (1,))) > 1:
            raise BadInput(f"{option} {text}: {name} is one number, such as {name}={_EXAMPLES[name]}")
    return Request(text, kind, {**parameters, **fixed})


def _split_cache(text: str) -> tuple[str, str]:
    """A name, and the cache after its last plus sign; a path may have such signs of its own."""
    without, plus, cache = text.rpartition("+")
    return (without, cache) if plus and re.fullmatch(r"[A-Za-z-]*(:.*)?", cache, re.ASCII) else (text, "")


def _cached_request(text: str, without: str, cache: str, level: str | None, option: str) -> Request:
    """A name with a cache."""
    from grat_cli.presets import cache_from_text

    if level not in (None, *_LEVELS_OF_PRESETS):
        raise BadInput(
            f"{option} {text}: caches are for --level {' and '.join(_LEVELS_OF_PRESETS)}, where there are steps to "
            f"take over from: give {without or 'full'} alone"
        )
    request = _request(without, level, option)
    if request.kind in _OF_TOKENS:
        raise BadInput(f"{option} {text}: {request.kind} is compared without a cache: give {without} alone")
    return replace(request, name=text, cache=cache_from_text(cache, f"{option} {without} with"))


def _preset_request(text: str, level: str | None, option: str) -> Request:
    """What is none of the names above: a preset by name or from a file."""
    from grat_cli.presets import load_preset, preset_names

    names, presets = (*NAMES, *SHORT_NAMES), preset_names()
    if text not in presets and not text.endswith((".yaml", ".yml")) and os.sep not in text:
        word = text.partition(":")[0]
        if level not in (None, *_LEVELS_OF_PRESETS):
            raise BadInput(f"{option} {text}: {choices(word, names)}")
        closest = nearest(word, (*names, *presets))
        known = f"choose from {', '.join(names)}, or give a preset by name or file"
        raise BadInput(
            f"{option} {text}: did you mean {closest!r}? ({known})" if closest else f"{option} {text}: {known}"
        )
    if level not in (None, *_LEVELS_OF_PRESETS):
        raise BadInput(
            f"{option} {text}: presets are for --level {' and '.join(_LEVELS_OF_PRESETS)}, where there are steps and "
            "layers: give a pattern, such as grat-far"
        )
    preset = load_preset(text)
    return Request(text, PRESET, {}, preset, preset.cache)


def variant_for(request: Request, grid: Grid, option: str = "--compare") -> Variant:
    """What a request means on a grid.

    Raises:
        BadInput: if a parameter does not fit the grid.
    """
    try:
        if (word := request.name.partition(":")[0].partition("+")[0]) in _OF_VIDEOS and grid.axes != 3:
            raise ValueError(f"{word} are for videos, which have three axes")
        variant = _MAKERS[request.kind](request, grid)
        if request.cache is None:
            return variant
        words = f"{variant.description}; cache {request.cache.summary}"
        return replace(variant, role="pattern", description=words, cache=request.cache)
    except ValueError as error:
        raise BadInput(f"{option} {request.name} on {size_text(grid.shape)} tokens: {error}") from error


def default_group(grid: Grid) -> tuple[int, ...]:
    """16x16 or 4x8x8 tokens, on short axes fewer."""
    return tuple(
        _halved(size, extent, _ENOUGH_GROUPS[grid.axes])
        for size, extent in zip(_per_axis_default(_GROUPS, grid), grid.shape, strict=True)
    )


def size_text(sizes: Sequence[int]) -> str:
    """`16x16`."""
    return "x".join(map(str, sizes))


def na_starts(extent: int, window: int) -> np.ndarray:
    """First key of each query along an axis, `[extent]`: the window is centred, and shifted inward at the borders.

    NATTEN, "neighborhood attention" (arXiv 2204.07143, section 3): every query has exactly `window` keys per axis.
    """
    return np.clip(np.arange(extent) - window // 2, 0, extent - window)


def na_pairs(grid: Grid, window: Sequence[int]) -> int:
    """Image-image pairs of neighbourhood attention."""
    return grid.tokens * math.prod(window)


def na_window_near(grid: Grid, keys: float) -> tuple[int, ...]:
    """The neighbourhood whose number of keys is nearest to `keys`: odd widths in the proportions of the groups.

    An axis that is shorter than its share is covered whole.
    """
    shares = default_group(grid)
    covered: set[int] = set()
    while True:
        free = [axis for axis in range(grid.axes) if axis not in covered]
        area = keys / math.prod(grid.shape[axis] for axis in covered) / math.prod(shares[axis] for axis in free)
        factor = area ** (1 / len(free)) if free else 1.0
        too_short = {axis for axis in free if shares[axis] * factor >= grid.shape[axis]}
        if not too_short:
            break
        covered |= too_short
    options = []
    for axis, extent in enumerate(grid.shape):
        below = max(1, int((shares[axis] * factor - 1) // 2 * 2 + 1))
        options.append([extent] if axis in covered else sorted({below, min(below + 2, extent)}))
    return min(itertools.product(*options), key=lambda widths: abs(math.prod(widths) - keys))


def clear_offsets(grid: Grid, window: Sequence[int]) -> np.ndarray:
    """Offsets (Δy, Δx) with Δy² + Δx² < window² that exist on the grid, `[offsets, 2]` (CLEAR, arXiv 2412.16112)."""
    reach = [min(window[0] - 1, extent - 1) for extent in grid.shape]
    offsets = np.stack(np.meshgrid(*(np.arange(-most, most + 1) for most in reach), indexing="ij"), -1).reshape(-1, 2)
    return offsets[(offsets**2).sum(1) < window[0] ** 2]


def clear_pairs(grid: Grid, window: Sequence[int]) -> int:
    """Image-image pairs of CLEAR: at borders the disc is cut off."""
    overlap = np.asarray(grid.shape) - np.abs(clear_offsets(grid, window))
    return int(overlap.prod(1).sum())


# What each name means


def _full(request: Request, grid: Grid) -> Variant:
    (steps,) = request.parameters.get("steps", (None,))
    words, section = "every token attends every token", {"variant": "full"}
    if steps is None:
        return Variant(request.name, "full", "full", words, grid, attention=section)
    if steps < 1:
        raise ValueError("a run has one step or more")
    words = f"{words}, in runs of {steps} {'step' if steps == 1 else 'steps'}"
    return Variant(request.name, "full", "baseline", words, grid, attention=section, steps=steps)


def _full_list(request: Request, grid: Grid) -> Variant:
    """Full attention by the span kernel: its quality apart from what sparsity and scheduling add."""
    words = "every token attends every token, by the span kernel"
    return _grouped(request, grid, Full(), words, {"variant": "full"}, role="baseline")


def _grat_b(request: Request, grid: Grid) -> Variant:
    radius = _plain(request.parameters.get("radius", (1,)))
    words = _near_words(radius, grid)
    return _grouped(request, grid, Block(radius), words, {"variant": "b", "radius": _listed(radius)})


def _grat_x(request: Request, grid: Grid) -> Variant:
    share = _share(request)
    words = _CROSS_WORDS.get((grid.axes, share), f"groups that share {share} coordinates")
    return _grouped(request, grid, CrissCross(share), words, {"variant": "x", "share": share})


def _grat_bx(request: Request, grid: Grid) -> Variant:
    # On three axes lines, as in the preset hunyuan-bx: planes leave little to gain.
    radius, share = _plain(request.parameters.get("radius", (1,))), _share(request, 2 if grid.axes == 3 else 1)
    cross = _CROSS_WORDS.get((grid.axes, share), f"groups that share {share} coordinates")
    words = f"{_near_words(radius, grid)}, and {cross}"
    section = {"variant": "bx", "radius": _listed(radius), "share": share}
    return _grouped(request, grid, Union(Block(radius), CrissCross(share)), words, section)


def _grat_far(request: Request, grid: Grid) -> Variant:
    radius = _plain(request.parameters.get("radius", (1,)))
    # The nearest distance that is not exact along every axis: exact attention wins where both apply.
    beyond = radius if isinstance(radius, int) else min(radius)
    group = _group(request, grid)
    block = _sizes(request, "block", grid) if "block" in request.parameters else _default_block(grid, group)
    pattern = Union(Block(radius), Far([(beyond, block)]))
    words = f"{_near_words(radius, grid)}, all beyond by means of {size_text(block)}"
    far = [{"beyond": beyond, "block": list(block)}]
    return _grouped(request, grid, pattern, words, {"variant": "b", "radius": _listed(radius), "far": far})


def _grat_choose(request: Request, grid: Grid) -> Variant:
    """Each group itself, and of all others what each group and head chooses by content; radius 0, unlike elsewhere."""
    radius = _plain(request.parameters.get("radius", (0,)))
    beyond = radius if isinstance(radius, int) else min(radius)
    group = _group(request, grid)
    block = _sizes(request, "block", grid) if "block" in request.parameters else _block_to_choose(grid, group)
    means = _sizes(request, "means", grid) if "means" in request.parameters else _means_within(block)
    exact, fine = (
        request.parameters.get(name, (usual,))[0]
        for name, usual in zip(("exact", "fine"), _per_axis_default(_CHOSEN, grid), strict=True)
    )
    pattern = Union(Block(radius), Far([(beyond, block)], (exact, fine, means)))
    words = (
        f"{_near_words(radius, grid)}; by content {exact} blocks of {size_text(block)} "
        f"token by token and {fine} by means of {size_text(means)}, all others by one mean each"
    )
    far = {
        "levels": [{"beyond": beyond, "block": list(block)}],
        "choose": {"exact": exact, "fine": fine, "block": list(means)},
    }
    return _grouped(request, grid, pattern, words, {"variant": "b", "radius": _listed(radius), "far": far})


def _grat_heads(request: Request, grid: Grid) -> Variant:
    """GRAT-B with another radius for every other head: the first axis sees one group less, or one more, each way."""
    wanted = request.parameters.get("radius", (1,))
    radius = wanted * grid.axes if len(wanted) == 1 else wanted
    if radius[0] < 1:
        raise ValueError("the radius on the first axis must be 1 or more: heads take one less and one more in turn")
    radii = [(radius[0] + change, *radius[1:]) for change in (-1, 1)]
    group = _group(request, grid)
    for one in radii:
        build_plan(Grouping(grid, group), Block(one))  # a radius that does not fit is refused here
    words = " and ".join(_neighbourhood(one, grid) for one in radii)
    return Variant(
        request.name,
        "grat-heads",
        "pattern",
        f"heads in turn the {words} groups around each group, as much as {_neighbourhood(radius, grid)} for all; "
        f"groups of {size_text(group)}",
        grid,
        Grouping(grid, group),
        head_patterns=tuple(map(Block, radii)),
    )


def _sta(request: Request, grid: Grid) -> Variant:
    window = _plain(request.parameters.get("window", (3,)))
    widths = (window,) * grid.axes if isinstance(window, int) else window
    words = f"a sliding window of {size_text(widths)} groups"
    section = {"variant": "sta", "window": _listed(window)}
    return _grouped(request, grid, SlidingTile(window), words, section, role="baseline")


def _na(request: Request, grid: Grid) -> Variant:
    typed = "window" in request.parameters
    if typed:
        wanted = _sizes(request, "window", grid)
        if any(width % 2 == 0 for width in wanted):
            raise ValueError(f"a window must be an odd number of tokens, not {size_text(wanted)}")
        window = tuple(min(width, extent) for width, extent in zip(wanted, grid.shape, strict=True))
    else:
        window = na_window_near(grid, _grat_b_keys(grid))
    words = f"neighbourhood attention: {size_text(window)} tokens around each token{'' if typed else _AS_DENSE}"
    return Variant(request.name, "na", "baseline", words, grid, window=window)


def _clear(request: Request, grid: Grid) -> Variant:
    typed = request.parameters.get("window")
    if typed is not None and (len(typed) != 1 or typed[0] < 1):
        raise ValueError("a window is one radius in tokens, such as window=16")
    if grid.axes != 2:
        obstacle = f"CLEAR is defined on two axes, not {grid.axes}"
        return Variant(request.name, "clear", "baseline", "CLEAR", grid, obstacle=obstacle)
    radius = typed[0] if typed else _clear_radius_like_grat_b(grid)
    words = f"CLEAR: tokens nearer than {radius}{'' if typed else _AS_DENSE}"
    return Variant(request.name, "clear", "baseline", words, grid, window=(radius,))


def _preset(request: Request, grid: Grid) -> Variant:
    preset = request.preset
    assert preset is not None
    if (axes := len(preset.attention.group)) != grid.axes:
        raise ValueError(f"{preset.name} is for {preset.model} models, whose tokens have {axes} axes: see grat presets")
    dense, rules = preset.schedule.dense_steps, len(preset.schedule.rules)
    words = [f"preset {preset.name}: {preset.attention.summary}"]
    if dense:
        words.append(f"{dense:.0%} of the steps dense" if isinstance(dense, float) else f"dense steps {dense}")
    if rules:
        words.append(f"rules {rules}")
    plain = not rules and preset.attention.variant in ("full", "sta")
    return Variant(request.name, PRESET, "baseline" if plain else "pattern", "; ".join(words), grid, preset=preset)


_MAKERS = {
    "full": _full,
    "full-list": _full_list,
    "na": _na,
    "clear": _clear,
    "grat-b": _grat_b,
    "grat-x": _grat_x,
    "grat-bx": _grat_bx,
    "grat-far": _grat_far,
    "grat-choose": _grat_choose,
    "sta": _sta,
    "grat-heads": _grat_heads,
    PRESET: _preset,
}
_AS_DENSE = ", the window nearest in density to grat-b"
_CROSS_WORDS = {
    (2, 1): "the groups in each group's row and column",
    (3, 1): "the groups in each group's three planes",
    (3, 2): "the groups in each group's three lines",
}


def _grouped(
    request: Request,
    grid: Grid,
    pattern: Pattern,
    words: str,
    section: Mapping[str, Any],
    role: Role = "pattern",
) -> Variant:
    group = _group(request, grid)
    grouping = Grouping(grid, group)
    build_plan(grouping, pattern)  # a pattern that does not fit is refused here
    attention = None if section["variant"] == "full" else {**section, "group": list(group)}
    words = f"{words}, groups of {size_text(group)}"
    return Variant(request.name, request.kind, role, words, grid, grouping, pattern, attention)


def _group(request: Request, grid: Grid) -> tuple[int, ...]:
    return _sizes(request, "group", grid) if "group" in request.parameters else default_group(grid)


def _sizes(request: Request, name: str, grid: Grid) -> tuple[int, ...]:
    """A parameter as one number per axis."""
    values = request.parameters[name]
    if len(values) == 1:
        return values * grid.axes
    if len(values) != grid.axes:
        raise ValueError(f"{name} {size_text(values)} has {len(values)} numbers, the grid has {grid.axes} axes")
    return values


def _share(request: Request, default: int = 1) -> int:
    return request.parameters.get("share", (default,))[0]


def _plain(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(values) == 1 else values


def _listed(value: int | tuple[int, ...]) -> int | list[int]:
    return value if isinstance(value, int) else list(value)


def _near_words(radius: int | tuple[int, ...], grid: Grid) -> str:
    if np.max(radius) == 0:
        return "each group itself"
    return f"the {_neighbourhood(radius, grid)} groups around each group"


def _neighbourhood(radius: int | tuple[int, ...], grid: Grid) -> str:
    radii = (radius,) * grid.axes if isinstance(radius, int) else radius
    return size_text([2 * axis_radius + 1 for axis_radius in radii])


def _per_axis_default(table: Mapping[int, tuple[int, ...]], grid: Grid) -> tuple[int, ...]:
    if grid.axes not in table:
        raise ValueError(f"grids of {grid.axes} axes have no default groups: use two or three axes")
    return table[grid.axes]


def _halved(size: int, extent: int, enough: int) -> int:
    while size > 1 and -(-extent // size) < enough:
        size //= 2
    return size


def _default_block(grid: Grid, group: tuple[int, ...]) -> tuple[int, ...]:
    """8x8 or 4x4x4 tokens, smaller as the groups are; each size divides its group."""
    usual_blocks, usual_groups = _per_axis_default(_BLOCKS, grid), _per_axis_default(_GROUPS, grid)
    block = []
    for size, usual_block, usual_group in zip(group, usual_blocks, usual_groups, strict=True):
        most = max(1, usual_block * size // usual_group)
        block.append(max(divisor for divisor in range(1, most + 1) if size % divisor == 0))
    return tuple(block)


def _block_to_choose(grid: Grid, group: tuple[int, ...]) -> tuple[int, ...]:
    """8x8 or 4x4x4 tokens, or as large as the groups where those are smaller; each size divides its group."""
    usual = _per_axis_default(_BLOCKS, grid)
    return tuple(
        max(divisor for divisor in range(1, min(size, most) + 1) if size % divisor == 0)
        for size, most in zip(group, usual, strict=True)
    )


def _means_within(block: tuple[int, ...]) -> tuple[int, ...]:
    """Halves of a block's two last axes, as far as they can be divided, or else of those before; four of most blocks.

    Raises:
        ValueError: if the block is one token.
    """
    if max(block) == 1:
        raise ValueError(
            f"blocks of {size_text(block)} have no means within them: give a larger block, such as block=4"
        )
    parts = [max(part for part in range(1, max(1, size // 2) + 1) if size % part == 0) for size in block]
    kept = len(block) - 2 if max(block[-2:]) > 1 else 0
    return (*block[:kept], *parts[kept:])


def _grat_b_keys(grid: Grid) -> float:
    """Mean image keys of an image query of `grat-b`."""
    return build_plan(Grouping(grid, default_group(grid)), Block(1)).attended_pairs / grid.tokens


def _clear_radius_like_grat_b(grid: Grid) -> int:
    """The radius whose mean keys are nearest to those of `grat-b`."""
    target = _grat_b_keys(grid) * grid.tokens
    guess = max(1, round(math.sqrt(target / grid.tokens / math.pi)))
    # Discs cut off at borders need a larger radius, never a smaller one, and one below the grid's diagonal.
    first, last = guess, math.isqrt(sum(extent**2 for extent in grid.shape)) + 1
    while first < last:
        middle = (first + last) // 2
        if clear_pairs(grid, (middle,)) < target:
            first = middle + 1
        else:
            last = middle
    return min(max(1, first - 1), first, key=lambda radius: abs(clear_pairs(grid, (radius,)) - target))
