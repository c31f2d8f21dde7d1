"""`grat tune`: a preset fitted to a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from grat_cli.commands import options
from grat_cli.commands.parameters import argument, only, option, switch

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grat_cli.presets import Evidence

_TARGET, _OVER_STEPS, _OBSERVATION = "Target", "Over steps", "Observation"


def tune(
    prompts: Annotated[
        str,
        argument(
            "COUNT|FILE",
            "Prompts to observe the model with: so many of the built-in ones, or a text file with one on each "
            "line. Four to eight are enough.",
        ),
    ],
    *,
    target_density: float | None = option(
        "SHARE",
        "Attended pairs over all pairs, text, choice by content and steps that are not computed included, as grat plan "
        "gives it: 0.1.",
        _TARGET,
    ),
    target_recall: float | None = option(
        "SHARE", "Softmax mass of full attention on what is attended token by token: 0.8.", _TARGET
    ),
    check: int = option(
        "COUNT",
        "Compare so many outputs of the preset with those of full attention, of other seeds and, where the "
        "built-in prompts go as far, other prompts. Default: 4.",
        _TARGET,
        4,
    ),
    no_over_steps: bool = switch(
        "Compute attention at every step. By default, for a density, some steps are computed in full and outputs are "
        "carried to those between.",
        _OVER_STEPS,
    ),
    references: str | None = option(
        "COUNT|RANGE", "Steps that are computed: 6, or 4-8. Default: as many as are best.", _OVER_STEPS
    ),
    runs: int = option(
        "COUNT",
        "Runs of the model that may be made to measure settings, after those that are observed; a setting takes one "
        "for each of the first four prompts. 0 for none: the setting that is foretold best. Default: 40.",
        _OVER_STEPS,
        40,
    ),
    keep: str = option(
        "WHERE",
        "device, fp8 (there, in 8 bits) or host (main memory): where what is carried is kept. Default: device.",
        _OVER_STEPS,
        "device",
    ),
    max_kept: float | None = option(
        "GIB",
        "The most that may be kept; where it is too little for outputs and how they change, outputs are reused as they "
        "are.",
        _OVER_STEPS,
    ),
    stretches: int = option("COUNT", "Parts of the run that choose by themselves. Default: 4.", _OBSERVATION, 4),
    rows: int = option("COUNT", "Queries drawn at each transformer call. Default: 64.", _OBSERVATION, 64),
    observations: Path | None = option(
        "FOLDER",
        "Where observations are kept: a run that was broken off goes on, and another target takes no new "
        "runs. Default: one named after model and size in the current folder.",
        _OBSERVATION,
    ),
    extent: Annotated[options.SizeOptions, only("res", "aspect", "seconds", "frames")],
    sampling: Annotated[options.SamplingOptions, only("steps", "guidance")],
    attention: Annotated[
        options.AttentionOptions,
        only(
            "group",
            "set_items",
            preset="A preset whose groups and sampling are kept. Default: that of --variant b.",
        ),
    ],
    model: Annotated[options.ModelOptions, only(*options.OF_WEIGHTS, "device", "dtype", model=options.EITHER_MODEL)],
    out: Path | None = option(
        "FILE.yaml",
        "The preset. Default: a file in the current folder, named after family and target.",
        options.OUTPUT,
    ),
    overwrite: bool = options.OVERWRITE,
    terminal: options.TerminalOptions,
) -> None:
    """Fit a preset to a model: the steps that are computed, and patterns by layer, head and step, for a density."""
    from grat_cli.errors import BadInput
    from grat_cli.fidelity.palette import palette
    from grat_cli.fidelity.prompts import built_in_prompts, chosen_prompts
    from grat_cli.files import outputs
    from grat_cli.files.places import renamed
    from grat_cli.files.prompts import MOST_OUTPUTS
    from grat_cli.generation.selection import require_choice
    from grat_cli.presets import LARGEST_COUNT, MOST_STEPS, preset_yaml
    from grat_cli.presets.over_steps import KEEPS

    output = terminal.output()

    # 1. What can be refused without looking at any model.
    if (target_density is None) == (target_recall is None):
        raise BadInput("give one target: --target-density 0.15 or --target-recall 0.8")
    for flag, value in (("--target-density", target_density), ("--target-recall", target_recall)):
        if value is not None and not 0 < value <= 1:
            raise BadInput(f"{flag} {value:g}: expected a share above 0 and up to 1")
    for flag, count, least, most in (
        ("--check", check, 0, MOST_OUTPUTS),
        ("--stretches", stretches, 1, MOST_STEPS),
        ("--rows", rows, 2, LARGEST_COUNT),
        ("--runs", runs, 0, LARGEST_COUNT),
    ):
        if not least <= count <= most:
            raise BadInput(f"{flag} {count}: expected {least} to {most:,}")
    require_choice("--keep", keep, KEEPS)
    if max_kept is not None and max_kept <= 0:
        raise BadInput(f"--max-kept {max_kept:g}: expected gibibytes above 0")
    counts = None if references is None else _counts(references)
    carries = target_density is not None and not no_over_steps
    given = {"--references": counts is not None, "--keep": keep != KEEPS[0], "--max-kept": max_kept is not None}
    if not carries and any(given.values()):
        flag = next(flag for flag, is_given in given.items() if is_given)
        why = "--no-over-steps" if no_over_steps else "--target-recall, which is of steps that are all computed"
        raise BadInput(f"{flag} has no meaning with {why}: leave one of them out")
    model.check()

    # 2. Model, size and patterns.
    choice = model.choice_for(attention.preset, extent)
    # Only groups and sampling are kept of it; a far field of its own might not fit other groups.
    chosen = replace(attention, variant=None if attention.preset else "b").preset_for(choice, sampling)
    size = extent.size_for(choice)
    target = f"d{target_density:g}" if target_density is not None else f"r{target_recall:g}"
    file = out or Path(f"{choice.presets}-tuned-{target}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise BadInput(f"--out {file}: presets are YAML files: use {renamed(file, '.yaml')}")
    outputs.refuse_unwritable([file], overwrite=overwrite)

    # 3. Observe, choose, check.
    from grat_cli.fidelity.tuning import StepSearch, TuneRequest, tune
    from grat_cli.generation.request import request_for

    built_in = built_in_prompts(choice.medium)
    observed = chosen_prompts(prompts, built_in, "prompts")
    fresh = [prompt for prompt in built_in if prompt not in observed] if prompts.isdigit() else []
    frames_asked = getattr(size, "frames", None)
    typed = f"{size.width}x{size.height}" + (f"x{frames_asked}" if frames_asked else "")
    asked = request_for(
        choice,
        chosen,
        observed[0],
        width=size.width,
        height=size.height,
        frames=frames_asked,
        device=model.device,
        dtype=model.dtype,
        weights=model.weights,
    )
    request = TuneRequest(
        request=asked,
        prompts=observed,
        candidates=palette(chosen.attention.group, asked.grid.shape),
        density=target_density,
        recall=target_recall,
        over_steps=StepSearch(counts, runs, keep, max_kept) if carries else None,
        checked=tuple((fresh + list(observed) * check)[:check]),
        stretches=stretches,
        rows=rows,
        folder=observations or Path(f"grat-tune-{choice.name.replace('/', '-')}-{typed}"),
        name=file.stem,
    )
    output.hint(f"{choice.name} ({choice.reason}), {size}, {chosen.sampling.steps} steps")
    output.hint(*getattr(size, "notes", ()))
    output.hint(f"{len(request.candidates)} patterns of groups of {'x'.join(map(str, chosen.attention.group))}")
    with output.progress() as progress:
        fitted = tune(request, progress)

    # 4. Write and show.
    outputs.write_text(preset_yaml(fitted), file, overwrite=overwrite)
    evidence = fitted.evidence
    assert evidence is not None, "a tuned preset has its evidence"
    output.data({"preset": str(file), "observations": str(request.folder), **evidence.model_dump(mode="json")})
    shown = [_patterns(evidence), "", *([] if evidence.over_steps is None else [_over_steps(evidence)])]
    output.show(*shown, _sentence(evidence))
    output.hint(f"{request.folder} keeps what was observed: another target takes no new runs; remove it when done")
    output.file(file)


def _counts(typed: str) -> tuple[int, int]:
    """Fewest and most steps.

    Raises:
        BadInput: if it is no count, and no range of counts.
    """
    from grat_cli.errors import BadInput
    from grat_cli.presets import MOST_STEPS

    fewest, dash, most = typed.partition("-")
    counts = [int(text) for text in (fewest, most if dash else fewest) if text.isascii() and text.isdigit()]
    if len(counts) != 2 or not 1 <= counts[0] <= counts[1] <= MOST_STEPS:
        raise BadInput(f"--references {typed}: expected a count of steps such as 6, or a range such as 4-8")
    return counts[0], counts[1]


def _patterns(evidence: Evidence) -> RenderableType:
    """The patterns in use."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("pattern", overflow="fold")
    for name in ("used", "density", "recall", "output error"):
        table.add_column(name, justify="right", no_wrap=True)
    for pattern in evidence.patterns:
        figures = (f"{pattern.density:.3f}", f"{pattern.recall:.3f}", f"{pattern.output_error:.3f}")
        table.add_row(pattern.attention, f"{pattern.share:.0%}", *figures)
    whole = (f"{evidence.density:.3f}", f"{evidence.recall:.3f}", f"{evidence.output_error:.3f}")
    table.add_row("all of them, as chosen", "", *whole, style="bold")
    return table


def _over_steps(evidence: Evidence) -> str:
    """Which steps are computed, and how that was found."""
    from grat_cli.console.run_tables import work_text

    found = evidence.over_steps
    assert found is not None, "steps were searched"
    steps = ", ".join(map(str, found.references))
    slopes = ", ".join(f"{slope:g}" for slope in found.slopes)
    between = f"extrapolated between with slopes {slopes}" if any(found.slopes) else "reused between"
    carried = f"; {between}, {found.kept_bytes / (1 << 30):.3g} GiB kept" if found.kept_bytes else ""
    measured = "" if found.error is None else f" The best by {found.runs} runs: latents are off by {found.error:.2%}."
    work = work_text(found.model_dump(include={"pairs", "text", "selection", "forming"}))
    return f"Computed: {len(found.references)} of {evidence.steps} steps, {steps}{carried}. Work: {work}.{measured}"


def _sentence(evidence: Evidence) -> str:
    words = f"Foretold: density {evidence.density:.3f}, recall {evidence.recall:.3f}."
    check = evidence.check
    if check is None:
        return words
    interval = "" if check.ssim_interval is None else f" ± {check.ssim_interval:.3f}"
    return (
        f"{words} Measured over {len(check.prompts)} outputs: density {check.density:.3f}, "
        f"SSIM to full attention {check.ssim:.3f}{interval}, PSNR {check.psnr_db:.1f} dB."
    )
