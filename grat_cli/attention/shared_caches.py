"""What step caches decide by where ranks share the tokens of a call: by all tokens, so that all ranks decide alike.

Most caches decide by the number or the timestep of a step, and forecast each token from itself alone: they run as they
are, on what tokens a rank has. Those that look at tokens are told what all ranks see. Read against diffusers 0.42.1,
`hooks/`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from grat_cli.attention.adapter import Adapter
    from grat_cli.attention.context_parallel import Shared


def obstacle(config: Any) -> str | None:
    """Why ranks cannot run with a cache, or None.

    Args:
        config: of diffusers, that the cache was enabled with.
    """
    import diffusers

    hooks: Any = diffusers
    known = (
        *(hooks.FirstBlockCacheConfig, hooks.MagCacheConfig, hooks.TaylorSeerCacheConfig),
        *(hooks.PyramidAttentionBroadcastConfig, hooks.FasterCacheConfig),
    )
    if not isinstance(config, known):
        return "several ranks might decide differently what to take over"
    if isinstance(config, hooks.FasterCacheConfig) and not config.is_guidance_distilled:
        return "it forecasts one call of guidance from the frequencies of whole predictions, of which ranks have parts"
    return None


@contextmanager
def decided_together(hooks: Sequence[Any], adapter: Adapter) -> Iterator[None]:
    """While inside, hooks of a cache decide by the tokens of all ranks.

    Args:
        hooks: of diffusers.
        adapter: of the transformer, whose calls ranks share.
    """
    import torch
    from diffusers.hooks.first_block_cache import FBCHeadBlockHook
    from diffusers.hooks.mag_cache import MagCacheBlockHook

    replaced: list[tuple[Any, str]] = []

    def replace(hook: Any, name: str, decide: Callable[..., Any]) -> None:
        setattr(hook, name, torch.compiler.disable(decide))
        replaced.append((hook, name))

    try:
        for hook in hooks:
            if isinstance(hook, FBCHeadBlockHook):
                replace(hook, "_should_compute_remaining_blocks", functools.partial(_has_changed, adapter, hook))
            elif isinstance(hook, MagCacheBlockHook):
                replace(hook, "_perform_calibration_step", functools.partial(_calibrate, adapter))
        yield
    finally:
        for hook, name in replaced:
            delattr(hook, name)


def _has_changed(adapter: Adapter, hook: Any, residual: torch.Tensor) -> bool:
    """Whether the first block says something else than before: `FBCHeadBlockHook._should_compute_remaining_blocks`."""
    before = hook.state_manager.get_state().head_block_residual
    if before is None:
        return True
    means = _shared(adapter).means([(residual - before).abs(), before.abs()], text_first=adapter.text_first)
    change, size = means.to(residual.dtype)
    return bool((change / size).item() > hook.threshold)


def _calibrate(adapter: Adapter, state: Any, residual: torch.Tensor) -> None:
    """Adds the ratio of a step: `MagCacheBlockHook._perform_calibration_step`."""
    import torch

    ratio = 1.0
    if state.previous_residual is not None:
        size, before = (torch.linalg.norm(one.float(), dim=-1) for one in (residual, state.previous_residual))
        (mean,) = _shared(adapter).means([size / (before + 1e-8)], text_first=adapter.text_first)
        ratio = mean.item()
    state.calibration_ratios.append(ratio)


def _shared(adapter: Adapter) -> Shared:
    assert adapter.shared is not None, "ranks share the call under way"
    return adapter.shared
