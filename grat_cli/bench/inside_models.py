"""Attention of a whole run inside a transformer, timed: stock, by one plan, by a preset's schedule of plans, or by a
window around each token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from grat_cli.attention.schedule import AttentionSchedule
from grat_cli.bench.baselines import Baseline, Window, baseline_for
from grat_cli.bench.dense import Attention, DenseKernel
from grat_cli.bench.measure import CannotRun
from grat_cli.errors import BadInput
from grat_cli.fidelity.variants import Variant
from grat_cli.installation import backend_for
from grat_cli.presets import Preset
from grat_kernels import Backend, Full, Grid, Grouping, Plan, build_plan
from grat_kernels.plan import Parts

if TYPE_CHECKING:
    from grat_cli.attention.adapter import Adapter
    from grat_cli.attention.carrying import Carrying
    from grat_cli.attention.layer import Attend, AttentionInputs, CallObserver
    from grat_cli.families.base import Family


class Attach(Protocol):
    """Attaches a variant while a `with` block lasts."""

    def __call__(
        self, observer: CallObserver, step: Callable[[], int], carrying: Carrying | None = None, /
    ) -> AbstractContextManager[None]:
        """While inside, attention is that of the variant.

        Args:
            observer: told of calls and attentions.
            step: gives the denoising step of the call under way.
            carrying: carries attention over steps, where a preset says so; else None.
        """
        ...


def backend_of(
    variant: Variant, name: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int
) -> Backend:
    """The backend that computes the attention of a variant: that of its preset, unless one was chosen for all.

    Raises:
        BadInput: if one chosen by name cannot run here, or not what the variant chooses by content.
    """
    wanted = variant.preset.kernel.backend if variant.preset is not None and name == Backend.AUTO.value else name
    return backend_for(wanted, device, dtype, head_dim, tokens, choosing=variant.chooses)[0]


@dataclass(frozen=True)
class Inside:
    """A variant inside a transformer.

    Attributes:
        kernel: what computes its attention.
        attach: attaches it.
        pairs: query-key pairs of one attention call and head; mean over a run where they differ.
        density: `pairs` over all pairs of the joint sequence.
        trial_steps: steps of a run in which every plan of it is used once, and all is kept that is carried over steps:
            enough to warm up.
        work: `pairs` by part; None where they are not those of plans.
    """

    kernel: str
    attach: Attach
    pairs: float
    density: float
    trial_steps: tuple[int, ...] = (0,)
    work: Parts | None = None


@dataclass(frozen=True)
class Host:
    """A transformer that variants go inside.

    Attributes:
        transformer: of diffusers, with stock attention processors.
        family: that it belongs to.
        text_len: text tokens of the calls that density is told of; others may have fewer or more.
        backend: of span attention, never `AUTO`.
        device: where it computes.
        dtype: of its activations.
        steps: denoising steps of a run, which a preset's schedule is laid out over.
        others: transformers that take turns with it.
    """

    transformer: Any
    family: Family
    text_len: int
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    steps: int = 1
    others: tuple[Any, ...] = ()

    def adapter(self, grid: Grid, attend: Attend | None = None) -> Adapter:
        """The adapter of the family, for a grid of image tokens; with another attention than over spans in it."""
        return self.family.adapter(self.transformer, grid, attend=attend)

    def adapters(self, grid: Grid) -> tuple[Adapter, ...]:
        """The adapters of all transformers that take turns, for a grid of image tokens."""
        return tuple(self.family.adapter(one, grid) for one in (self.transformer, *self.others))

    @contextmanager
    def _attached(
        self,
        grid: Grid,
        run: Steps,
        observer: CallObserver,
        attend: Attend | None = None,
        carrying: Carrying | None = None,
    ) -> Iterator[None]:
        """While inside, all transformers run on tokens in group order."""
        with ExitStack() as stack:
            for transformer in (self.transformer, *self.others):
                adapter = self.family.adapter(transformer, grid, attend=attend)
                stack.enter_context(adapter.attached(run, self.backend, observer, carrying))
            yield

    def inside(self, variant: Variant, dense: DenseKernel | None = None) -> Inside:
        """What a variant is inside this transformer.

        Args:
            variant: on the grid of the calls to come.
            dense: computes full attention; None leaves the choice to diffusers.

        Raises:
            BadInput: if a preset does not fit the run.
            CannotRun: if it cannot be had, with the reason.
        """
        if variant.obstacle:
            raise CannotRun(variant.obstacle)
        adapter = self.adapter(variant.grid)
        if variant.preset is not None:
            return self._scheduled(variant.preset, variant.grid, adapter)
        pairs = variant.attended_pairs(self.text_len, adapter.text_first)
        density = pairs / (variant.grid.tokens + self.text_len) ** 2
        if variant.kind == "full":
            kernel, attend = (f"diffusers, {dense.name}", dense.attention) if dense else ("diffusers", None)
            return Inside(
                kernel,
                lambda observer, step, carrying=None: stock_attention(
                    self.transformer, observer, step, density, attend, self.others
                ),
                pairs,
                density,
            )
        if variant.grouping is not None and variant.pattern is not None:
            grouping, pattern = variant.grouping, variant.pattern

            def plan_of(text_len: int) -> Plan:
                return build_plan(grouping, pattern, text_len, adapter.text_first)

            plan = plan_of(self.text_len)  # now rather than in the first call
            return Inside(
                self.backend.value,
                lambda observer, step, carrying=None: self._attached(variant.grid, fixed_run(plan_of, step), observer),
                pairs,
                density,
                work=plan.parts.over(plan.tokens**2),
            )
        windows = _Windows(self, variant, adapter.text_first)
        return Inside(
            windows.of(self.text_len).kernel,
            lambda observer, step, carrying=None: self._window(windows, density, observer, step),
            pairs,
            density,
        )

    def schedule(
        self, preset: Preset, grid: Grid, text_len: int | None = None, sigmas: Sequence[float] | None = None
    ) -> AttentionSchedule:
        """A preset laid out over a run of this transformer.

        Args:
            preset: attention and schedule.
            grid: image tokens.
            text_len: text tokens of a call; None for `self.text_len`.
            sigmas: of the run's steps, by which references may be spaced; None for even ones.

        Raises:
            BadInput: if it does not fit.
        """
        adapter = self.adapter(grid)
        text_len = self.text_len if text_len is None else text_len
        return AttentionSchedule(
            preset,
            grid,
            text_len,
            adapter.text_first,
            self.steps,
            adapter.layers,
            adapter.heads,
            sigmas=sigmas,
        )

    def _scheduled(self, preset: Preset, grid: Grid, adapter: Adapter) -> Inside:
        schedule_of = cache(lambda text_len, sigmas: self.schedule(preset, grid, text_len, sigmas))
        own = schedule_of(self.text_len, None)  # now rather than in the first call
        is_spaced = any(section.is_spaced for section in preset.schedule.over_steps)

        def run_of(step: Callable[[], int], carrying: Carrying | None) -> Steps:
            def in_call(text_len: int) -> AttentionSchedule:
                sigmas = carrying.clock.sigmas() if carrying and is_spaced else None
                # A trial has fewer steps.
                return schedule_of(text_len, sigmas if sigmas and len(sigmas) == self.steps + 1 else None)

            return Steps(in_call, step)

        seen: set[tuple[int, bool, int]] = set()
        references = [0] * adapter.layers
        trial_steps = []
        for step in range(self.steps):
            used = set()
            for layer in range(adapter.layers):
                rule = own.carried(step, layer)
                is_carried = rule is not None and not rule.is_reference
                # With the second reference a slope is kept, which the steps after it are carried by.
                used.add((own.plan(step, layer).key, is_carried, min(2, references[layer])))
                references[layer] += rule is not None and rule.is_reference
            if used - seen:
                trial_steps.append(step)
                seen |= used
        return Inside(
            self.backend.value,
            lambda observer, step, carrying=None: self._attached(
                grid, run_of(step, carrying), observer, carrying=carrying
            ),
            own.density * (grid.tokens + self.text_len) ** 2,
            own.density,
            tuple(trial_steps),
            own.parts,
        )

    def _window(
        self, windows: _Windows, density: float, observer: CallObserver, step: Callable[[], int]
    ) -> AbstractContextManager[None]:
        grouping = windows.of(self.text_len).grouping
        # Stock attention would hand padding to a kernel that takes no mask; the adapter cuts the padding off.
        if grouping is None and not self.family.masks_text:
            return stock_attention(self.transformer, observer, step, density, windows.attention, self.others)
        grouping = grouping or Grouping(windows.grid, windows.grid.shape)  # one group is raster order

        def plan_of(text_len: int) -> Plan:
            return build_plan(grouping, Full(), text_len, self.family.text_first)

        def attend(inputs: AttentionInputs) -> torch.Tensor:
            return windows.attention(inputs.query, inputs.key, inputs.value)

        # The adapter takes no more from these plans than the order of tokens.
        return self._attached(windows.grid, fixed_run(plan_of, step, density), observer, attend)


class _Windows:
    """A window around each token, in calls of any length of text."""

    def __init__(self, host: Host, variant: Variant, text_first: bool) -> None:
        self._host, self._variant, self._text_first = host, variant, text_first
        self._baselines: dict[int, Baseline] = {}
        self.grid = variant.grid

    def of(self, text_len: int) -> Baseline:
        """The window for calls with so many text tokens; its token order is the same for all."""
        if text_len not in self._baselines:
            window = Window.of(self._variant, text_len, self._text_first)
            head_dim = self._host.transformer.config.attention_head_dim
            self._baselines[text_len] = baseline_for(window, self._host.device, self._host.dtype, head_dim)
        return self._baselines[text_len]

    def attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of the joint sequence `[B, N, H, D]`, all text valid."""
        return self.of(query.shape[1] - self.grid.tokens).attention(query, key, value)


class Steps:
    """A run whose steps somebody else counts; an `attention.adapter.Run`."""

    def __init__(self, schedule_of: Callable[[int], Any], step: Callable[[], int]) -> None:
        """Tells what the adapter will ask for.

        Args:
            schedule_of: gives the schedule for a number of text tokens.
            step: gives the denoising step of the call under way.
        """
        self._schedule_of, self._step = schedule_of, step

    def current_step(self) -> int:
        """See `attention.adapter.Run`."""
        return self._step()

    def schedule(self, text_len: int, references: int = 0) -> Any:
        """See `attention.adapter.Run`."""
        if references:
            raise BadInput("calls with pictures to refer to are not compared: leave them out")
        return self._schedule_of(text_len)


def fixed_run(plan_of: Callable[[int], Plan], step: Callable[[], int], density: float | None = None) -> Steps:
    """A run with the same attention in every step and layer.

    Args:
        plan_of: gives the plan for a number of text tokens.
        step: gives the denoising step of the call under way.
        density: what the observer is told; None for that of the plan.
    """

    def schedule_of(text_len: int) -> FixedSchedule:
        plan = plan_of(text_len)
        return FixedSchedule(plan, plan.density if density is None else density)

    return Steps(schedule_of, step)


class FixedSchedule:
    """As much of an `AttentionSchedule` as an adapter asks for: one plan."""

    def __init__(self, plan: Plan, density: float) -> None:
        """Both are those of every step and layer."""
        self._plan, self._density = plan, density

    def plan(self, step: int, layer: int) -> Plan:
        """The plan."""
        return self._plan

    def density_of_step(self, step: int) -> float:
        """The density."""
        return self._density


@contextmanager
def stock_attention(
    transformer: torch.nn.Module,
    observer: CallObserver,
    step: Callable[[], int] = lambda: 0,
    density: float = 1.0,
    attend: Attention | None = None,
    others: Sequence[torch.nn.Module] = (),
) -> Iterator[None]:
    """While inside, an observer is told of the transformer's calls and attentions, which stay stock diffusers.

    Timed are the calls of `dispatch_attention_fn`, as an adapter times those of `span_attention`.

    Args:
        transformer: of diffusers, with stock attention processors.
        observer: told of calls and attentions.
        step: gives the denoising step of the call under way.
        density: what the observer is told.
        attend: computes attention of query, key and value `[B, N, H, D]`, text and image in the order of the model,
            in place of the kernel that diffusers would pick, and without its mask: all text must be valid.
        others: transformers of the same class that take turns with it.
    """
    module: Any = sys.modules[type(transformer).__module__]
    stock = module.dispatch_attention_fn

    def timed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **others: Any) -> torch.Tensor:
        if key.shape[1] != query.shape[1]:  # attention to text alone
            return stock(query, key, value, **others)
        with observer.attention():
            return attend(query, key, value) if attend else stock(query, key, value, **others)

    def begin(*_: Any) -> None:
        observer.begin_call(step(), density)

    def end(*_: Any) -> None:
        observer.end_call()

    handles = []
    for one in (transformer, *others):
        handles += [one.register_forward_pre_hook(begin), one.register_forward_hook(end)]
    module.dispatch_attention_fn = timed
    try:
        yield
    finally:
        module.dispatch_attention_fn = stock
        for handle in handles:
            handle.remove()
