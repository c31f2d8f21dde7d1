"""`install`: GRAT attention inside a diffusers pipeline, for as long as a `with` block lasts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from grat_cli.attention.clock import PipelineClock, same
from grat_cli.attention.guidance_split import GuidanceSplit
from grat_cli.attention.ranks import ALONE, Ranks
from grat_cli.errors import BadInput, NumericalFailure, choices
from grat_cli.families import FAMILIES, family_of_transformer
from grat_cli.families.time_shift import extrapolation as extrapolated_shift
from grat_cli.presets import Cache, Preset, cache_from_text, load_preset
from grat_cli.presets.problems import problem_of
from grat_cli.presets.schema import BACKENDS, SMALLEST_CHUNK, Memory

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from grat_cli.attention.adapter import Adapter
    from grat_cli.attention.any_transformer import AnyTransformer
    from grat_cli.attention.caching import StepCaches
    from grat_cli.attention.carrying import Carrying
    from grat_cli.attention.extrapolation import Extrapolation
    from grat_cli.attention.guard import RecallGuard
    from grat_cli.attention.layer import CallObserver
    from grat_cli.attention.schedule import AttentionSchedule
    from grat_cli.attention.work import Work
    from grat_cli.families.base import Family
    from grat_kernels import Backend, Grid
    from grat_kernels.trials import Form


_LARGEST = 10**9  # of any number of pixels, frames, tokens or steps


class Installation:
    """What is installed; an `attention.adapter.Run`.

    Attributes:
        grid: image tokens of the calls to come.
        backend: how span attention is computed, never `AUTO`.
        backend_reason: why this backend.
        guard: what widens layers while a run goes on, None without one.
        caches: of the transformers, the preset's or those that the caller enabled; None where the transformer is not
            known.
        work: what of the attention was computed in each step; None where nothing takes its place.
        carrying: what of it is carried over steps, and the bytes that this keeps: `kept_bytes` now, `most_kept_bytes`
            at most in the latest run. None where the preset has no `over_steps`.
    """

    caches: StepCaches | None = None
    work: Work | None = None
    carrying: Carrying | None = None

    def __init__(
        self,
        pipe: Any,
        preset: Preset,
        grid: Grid,
        first_step: int,
        steps: int | None,
        adapters: Sequence[Adapter | AnyTransformer],
        ranks: Ranks = ALONE,
    ) -> None:
        self._pipe, self._preset, self._adapters = pipe, preset, adapters
        self.clock = PipelineClock(pipe, first_step, steps)
        self._first_step = first_step
        self._schedules: dict[tuple[int, int, int, tuple[float, ...] | None], AttentionSchedule] = {}
        self._last_schedule: AttentionSchedule | None = None
        self._laid_out: torch.Tensor | None = None
        self.grid = grid
        transformer, layers = adapters[0].model, adapters[0].layers
        self.guard = _guard(preset, layers, ranks)
        device = pipe._execution_device  # public `device` is where weights rest; with offload they run elsewhere
        self._head_dim, self._chooses = _head_dim(transformer), preset.chooses
        self.backend, self.backend_reason = _tried_backend(preset, device, transformer.dtype, self._head_dim, grid)

    def require_able(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises BadInput unless the backend can run where, and in what, a call is: a pipeline may have been moved."""
        from grat_kernels import can_run

        ability = can_run(self.backend, device, dtype, self._head_dim, self.grid.tokens, choosing=self._chooses)
        if not ability:
            raise BadInput(
                f"the {self.backend.value} backend, which GRAT was installed with, cannot run this call: "
                f"{ability.reason}; move the pipeline before `with grat_cli.install(...)`"
            )

    def current_step(self) -> int:
        """The step of the call under way, counted from 0 over the whole run."""
        return self.clock.current_step()

    def schedule(self, text_len: int, references: int = 0) -> AttentionSchedule:
        """The schedule for as many steps as the whole run has, as the guard has widened it.

        Args:
            text_len: text tokens of the joint sequence.
            references: tokens of pictures to refer to.
        """
        to_run, steps = self.clock.steps_to_run(), self.clock.total_steps()
        if self._first_step + to_run > steps:
            begun = f" from step {self._first_step} on" if self._first_step else ""
            raise BadInput(f"GRAT was installed for {steps} steps, the call runs {to_run}{begun}: leave steps out")
        by_sigmas = any(section.is_spaced for section in self._preset.schedule.over_steps)
        sigmas = self.clock.sigmas() if by_sigmas else None
        if (asked := (text_len, references, steps, sigmas)) not in self._schedules:
            from grat_cli.attention.schedule import AttentionSchedule

            adapter = self._adapters[0]
            self._schedules[asked] = AttentionSchedule(
                self._preset,
                self.grid,
                text_len,
                adapter.text_first,
                steps,
                adapter.layers,
                adapter.heads,
                references,
                sigmas,
            )
        schedule = self._schedules[asked]
        self._last_schedule = self._guarded(schedule, self.guard) if self.guard else schedule
        return self._last_schedule

    def _guarded(self, schedule: AttentionSchedule, guard: RecallGuard) -> AttentionSchedule:
        """The schedule as the guard has widened it, in the run under way."""
        laid_out = self.clock.laid_out()
        # A run that was broken off in its first step is at no later one than the next.
        if self._laid_out is not None and not same(laid_out, self._laid_out):
            guard.start_anew()
        self._laid_out = laid_out
        return guard.applied(schedule, self.current_step())

    @property
    def preparation(self) -> str | None:
        """What normalised, rotated and joined queries and keys in the latest call, and why."""
        return self._latest.preparation

    @property
    def references(self) -> int:
        """Tokens of pictures to refer to, in the latest call."""
        return self._latest.references

    @property
    def chunking(self) -> tuple[int | None, str]:
        """How many tokens at most run through feed-forward and modulation at once, None for all; and why."""
        return self._latest.chunking

    @property
    def _latest(self) -> Adapter | AnyTransformer:
        """The adapter of the transformer that was called last, of those that take turns."""
        return next((one for one in reversed(self._adapters) if one.preparation is not None), self._adapters[0])

    @property
    def last_schedule(self) -> AttentionSchedule:
        """The schedule of the latest transformer call.

        Raises:
            BadInput: if there was none yet.
        """
        if self._last_schedule is None:
            raise BadInput("the pipeline has not been called yet: call it inside `with grat_cli.install(...)`")
        return self._last_schedule


@contextmanager
def install(
    pipe: Any,
    preset: str | Preset = "flux-x",
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    tokens: Grid | None = None,
    text: Literal["first", "last"] | None = None,
    check: bool = True,
    steps: int | None = None,
    first_step: int = 0,
    backend: Backend | str | None = None,
    chunk_tokens: int | Literal["auto"] | None = "auto",
    observer: CallObserver | None = None,
    extrapolation: Extrapolation | None = None,
    guard: float | None = None,
    cache: str | Cache | None = None,
    parallel: DeviceMesh | None = None,
) -> Iterator[Installation]:
    """Runs a pipeline with GRAT attention: `with grat_cli.install(pipe, "flux-x", height=8192, width=8192): pipe(...)`.

    It changes this instance's transformer, and leaving restores it exactly, also after an exception. Sampling stays
    the caller's: the preset's steps, guidance and shift are not applied. Image positions are passed to Flux's
    transformer in fp32, where pipelines round them to its dtype: bf16 gives neighbours the same position beyond 4096
    pixels. The padding of HunyuanVideo's text is cut off; it changes no prediction. Tokens of pictures to refer to, as
    of a `FluxKontextPipeline`, attend everything, and everything attends them.

    A transformer of a family that GRAT does not know can be tried with `tokens`: its attention is put in group order
    layer by layer, which costs a pass over query, key, value and output in each.

    Args:
        pipe: a diffusers pipeline around a transformer that GRAT knows, such as a `FluxPipeline`, `FluxInpaintPipeline`
            or `HunyuanVideoPipeline`.
        preset: a preset, its name, or the path of its file.
        height: of the images or videos to come, in pixels; calls of another size are refused.
        width: likewise.
        num_frames: likewise, for pipelines of videos alone, which need it.
        tokens: image tokens of the calls to come, rows by columns or frames by rows by columns, in place of a size, for
            a transformer that GRAT does not know.
        text: where text stands in the attentions of such a transformer that run over text and image tokens together.
        check: whether the first call of such a transformer is compared with one of its own attention.
        steps: that the preset's fractions refer to; by default as many as each call runs, which is fewer than
            `num_inference_steps` for image-to-image. Steps are counted from the first one that is run.
        first_step: number of the first step that a call runs, where it goes on with a run that had been broken off:
            the preset's steps are those of the whole run.
        backend: overrides the preset's; one chosen by name never falls back.
        chunk_tokens: feed-forward and modulation run on at most so many tokens at once, None for all of them; `auto`
            leaves it to the preset. It changes no result on a CPU.
        observer: told of transformer calls and attentions, for example a `timing.StepRecorder`.
        extrapolation: how rotary positions and scores are fitted to pictures larger than Flux was trained at;
            None leaves them as they are. The preset's own `highres` section is not applied.
        guard: overrides the preset's: share of full attention that a layer has to keep, such as 0.9; those that keep
            less go wider while the run goes on, and where less would have been carried over steps, references come
            twice as often. 0 for none. `Installation.guard` tells what it did.
        cache: overrides the preset's: what steps take over from those before, such as `first-block` or
            `taylor:cache_interval=3`; `none` for nothing. A cache that the caller enables on the transformer himself,
            before or inside, works as well. `Installation.work` tells what was computed.
        parallel: ranks that make each output together, in a script that `torchrun` starts: all of them call the
            pipeline with the same arguments and the same noise, and all get the whole output. Those of the mesh's
            dimension `cp` share each call of the transformer: each has some of the image tokens, and in attention of
            the heads, whose number theirs must divide. With a dimension `cfg` of 2, one half of the ranks makes the
            first call of guidance and one the second.

    Raises:
        BadInput: if pipeline, preset, size or backend do not fit, here or at the pipeline call.
        NumericalFailure: if the backend's kernel computes wrong results on this machine.
    """
    whole = {"height": height, "width": width, "num_frames": num_frames, "steps": steps, "first_step": first_step}
    _require_numbers(**whole, chunk_tokens=None if chunk_tokens == "auto" else chunk_tokens)
    preset = load_preset(preset) if isinstance(preset, str) else preset
    if not isinstance(preset, Preset):
        raise BadInput(f"expected a preset, its name or the path of its file, not a {type(preset).__name__}")
    if backend is not None:
        preset = _with_backend(preset, backend)
    if chunk_tokens != "auto":
        preset = _with_chunks(preset, chunk_tokens)
    if guard is not None:
        preset = _with_guard(preset, guard)
    if cache is not None:
        preset = _with_cache(preset, cache_from_text(cache, "cache") if isinstance(cache, str) else cache)
    if first_step < 0 or (steps is not None and first_step >= steps):
        raise BadInput(f"first_step {first_step} is none of the run's steps, which are counted from 0")
    ranks = ALONE if parallel is None else Ranks.of(parallel)
    adapters: Sequence[Adapter | AnyTransformer]
    if tokens is None:
        adapters = _family_adapters(pipe, preset, height, width, num_frames, extrapolation, ranks)
    else:
        adapters = [_any_transformer(pipe, preset, tokens, text, check, extrapolation)]
    from grat_cli.attention.watch import CallWatch, counts_steps

    if not counts_steps(pipe.scheduler):
        raise BadInput(
            f"{type(pipe.scheduler).__name__} does not count its steps, which GRAT needs to know: "
            "use FlowMatchEulerDiscreteScheduler"
        )
    grid = adapters[0].grid
    if ranks is not ALONE:
        _refuse_with_ranks(tokens)
    installation = Installation(pipe, preset, grid, first_step, steps, adapters, ranks)
    family = family_of_transformer(getattr(pipe, "transformer", None))
    given = family.given_shift(pipe, grid.tokens, steps or 1) if family else None
    warning = extrapolated_shift(pipe.scheduler, grid.tokens, given)
    if warning:
        warnings.warn(warning, stacklevel=3)
    transformers = family.transformers(pipe) if family and tokens is None else ()
    over_steps = preset.schedule.over_steps
    if over_steps or preset.cache or any(getattr(one, "is_cache_enabled", False) for one in transformers):
        installation.work = _counter(adapters)
    observer = _observers(installation.guard, installation.work, observer)
    with ExitStack() as stack:
        stack.enter_context(CallWatch(pipe, adapters, installation.require_able).watching())
        if over_steps:
            installation.carrying = stack.enter_context(_carrying(installation))
        split = None if ranks.cfg is None else GuidanceSplit(ranks.cfg, installation.clock)
        for adapter in adapters:
            stack.enter_context(
                adapter.attached(installation, installation.backend, observer, installation.carrying, split)
            )
        if family and tokens is None:
            installation.caches = stack.enter_context(
                _cached(transformers, adapters, installation, preset.cache, family, ranks)
            )
        yield installation


def _refuse_with_ranks(tokens: Grid | None) -> None:
    """Raises BadInput where ranks cannot share calls."""
    if tokens is not None:
        raise BadInput(
            "several ranks do not share the calls of a transformer that GRAT does not know: leave out parallel"
        )


def _counter(adapters: Sequence[Adapter | AnyTransformer]) -> Work:
    """What counts the attentions that are computed."""
    from grat_cli.attention.work import Work

    return Work(adapters[0].layers)


def _carrying(installation: Installation) -> AbstractContextManager[Carrying]:
    """What carries attention over steps."""
    from grat_cli.attention.carrying import Carrying

    guard = installation.guard
    return Carrying(installation.clock, _begun(installation), guard and guard.compared).served()


def _begun(installation: Installation) -> Callable[[], None]:
    """What is to be done when a run begins."""
    return (lambda: None) if installation.work is None else installation.work.clear


def _cached(
    transformers: Sequence[Any],
    adapters: Sequence[Any],
    installation: Installation,
    cache: Cache | None,
    family: Family,
    ranks: Ranks,
) -> AbstractContextManager[StepCaches]:
    """The transformers' caches, ours or the caller's."""
    from grat_cli.attention import caching

    ratios = family.mag_ratios(adapters[0].model.config)
    return caching.attached(
        transformers,
        adapters,
        cache,
        installation.clock,
        ratios,
        _begun(installation),
        over_steps=installation.carrying is not None,
        ranks=ranks,
    )


def _family_adapters(
    pipe: Any,
    preset: Preset,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    extrapolation: Extrapolation | None,
    ranks: Ranks,
) -> list[Adapter]:
    """What runs the transformers of a known family."""
    family = _family(pipe)
    if len(preset.attention.group) != family.axes:
        raise BadInput(
            f"preset {preset.name} is for {preset.model} models, the pipeline is a {type(pipe).__name__}: "
            f"use one of grat presets {family.name}"
        )
    if not height or not width or min(height, width) < 1:
        raise BadInput(f"give height and width of the call in pixels, not {height} and {width}")
    grid = family.grid(pipe, height, width, num_frames)
    chunk_tokens = preset.memory.chunk_tokens
    return [
        family.adapter(transformer, grid, extrapolation=extrapolation, chunk_tokens=chunk_tokens, ranks=ranks.cp)
        for transformer in family.transformers(pipe)
    ]


def _any_transformer(
    pipe: Any,
    preset: Preset,
    tokens: Grid,
    text: Literal["first", "last"] | None,
    check: bool,
    extrapolation: Extrapolation | None,
) -> AnyTransformer:
    """What runs a transformer of no known family."""
    from grat_cli.attention.any_transformer import AnyTransformer
    from grat_kernels import Grid

    transformer = getattr(pipe, "transformer", None)
    if (family := family_of_transformer(transformer)) is not None:
        raise BadInput(f"GRAT knows {family.title}: give height and width in place of tokens")
    if transformer is None:
        raise BadInput(f"a {type(pipe).__name__} has no transformer: GRAT cannot be tried on it")
    if text not in (None, "first", "last"):
        raise BadInput(f"text {text!r}: expected 'first', 'last' or None")
    if not isinstance(tokens, Grid):
        raise BadInput(f"tokens: expected Grid((rows, columns)) or Grid((frames, rows, columns)), not {tokens!r}")
    if len(preset.attention.group) != tokens.axes:
        raise BadInput(
            f"preset {preset.name} is for tokens on {len(preset.attention.group)} axes, not on {tokens.axes}: "
            f"use another, such as {'flux-far' if tokens.axes == 2 else 'hunyuan-far'}"
        )
    for name, given in (
        ("a guard", preset.guard),
        ("a cache", preset.cache),
        ("extrapolation", extrapolation),
        ("schedule.over_steps", preset.schedule.over_steps),
    ):
        if given:
            raise BadInput(f"{name} needs a transformer that GRAT knows: leave it out")
    if check and getattr(transformer, "is_cache_enabled", False):
        raise BadInput("a cache is enabled on the transformer, which its check would disturb: install with check=False")
    return AnyTransformer(transformer, tokens, text, check=check)


def _require_numbers(**given: Any) -> None:
    """Raises BadInput unless arguments by these names are whole numbers that can be, or None."""
    for name, number in given.items():
        if number is not None and not (isinstance(number, Integral) and type(number) is not bool):
            raise BadInput(f"{name}: expected a whole number, not {number!r}")
        if number is not None and abs(int(number)) > _LARGEST:
            raise BadInput(f"{name} is out of range: at most {_LARGEST:,}")


def _with_backend(preset: Preset, backend: Backend | str) -> Preset:
    name = str(getattr(backend, "value", backend))
    if name not in BACKENDS:
        raise BadInput(f"unknown backend {name!r}: {choices(name, BACKENDS)}")
    return preset.model_copy(update={"kernel": preset.kernel.model_copy(update={"backend": name})})


def _with_chunks(preset: Preset, chunk_tokens: int | None) -> Preset:
    if chunk_tokens is not None and chunk_tokens < SMALLEST_CHUNK:
        raise BadInput(f"chunk_tokens {chunk_tokens}: expected {SMALLEST_CHUNK} or more, None or 'auto'")
    return preset.model_copy(update={"memory": Memory(chunk_tokens=chunk_tokens)})


def _with_guard(preset: Preset, guard: float) -> Preset:
    if type(guard) not in (int, float):
        raise BadInput(f"guard: expected a share from 0 to 1, such as 0.9, or 0 for none, not {guard!r}")
    if not 0 <= guard <= 1:
        raise BadInput(f"guard {guard:g}: expected a share from 0 to 1, such as 0.9, or 0 for none")
    return preset.model_copy(update={"guard": guard})


def _with_cache(preset: Preset, cache: Cache | None) -> Preset:
    try:
        return preset.model_copy(update={"cache": cache})
    except ValidationError as error:
        problem = problem_of(error.errors()[0])
        raise BadInput(f"{'.'.join(map(str, problem.path))}: {problem.message}") from error


def _guard(preset: Preset, layers: int, ranks: Ranks) -> RecallGuard | None:
    if not preset.guard:
        return None
    from grat_cli.attention.guard import RecallGuard

    return RecallGuard(preset.guard, layers, ranks=ranks)


def _observers(*observers: CallObserver | None) -> CallObserver | None:
    """All that there are, as one; the work of the first ones is outside of what the last one times as attention."""
    from grat_cli.attention.observers import Observers

    given = [observer for observer in observers if observer is not None]
    return Observers(*given) if len(given) > 1 else given[0] if given else None


def _family(pipe: Any) -> Family:
    """The family of a pipeline's transformer, whatever else the pipeline does.

    Raises:
        BadInput: if it is not supported, with the reason.
    """
    families = FAMILIES.values()
    refused = {name: reason for family in families for name, reason in family.refused.items()}
    reason = next((refused[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in refused), None)
    transformer = getattr(pipe, "transformer", None)
    family = family_of_transformer(transformer)
    if family is not None and reason is None:
        return family
    instead = f"use one of {', '.join(family.pipelines[0] for family in families)} of diffusers, or of their kin"
    if transformer is None and getattr(pipe, "transformer_2", None) is not None:
        raise BadInput(f"the {type(pipe).__name__} has the second of its transformers alone: give it both")
    if reason or transformer is None:
        because = f" ({reason})" if reason else ""
        raise BadInput(f"{type(pipe).__name__} is not supported{because}: {instead}")
    raise BadInput(
        f"the transformer is a {type(transformer).__name__}, which GRAT does not know: {instead}; "
        "or say where its tokens are, tokens=Grid((rows, columns))"
    )


_HEADS = "num_attention_heads", "n_heads"


def _head_dim(transformer: Any) -> int:
    """Channels per head.

    Raises:
        BadInput: if the configuration does not tell.
    """
    config = transformer.config
    if (found := config.get("attention_head_dim")) is not None:
        return int(found)
    width, heads = (config.get(one) or config.get(other) for one, other in (("hidden_size", "dim"), _HEADS))
    if not width or not heads:
        raise BadInput(f"the configuration of the {type(transformer).__name__} does not say how wide its heads are")
    return int(width) // int(heads)


def backend_for(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int, *, choosing: bool
) -> tuple[Backend, str]:
    """The backend of span attention that a name stands for, and why.

    Args:
        name: of the backend, or `auto`.
        device: where tensors will be.
        dtype: of query, key and value.
        head_dim: channels per head.
        tokens: length of the joint sequence.
        choosing: whether groups choose by content what they attend.

    Raises:
        BadInput: if one chosen by name cannot run there.
    """
    from grat_kernels import Backend, can_run
    from grat_kernels.backends import tried_backend
    from grat_kernels.trials import Form

    if Backend(name) is Backend.AUTO:
        return tried_backend([Form(_numbered(device), dtype, head_dim, far=choosing, choosing=choosing)])
    ability = can_run(name, device, dtype, head_dim, tokens, choosing=choosing)
    if not ability:
        raise BadInput(
            f"the {name} backend cannot run here: {ability.reason}\nUse --backend auto; grat env lists what runs."
        )
    return Backend(name), f"chosen by name; {ability.reason}"


def _tried_backend(
    preset: Preset, device: torch.device, dtype: torch.dtype, head_dim: int, grid: Grid
) -> tuple[Backend, str]:
    """The backend of a preset, whose kernel was tried in all that the preset needs, and why this one.

    Raises:
        BadInput: if one chosen by name cannot run.
        NumericalFailure: if its kernel fails on this machine.
    """
    from grat_kernels.backends import KernelFailure, check_kernel, tried_backend

    name, forms = preset.kernel.backend, _forms(_numbered(device), dtype, head_dim, preset)
    if name == "auto":
        return tried_backend(forms)
    backend, reason = backend_for(name, device, dtype, head_dim, grid.tokens, choosing=preset.chooses)
    try:
        check_kernel(backend, forms)
    except KernelFailure as error:
        raise NumericalFailure(str(error)) from error
    return backend, reason


def _numbered(device: torch.device) -> torch.device:
    """A device as tensors on it call it."""
    import torch

    return torch.empty(0, device=device).device


def _forms(device: torch.device, dtype: torch.dtype, head_dim: int, preset: Preset) -> list[Form]:
    """What kernels are compiled for by a preset, so that no denoising step waits until they are tried."""
    from grat_kernels.trials import Form

    fields = [attention.far for attention in preset.attentions]
    kinds = {(bool(far), bool(far and far.choose)) for far in fields}
    if preset.schedule.dense_steps or preset.guard:
        kinds.add((False, False))
    by_head = (False, True) if preset.schedule.tells_heads_apart else (False,)
    return [
        Form(device, dtype, head_dim, far=far, choosing=choosing, by_head=apart)
        for far, choosing in sorted(kinds)
        for apart in by_head
    ]
