"""What a run took, for people: from reports to tables and lines."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_STEPS_SHOWN_WHOLE = 4


def timing_table(report: Mapping[str, Any]) -> RenderableType:
    """Steps of a report for people, the sum last; of many steps the first, the median and the last, or where attention
    is carried over steps the median of each kind.

    Of a picture in several stages, the sum of each stage in their place.
    """
    steps: Sequence[Mapping[str, Any]] = report["steps"]
    stages = report.get("stages", ())
    table = _table("stage" if len(stages) > 1 else "step")
    for stage in stages if len(stages) > 1 else ():
        own = [step for step in steps if step["stage"] == stage["number"]]
        table.add_row(f"{stage['width']}x{stage['height']}", *_cells(_sum(own)))
    for name, step in _telling_steps(steps) if len(stages) <= 1 else ():
        table.add_row(name, *_cells(step))
    table.add_section()
    table.add_row(f"all {len(steps)}", *_cells(_sum(steps)))
    return table


def pictures_table(reports: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line per picture or video: denoising time, the part of it in attention, density."""
    table = _table("seed")
    for made in reports:
        table.add_row(str(made["seed"]), *_cells(_sum(made["steps"])))
    return table


def phases_line(report: Mapping[str, Any]) -> str:
    """For example `load 1.2 s, text 0.1 s, denoise 4.5 s, decode 0.2 s, save 0.1 s`."""
    return ", ".join(f"{name} {milliseconds_text(value)}" for name, value in report["phases"].items())


def ranks_lines(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What several ranks took, a line for each picture or video that they made together.

    For example `4 ranks, cp=4,cfg=1: of 41.0 s a rank 21.3 s in attention, 3.1 s in exchange (1.2 GiB a step), at most
    0.4 s waiting`.
    """
    lines = [(made["seed"], ranks_text(made)) for made in reports]
    return [f"seed {seed}: {text}" if len(reports) > 1 else text for seed, text in lines if text]


def ranks_text(report: Mapping[str, Any]) -> str | None:
    """How ranks shared an output, in a line, and where it is told what each took; None of an output of one process."""
    from grat_cli.console.output import bytes_text

    if (ranks := report.get("ranks")) is None:
        return None
    shared = f"{ranks['count']} rank{'s' * (ranks['count'] > 1)}, cp={ranks['cp']},cfg={ranks['cfg']}"
    if not (each := ranks.get("each")):
        return shared
    middle = {name: statistics.median(one[name] for one in each) for name in each[0]}
    most = {name: max(one[name] for one in each) for name in each[0]}
    return (
        f"{shared}: of {milliseconds_text(middle['total_ms'])} a rank "
        f"{milliseconds_text(middle['attention_ms'])} in attention, "
        f"{milliseconds_text(middle['exchange_ms'])} in exchange ({bytes_text(most['bytes_per_step'])} a step), "
        f"at most {milliseconds_text(most['waiting_ms'])} waiting{_foretold_text(ranks.get('foretold', {}))}"
    )


def _foretold_text(foretold: Mapping[str, float]) -> str:
    """How much faster than on one rank it was to be, where that is known."""
    if "speedup" not in foretold:
        return ""
    return f"; foretold {foretold['speedup']:.1f}x as fast as one, {foretold['ceiling']:.1f}x without exchange"


def guard_lines(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the guard did, a line for each picture or video that was made with one.

    For example `guard 0.9: 7 of 12 layers went wider from step 3 on, 4 of them to full; density 0.172 became 0.493`,
    and of attention that is carried over steps `references came twice as often from step 8 on`.
    """
    lines = [(made["seed"], guard_text(made)) for made in reports]
    prefixes = {seed: f"seed {seed}: " if len(reports) > 1 else "" for seed, _ in lines}
    return [f"{prefixes[seed]}{text}" for seed, text in lines if text]


def guard_text(report: Mapping[str, Any]) -> str | None:
    """What the guard of a run did, in a line, or of a picture in several stages in one for each; None without one."""
    parts = _parts_with("guard", report)
    if not parts:
        return None
    texts = [f"{size}{_guard_summary(part)}" for size, part in parts]
    return f"guard {parts[0][1]['guard']['bar']:g}: {'; '.join(texts)}"


def cache_lines(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the cache took over, a line for each picture or video that was made with one.

    For example `cache first-block: 9 of 20 steps computed whole; in steps 4-6, 8-15 layer 0 computed, the rest reused;
    density 0.211 became 0.108`.
    """
    lines = [(made["seed"], cache_text(made)) for made in reports]
    prefixes = {seed: f"seed {seed}: " if len(reports) > 1 else "" for seed, _ in lines}
    return [f"{prefixes[seed]}{text}" for seed, text in lines if text]


def cache_text(report: Mapping[str, Any]) -> str | None:
    """What the cache of a run took over, in a line, or of a picture in several stages in one for each; None without."""
    parts = _parts_with("cache", report)
    if not parts:
        return None
    return f"cache {parts[0][1]['cache']['kind']}: " + "; ".join(
        f"{size}{_cache_summary(part)}" for size, part in parts
    )


def _cache_summary(part: Mapping[str, Any]) -> str:
    cache = part["cache"]
    total = sum(group["count"] for group in cache["steps"])
    whole = sum(group["count"] for group in cache["steps"] if group["computed"] is None)
    measured = ["its ratios are in the report"] if cache.get("ratios") else []
    if whole == total:
        return "; ".join([f"all {total} steps computed whole", *measured])
    texts = [f"{whole} of {total} steps computed whole"]
    for group in cache["steps"]:
        if group["computed"] is not None:
            steps = f"step{'' if group['count'] == 1 else 's'} {_counted_from_one(group['steps'])}"
            texts.append(f"in {steps} {computed_text(group['computed'], cache['skipped'], cache['layers'])}")
    return f"{'; '.join(texts)}; density {cache['planned_density']:.3f} became {part['density']:.3f}"


def computed_text(computed: Sequence[str], skipped: str, layers: int) -> str:
    """What of a step was computed, for people, such as `layer 0 computed, the rest reused`.

    Args:
        computed: of each transformer call, ranges of layers; empty where all were.
        skipped: what became of the others.
        layers: how many there are.
    """
    whole = f"0-{layers - 1}" if layers > 1 else "0"
    calls = list(dict.fromkeys(computed))
    if calls in ([], [whole]):
        return "all layers computed"
    if calls == [""]:
        return f"all layers {skipped}"
    names = {"": "no layer", whole: "all layers"}
    named = [names.get(call, f"layer{'' if call.isdecimal() else 's'} {call}") for call in calls]
    one, *others = named
    return (
        " and ".join([f"{one} computed", *(f"{other} in another call" for other in others)]) + f", the rest {skipped}"
    )


def over_steps_lines(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which steps were references where attention was carried over steps, a line for each picture or video.

    For example `over steps: 6 reference steps of 20 (1, 3, 6, 10, 14, 18), attention carried to the others; kept 0.5
    GiB`.
    """
    lines = [(made["seed"], over_steps_text(made)) for made in reports]
    prefixes = {seed: f"seed {seed}: " if len(reports) > 1 else "" for seed, _ in lines}
    return [f"{prefixes[seed]}over steps: {text}" for seed, text in lines if text]


def over_steps_text(report: Mapping[str, Any]) -> str | None:
    """Which steps of a run or plan are references, in a line, or of a picture in several stages in one for each; None
    where attention is not carried over steps."""
    parts = _parts_with("over_steps", report)
    return "; ".join(f"{size}{over_steps_summary(part['over_steps'])}" for size, part in parts) or None


def over_steps_summary(told: Mapping[str, Any]) -> str:
    """Of the plain data of `estimates.over_steps`."""
    from grat_cli.console.output import bytes_text

    groups = {group["kind"]: group for group in told["steps"]}
    of_all = f" of {sum(group['count'] for group in groups.values())}"
    first = next(iter(groups), None)
    counts = [
        f"{group['count']} {kind} step{'' if group['count'] == 1 else 's'}{of_all if kind == first else ''} "
        f"({_counted_from_one(group['steps'])})"
        for kind, group in groups.items()
        if kind != "carried"
    ]
    layers = "" if told["layers"] is None else f" of layers {told['layers']}"
    carried = [f"attention{layers} carried to the others"] if "carried" in groups else []
    kept, foretold = told.get("kept_bytes"), told.get("foretold_bytes")
    texts = [", ".join(counts + carried)]
    if kept is not None:
        texts.append(f"kept {bytes_text(kept)}" + ("" if foretold is None else f" ({bytes_text(foretold)} foretold)"))
    elif foretold is not None:
        texts.append(f"keeps {bytes_text(foretold)}")
    return "; ".join(text for text in texts if text)


def work_text(parts: Mapping[str, float]) -> str:
    """Attention work by part, such as `pairs 0.0321, text rows 0.0467, selection 0.0081; forming of means 0.0012
    besides`."""
    names = {"pairs": "pairs", "text": "text rows", "selection": "selection"}
    counted = ", ".join(f"{name} {parts[part]:.4f}" for part, name in names.items() if parts[part] or part == "pairs")
    return f"{counted}; forming of means {parts['forming']:.4f} besides" if parts["forming"] >= 5e-5 else counted


def step_text(computed: Sequence[str], skipped: str | None, kind: str | None, layers: int) -> str:
    """What a step was, and what of it was computed, for people, such as `reference` or `layer 0 computed, the rest
    reused`.

    Args:
        computed: as for `computed_text`.
        skipped: what a cache makes of layers; None without one.
        kind: a `StepKind` where attention is carried over steps, else None.
        layers: how many there are.
    """
    if skipped is None and kind in ("reference", "carried"):
        return kind
    others = [skipped, kind and "carried"]
    text = computed_text(computed, " or ".join(word for word in others if word), layers)
    return f"{kind}: {text}" if kind else text


def _counted_from_one(steps: str) -> str:
    return re.sub(r"\d+", lambda number: str(int(number.group()) + 1), steps)


def widenings_text(report: Mapping[str, Any]) -> str | None:
    """Which layers went wider when, such as `step 3: layers 0-3, 7 to b radius 2, groups 4x4`; None where none did."""
    groups: dict[tuple[str, int, str], list[int]] = {}
    for size, part in _parts_with("guard", report):
        for one in part["guard"]["widened"]:
            groups.setdefault((size, one["step"], one["to"]), []).append(one["layer"])
    texts = [
        f"{size}step {step + 1}: layer{'s' if len(layers) > 1 else ''} {ranges_text(layers)} to {to}"
        for (size, step, to), layers in groups.items()
    ]
    return "; ".join(texts) or None


def _parts_with(section: str, report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The run, or the stages of a picture that has several, each with its size; those that have a section."""
    stages = report.get("stages", ())
    if len(stages) <= 1:
        return [("", report)] if report.get(section) else []
    return [(f"{stage['width']}x{stage['height']} ", stage) for stage in stages if stage.get(section)]


def references_text(report: Mapping[str, Any]) -> str | None:
    """Which steps the guard made references when, such as `step 8: also 8, 11, 15`; None where it made none."""
    texts = []
    for size, part in _parts_with("guard", report):
        doubled = part["guard"].get("doubled", ())
        several = len({one["section"] for one in doubled}) > 1
        for one in doubled:
            steps = ranges_text([step + 1 for step in one["references"]])
            texts.append(
                f"{size}step {one['step'] + 1}: also {steps}" + several * f" of over_steps {one['section'] + 1}"
            )
    return "; ".join(texts) or None


def _guard_summary(part: Mapping[str, Any]) -> str:
    guard = part["guard"]
    lowest, widened, doubled = guard["lowest"], guard["widened"], guard.get("doubled", ())
    carried = guard.get("least_carried")
    texts = []
    if lowest is not None:
        least = f"{lowest['kept']:.2f} in layer {lowest['layer']} at step {lowest['step'] + 1}"
        texts.append(_widened_summary(guard, least) if widened else f"no layer went wider, the least kept was {least}")
    elif carried is None:
        return "all attention was full" if guard["planned_density"] == 1 else "too few steps to judge any layer"
    if carried is not None:
        least = f"{carried['kept']:.2f} to step {carried['step'] + 1}"
        if doubled:
            times = f", {len(doubled)} times over" if len(doubled) > 1 else ""
            first = min(one["step"] for one in doubled) + 1
            texts.append(f"references came twice as often from step {first} on{times} (least carried {least})")
        else:
            texts.append(f"references stayed as they were, the least carried was {least}")
    if widened or doubled:
        texts.append(f"density {guard['planned_density']:.3f} became {part['density']:.3f}")
    return "; ".join(texts)


def _widened_summary(guard: Mapping[str, Any], least: str) -> str:
    layers = {one["layer"] for one in guard["widened"]}
    full = {one["layer"] for one in guard["widened"] if one["to"] == "full"}
    to_full = f", {len(full)} of them to full" if full else ""
    first = min(one["step"] for one in guard["widened"]) + 1
    return f"{len(layers)} of {guard['layers']} layers went wider from step {first} on{to_full} (least kept {least})"


def ranges_text(numbers: Sequence[int]) -> str:
    """Ascending numbers with their runs drawn together, such as `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def milliseconds_text(milliseconds: float) -> str:
    """A time for people: `0.8 ms`, `210 ms`, `4.52 s` or `95 s`."""
    if milliseconds < 1000:
        return f"{milliseconds:.{1 if milliseconds < 10 else 0}f} ms"
    return f"{milliseconds / 1000:.{2 if milliseconds < 10_000 else 1}f} s"


def _table(first_column: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)  # 40 columns are enough
    table.add_column(first_column, no_wrap=True)
    for name in ("time", "attention", "share", "density"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(times: Mapping[str, Any]) -> tuple[str, str, str, str]:
    total, attention = times["total_ms"], times["attention_ms"]
    share = f"{attention / total:.0%}" if total else "-"
    return milliseconds_text(total), milliseconds_text(attention), share, f"{times['density']:.3f}"


def _sum(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Times added up, densities averaged."""
    times = {name: sum(step[name] for step in steps) for name in ("total_ms", "attention_ms")}
    return {**times, "density": statistics.fmean(step["density"] for step in steps) if steps else 0.0}


def _telling_steps(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    if len(steps) <= _STEPS_SHOWN_WHOLE:
        return [(f"{step['index'] + 1} {step.get('over_steps') or ''}".rstrip(), step) for step in steps]
    kinds = dict.fromkeys(kind for step in steps if (kind := step.get("over_steps")))
    if kinds:
        return [(kind, _median([step for step in steps if step.get("over_steps") == kind])) for kind in kinds]
    return [("first", steps[0]), ("median", _median(steps)), ("last", steps[-1])]


def _median(steps: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The step of median length, not medians column by column: its parts belong together."""
    return sorted(steps, key=lambda step: step["total_ms"])[len(steps) // 2]
