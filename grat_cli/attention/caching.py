"""Step caches of diffusers around a transformer that GRAT is installed in: on, served while it runs, and off again.

A cache's hooks stand around blocks or attentions, GRAT's processors and plans inside them, so each skips the other as a
whole. What they keep is in group order, which is one for a whole run. What is done here is what diffusers leaves to its
callers: a context for each call of a step where a pipeline sets none, states of their own for the two calls of true
guidance, the step and timestep of a call without waiting for the device, a state that begins anew with every run, also
after one that was broken off, and decisions that are the same on all ranks (`shared_caches`). Read against diffusers
0.42.1, `hooks/` and `models/cache_utils.py`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from grat_cli.attention import shared_caches
from grat_cli.attention.cache_states import Snapshot, copied, kept, moved, thawed
from grat_cli.attention.clock import CallCounter, same
from grat_cli.attention.ranks import ALONE, Ranks
from grat_cli.errors import BadInput
from grat_cli.presets.caches import KINDS, Broadcast, Cache, Faster, FirstBlock, Mag, Taylor

if TYPE_CHECKING:
    import torch

    from grat_cli.attention.adapter import Adapter
    from grat_cli.attention.clock import PipelineClock

MOST_KEPT_BYTES = 4 * 2**30
_CALLS = "cond", "uncond"  # as pipelines name them
_OF_BLOCKS = "FirstBlockCacheConfig", "MagCacheConfig"  # which take the place of whole blocks
_NEVER = math.inf  # a timestep that no range holds
_MOST_PARTS = 100_000
_LEAVE = "call disable_cache() on the transformer, or leave out parallel"
_FIRST_STEPS = 2  # that FasterCache has to have computed before it can forecast


class StepCaches:
    """The caches of one or several transformers that take turns.

    Attributes:
        settings: what was asked for; None where nothing was, and the caller may have enabled a cache himself.
    """

    def __init__(self, settings: Cache | None, watched: Sequence[_Watched], ranks: Ranks = ALONE) -> None:
        self.settings, self._watched, self._ranks = settings, watched, ranks

    @property
    def is_restored(self) -> bool:
        """Whether the step under way is the first with what was restored: whether that fits is seen in it."""
        return any(watched.is_restored for watched in self._watched)

    @property
    def ratios(self) -> tuple[float, ...]:
        """What a run with `calibrate` has measured, step by step."""
        found: dict[int, float] = {}
        for watched in self._watched:
            found |= watched.ratios
        return tuple(ratio for _, ratio in sorted(found.items()))

    def snapshot(self) -> Snapshot | None:
        """What the rest of the run depends on, between two steps; None if it is too much to be kept in a file, or if
        each of several ranks has a part of it: a run that is gone on with then begins with nothing kept.

        It holds on to tensors, which no cache changes in place, and copies none.
        """
        if self._ranks.are_several:
            return None
        if isinstance(self.settings, Mag) and self.settings.calibrate:
            return None
        snapshot = Snapshot(
            [(number, *state) for number, watched in enumerate(self._watched) for state in watched.states()]
        )
        return snapshot if snapshot.nbytes <= MOST_KEPT_BYTES else None

    def restore(self, kept: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> None:
        """Goes on, with the next call, where a run stood.

        Args:
            kept: of `Snapshot.data`.
            tensors: likewise.

        Raises:
            BadInput: if it is not whole.
        """
        try:
            if not 0 < len(kept) <= _MOST_PARTS:
                raise ValueError("there is nothing, or too much")
            for one in kept:
                place = int(one["holder"]), str(one["context"])
                values = {name: thawed(value, tensors) for name, value in one["values"].items()}
                self._watched[one["transformer"]].restore(place, values)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise BadInput("what the cache had kept is damaged, or of another version of grat") from error


@contextmanager
def attached(
    transformers: Sequence[Any],
    adapters: Sequence[Adapter],
    cache: Cache | None,
    clock: PipelineClock,
    ratios: Sequence[float] | None = None,
    begun: Callable[[], None] = lambda: None,
    *,
    over_steps: bool = False,
    ranks: Ranks = ALONE,
) -> Iterator[StepCaches]:
    """While inside, transformers run with a step cache, or with the one that the caller has enabled; leaving disables
    the former again exactly.

    Args:
        transformers: that are called, whatever `torch.compile` made of them.
        adapters: of each, attached.
        cache: None for none of ours.
        clock: of the run.
        ratios: of `Mag`, where they are known for the model.
        begun: called when a run begins anew.
        over_steps: whether attention is carried over steps besides.
        ranks: share the calls. Where a cache looks at tokens, they decide together.

    Raises:
        BadInput: if the cache cannot run in these transformers, with the reason.
    """
    runs = _Runs(begun)
    watched = [
        _Watched(called, adapter, cache, clock, runs, over_steps, ranks)
        for called, adapter in zip(transformers, adapters, strict=True)
    ]
    with ExitStack() as stack:
        for one in watched:
            if cache is not None:
                stack.enter_context(one.enabled(cache, ratios))
            stack.enter_context(one.served())
        yield StepCaches(cache, watched, ranks)


def refuse(model: Any, blocks: Sequence[Any], cache: Cache, ratios: Sequence[float] | None) -> None:
    """Raises BadInput, with the reason and what can be had instead, if a cache cannot run in a transformer.

    Args:
        model: the transformer.
        blocks: whose attention takes a plan.
        cache: which one.
        ratios: of `Mag`, where they are known for the model.
    """
    name = type(model).__name__
    if (reason := obstacle(model, blocks, cache)) is not None:
        others = [word for word, kind in KINDS.items() if obstacle(model, blocks, kind()) is None]
        instead = f"use {' or '.join(others)}" if others else "leave out the cache"
        raise BadInput(f"cache {cache.kind} cannot run in a {name}: {reason}; {instead}")
    if isinstance(cache, Mag) and not (cache.calibrate or cache.ratios or ratios):
        raise BadInput(
            f"cache mag does not know how a {name} like this one changes from step to step: run once with "
            "--cache mag:calibrate=true, and put the ratios of its report into a preset, "
            "cache: {kind: mag, ratios: [...]}"
        )


def obstacle(model: Any, blocks: Sequence[Any], cache: Cache) -> str | None:
    """Why a cache cannot run in a transformer, or None.

    Args:
        model: the transformer.
        blocks: whose attention takes a plan.
        cache: which one.
    """
    if not hasattr(model, "enable_cache"):
        return f"diffusers has no caches for a {type(model).__name__}"
    if isinstance(cache, FirstBlock | Mag):
        return _obstacle_of_blocks(model, cache)
    names = _attentions(model, blocks)
    if isinstance(cache, Taylor) and cache.use_lite_mode:
        return None if hasattr(model, "proj_out") else "its prediction has another name than diffusers looks for"
    from diffusers.hooks.faster_cache import _TRANSFORMER_BLOCK_IDENTIFIERS

    if not names:
        return "its attentions are of no class that diffusers caches"
    if isinstance(cache, Faster) and not any(re.search(one, names[0]) for one in _TRANSFORMER_BLOCK_IDENTIFIERS):
        return "its attentions have other names than diffusers looks for"
    return None


def _obstacle_of_blocks(model: Any, cache: FirstBlock | Mag) -> str | None:
    from diffusers.hooks._helpers import TransformerBlockRegistry

    blocks = _cached_blocks(model)
    if len(blocks) < 2:
        return "it takes two blocks or more"
    returned = []
    for kind in dict.fromkeys(map(type, blocks)):
        try:
            returned.append(TransformerBlockRegistry.get(kind).return_encoder_hidden_states_index is not None)
        except ValueError:
            return f"diffusers does not know what its {kind.__name__} takes and returns"
    if isinstance(cache, FirstBlock) and len(set(returned)) > 1:
        return "some of its blocks return text and image apart and some together, which diffusers does not tell apart"
    return None


def _cached_blocks(model: Any) -> list[Any]:
    """The blocks that diffusers' caches of blocks look for."""
    import torch
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS

    return [
        block
        for name, module in model.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(module, torch.nn.ModuleList)
        for block in module
    ]


def _attentions(model: Any, blocks: Sequence[Any]) -> list[str]:
    """Names of the attention modules in blocks."""
    from diffusers.hooks._common import _ATTENTION_CLASSES

    inside = {id(module) for block in blocks for module in block.modules() if isinstance(module, _ATTENTION_CLASSES)}
    return [name for name, module in model.named_modules() if id(module) in inside]


class _Runs:
    """The run under way, which transformers that take turns share."""

    def __init__(self, begun: Callable[[], None]) -> None:
        self._begun = begun
        self._timesteps: torch.Tensor | None = None

    def begin(self, timesteps: torch.Tensor) -> None:
        """A transformer is called for the first time in a run of these timesteps."""
        if self._timesteps is None or not same(timesteps, self._timesteps):
            self._timesteps = timesteps
            self._begun()


class _Watched:
    """One transformer and its cache.

    Attributes:
        ratios: measured by a cache that calibrates, by step.
        is_restored: whether the step under way is the first with what was restored.
    """

    def __init__(
        self,
        called: Any,
        adapter: Adapter,
        settings: Cache | None,
        clock: PipelineClock,
        runs: _Runs,
        over_steps: bool,
        ranks: Ranks,
    ) -> None:
        self._adapter, self._model, self._called, self._blocks = adapter, adapter.model, called, adapter.blocks
        self._settings, self._clock, self._runs = settings, clock, runs
        self._is_compiled, self._over_steps = adapter.is_compiled, over_steps
        self._shares_tokens, self._together = ranks.cp is not None, ExitStack()
        self.ratios: dict[int, float] = {}
        self._seen: Any = None
        self._hooks: list[tuple[Any, Any]] = []  # with their registries
        self._managers: list[Any] = []  # diffusers' own, with a state for each context
        self._holders: list[Any] = []  # hooks with a single state
        self._by_call: dict[str, list[Any]] = {}  # states of these by call, where they are ours to keep apart
        self._context: Any = None
        self._restored: dict[tuple[int, str], dict[str, Any]] = {}
        self.is_restored = False
        self._known: Any = None  # ratios, before they are fitted to a run
        self._run: torch.Tensor | None = None
        self._host_timesteps: list[float] = []
        self._counter = CallCounter(clock)
        self._step, self._call, self._since, self._name = -1, 0, 0, ""
        self._timestep = _NEVER

    @property
    def config(self) -> Any:
        """What the transformer's cache was enabled with, whoever did; None without one."""
        return getattr(self._model, "_cache_config", None)

    # ---- On and off

    @contextmanager
    def enabled(self, cache: Cache, ratios: Sequence[float] | None) -> Iterator[None]:
        """While inside, the cache is enabled; leaving leaves nothing of it.

        Raises:
            BadInput: if it cannot be.
        """
        name = type(self._model).__name__
        if self._is_compiled and not isinstance(cache, FirstBlock):
            raise BadInput(
                f"cache {cache.kind} inside a compiled transformer is not supported, its hooks differ from layer to "
                "layer: use first-block, or leave out one of the two"
            )
        if self.config is not None:
            raise BadInput(
                f"the {name} has a cache enabled already, {type(self.config).__name__}: call its disable_cache(), "
                "or leave out the cache here"
            )
        refuse(self._model, self._blocks, cache, ratios)
        before = {
            module: (vars(module).get("forward"), "_diffusers_hook" in vars(module)) for module in self._model.modules()
        }
        config, had_config = self._config(cache, ratios), "_cache_config" in vars(self._model)
        try:
            with _quiet():
                self._model.enable_cache(config)
            yield
        finally:
            if self.config is config:
                self._model.disable_cache()
            for module, (forward, had_registry) in before.items():
                _tidied(module, forward, had_registry)
            if not had_config and self.config is None:
                vars(self._model).pop("_cache_config", None)

    def _config(self, cache: Cache, ratios: Sequence[float] | None) -> Any:
        """The configuration of diffusers' own class."""
        import diffusers
        import torch

        hooks: Any = diffusers
        if isinstance(cache, FirstBlock):
            return hooks.FirstBlockCacheConfig(threshold=cache.threshold)
        if isinstance(cache, Mag):
            known = cache.ratios or ratios
            # Steps and ratios are set when a run begins.
            return hooks.MagCacheConfig(
                threshold=cache.threshold,
                max_skip_steps=cache.max_skip_steps,
                retention_ratio=cache.retention_ratio,
                mag_ratios=None if cache.calibrate else torch.tensor(known),
                calibrate=cache.calibrate,
                num_inference_steps=1 if cache.calibrate else len(known or ()),
            )
        if isinstance(cache, Taylor):
            name = cache.taylor_factors_dtype
            identifiers = [re.escape(found) for found in _attentions(self._model, self._blocks)]
            return hooks.TaylorSeerCacheConfig(
                cache_interval=cache.cache_interval,
                disable_cache_before_step=cache.disable_cache_before_step,
                disable_cache_after_step=cache.disable_cache_after_step,
                max_order=cache.max_order,
                taylor_factors_dtype=self._model.dtype if name == "auto" else getattr(torch, name),
                cache_identifiers=None if cache.use_lite_mode else identifiers,
                use_lite_mode=cache.use_lite_mode,
            )
        if isinstance(cache, Broadcast):
            return hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=cache.skip_range,
                spatial_attention_timestep_skip_range=cache.timesteps,
                cross_attention_block_skip_range=cache.cross_skip_range,
                cross_attention_timestep_skip_range=cache.timesteps,
                current_timestep_callback=lambda: self._timestep,
            )
        return hooks.FasterCacheConfig(
            spatial_attention_block_skip_range=cache.skip_range,
            # Diffusers leaves out both ends, and 0 is a timestep.
            spatial_attention_timestep_skip_range=(cache.timesteps[0] or -1, cache.timesteps[1]),
            attention_weight_callback=lambda module: cache.weight,
            is_guidance_distilled=True,
            current_timestep_callback=lambda: self._timestep,
        )

    # ---- While it runs

    @contextmanager
    def served(self) -> Iterator[None]:
        """While inside, whatever cache the transformer has is told of calls and runs. What it kept before, in another
        order of tokens, is gone, and so is afterwards what it keeps here."""
        import torch

        before, after = self._before, self._after
        if getattr(self._called, "_compiled_call_impl", None) is not None:
            before, after = torch.compiler.disable(before), torch.compiler.disable(after)
        handles = [self._called.register_forward_pre_hook(before), self._called.register_forward_hook(after)]
        try:
            self._reset()
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._together.close()
            self._reset()

    def _reset(self) -> None:
        if self.config is not None:
            self._model._reset_stateful_cache()

    def _before(self, module: Any, arguments: Any) -> None:
        """Ahead of a call."""
        if (config := self.config) is None:
            self._seen = None
            return
        # The caller may have enabled it anew with the same configuration.
        if config is not self._seen or not all(hook in registry.hooks.values() for registry, hook in self._hooks[:1]):
            if self._over_steps and type(config).__name__ not in _OF_BLOCKS:
                raise BadInput(
                    f"the cache that is enabled on the transformer, {type(config).__name__}, and schedule.over_steps "
                    "take the same place: leave out one of the two"
                )
            if self._shares_tokens and (reason := shared_caches.obstacle(config)) is not None:
                raise BadInput(f"{type(config).__name__} and ranks that share calls do not combine, {reason}: {_LEAVE}")
            self._seen = config
            self._find()
        timesteps, index = self._clock.timesteps()
        at = self._counter.count()
        if at.begins_run:
            self._run = timesteps
            self._begin()
        elif not at.call:
            self.is_restored = False
        if not at.call:
            self._since += 1
        self._step, self._call = at.step, at.call
        self._name = _CALLS[at.call] if at.call < len(_CALLS) else f"call {at.call}"
        self._enter_context()
        if self._settings is not None:
            self._serve(index)

    def _after(self, module: Any, arguments: Any, output: Any) -> None:
        """Behind it."""
        if self._seen is None:
            return
        if isinstance(self._settings, Mag) and self._settings.calibrate and not self._call:
            measured = self._managers[0].get_state().calibration_ratios
            if measured:  # by this rank, if it makes the call
                self.ratios[self._step] = measured[-1]
        for manager in self._managers:
            if manager._context is self._context:
                manager.set_context(None)

    def _find(self) -> None:
        """Looks for what the cache's hooks keep."""
        from diffusers.hooks.hooks import StateManager

        managers: dict[int, Any] = {}
        registries = [vars(module).get("_diffusers_hook") for module in self._model.modules()]
        found = [(registry, hook) for registry in registries if registry for hook in registry.hooks.values()]
        for _, hook in found:
            managers |= {id(value): value for value in vars(hook).values() if isinstance(value, StateManager)}
        self._holders = [hook for _, hook in found if hook._is_stateful and hasattr(hook, "state")]
        self._hooks = [(registry, hook) for registry, hook in found if hook._is_stateful]
        self._managers, self._by_call = list(managers.values()), {}
        self._together.close()
        if self._shares_tokens:
            self._together.enter_context(shared_caches.decided_together([hook for _, hook in found], self._adapter))
        self._counter, self._run = CallCounter(self._clock), None

    def _begin(self) -> None:
        """A run begins: from nothing, or from what was restored."""
        # A pipeline has set its context before the call, and to reset a state is to forget it.
        contexts = [(manager, manager._context) for manager in self._managers]
        self._model._reset_stateful_cache()
        for manager, context in contexts:
            manager.set_context(None if context is self._context else context)
        self._context, self._by_call = None, {}
        self._since = 0
        assert self._run is not None
        self._runs.begin(self._run)
        if self._settings is None:
            return
        if isinstance(self._settings, Broadcast | Faster):
            self._host_timesteps = self._run.tolist()  # waits, once for each run
        if isinstance(self._settings, Mag):
            self._lay_out(self._settings)
        self._load()

    def _lay_out(self, settings: Mag) -> None:
        """Fits the ratios to the run's steps, of which there may be fewer than in its schedule."""
        from diffusers.hooks.mag_cache import nearest_interp

        steps, length = self._clock.total_steps(), len(self._clock.laid_out())
        config = self._seen
        if settings.calibrate:
            config.num_inference_steps = steps + 1  # at the last one diffusers would print them, and forget
            return
        if self._known is None:
            self._known = config.mag_ratios
        config.num_inference_steps = steps
        config.mag_ratios = nearest_interp(self._known, max(length, steps))[-steps:]

    def _enter_context(self) -> None:
        """Says which call it is where the pipeline has not."""
        from diffusers.hooks.hooks import CacheContext

        stale, self._context = self._context, CacheContext(self._name)
        for manager in self._managers:
            if manager._context is None or manager._context is stale:
                manager.set_context(self._context)

    def _serve(self, index: int) -> None:
        """What our own caches are told besides."""
        if isinstance(self._settings, Mag):
            # Where transformers take turns, or a run goes on, calls of this one do not count the run's steps.
            for manager in self._managers:
                manager.get_state().step_index = self._step
        if not self._holders:
            return
        if self._name not in self._by_call:
            self._by_call[self._name] = [type(hook.state)() for hook in self._holders]
        for hook, state in zip(self._holders, self._by_call[self._name], strict=True):
            hook.state = state
        # Before two steps are computed there is nothing to forecast from.
        early = isinstance(self._settings, Faster) and self._since <= _FIRST_STEPS
        self._timestep = _NEVER if early else self._host_timesteps[index]

    # ---- What is kept of it

    def states(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Number of its holder, context and values of every state."""
        if self._restored:  # not called yet
            for (holder, context), values in self._restored.items():
                yield holder, context, values
            return
        for number, manager in enumerate(self._managers):
            for context, state in manager._state_cache.items():
                yield number, context, copied(kept(state))
        for context, states in self._by_call.items():
            for number, state in enumerate(states, start=len(self._managers)):
                yield number, context, copied(kept(state))
        if self._since:
            yield -1, "", {"since": self._since}

    def restore(self, place: tuple[int, str], values: dict[str, Any]) -> None:
        """Takes one of `states`, for the next call."""
        self._restored[place] = values

    def _load(self) -> None:
        """Gives what was restored to the hooks.

        Raises:
            BadInput: if it is of another cache.
        """
        restored, self._restored = self._restored, {}
        device = next(self._model.parameters()).device if self._run is None else self._run.device
        for (number, context), values in restored.items():
            if number == -1:
                self._since = int(values["since"])
                continue
            try:
                if number < len(self._managers):
                    manager = self._managers[number]
                    state = manager._state_cls(*manager._init_args, **manager._init_kwargs)
                    manager._state_cache[context] = state
                else:
                    if context not in self._by_call:
                        self._by_call[context] = [type(hook.state)() for hook in self._holders]
                    state = self._by_call[context][number - len(self._managers)]
                if unknown := values.keys() - kept(state).keys():
                    raise ValueError(f"it has {', '.join(sorted(unknown))}")
            except (IndexError, ValueError) as error:
                raise BadInput("what the cache had kept is damaged, or of another version of grat") from error
            for name, value in values.items():
                setattr(state, name, moved(value, device))
        self.is_restored = bool(restored)


def _tidied(module: Any, forward: Any, had_registry: bool) -> None:
    """Takes from a module what disabling a cache leaves: a registry without hooks, and its own forward set anew."""
    registry = vars(module).get("_diffusers_hook")
    if registry is not None and registry.hooks:
        return
    if not had_registry:
        vars(module).pop("_diffusers_hook", None)
    if forward is not None:
        module.forward = forward
    elif getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward


@contextmanager
def _quiet() -> Iterator[None]:
    """While inside, diffusers does not say that a cache is experimental."""
    logger = logging.getLogger("diffusers.hooks.faster_cache")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
