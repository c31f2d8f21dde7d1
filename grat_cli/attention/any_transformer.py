"""GRAT inside a transformer that is not known: in each attention by itself.

Nothing is known of where its tokens enter and leave, so query, key and value are put in group order in every attention,
and the output back: one more pass over each of them in every layer than where a model family is known. Which of its
attentions run over the image tokens is found out by a call of the transformer as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from grat_cli.attention.dispatching import is_of_layer, named, registered, with_backend
from grat_cli.attention.layer import AttentionInputs, CallObserver, LayerAttention, over_spans
from grat_cli.errors import BadInput, NumericalFailure
from grat_kernels import Full, HeadPlan, Plan, build_plan

if TYPE_CHECKING:
    from grat_cli.attention.adapter import Run
    from grat_cli.attention.carrying import Carrying
    from grat_cli.attention.guidance_split import GuidanceSplit
    from grat_kernels import Backend, Grid

_COMPILED = "a compiled transformer that GRAT does not know is not supported: leave torch.compile out"

TextPlace = Literal["first", "last"]


class AnyTransformer:
    """Runs a transformer's attention over image tokens as span attention, as an `adapter.Adapter` does.

    Attributes:
        model: the transformer, without what `torch.compile` put around it.
        grid: image tokens of the calls to come.
        text_first: whether text comes before image tokens where both are attended in one sequence.
        layers: attentions over image tokens; 0 before the first call.
        heads: of each, likewise.
        references: none are known of.
        preparation: what makes queries and keys; None before the first call.
        chunking: how many tokens at most run through feed-forward at once: all of them; and why.
    """

    preparation: str | None = None
    chunking: tuple[int | None, str] = None, "the transformer is not known"
    layers = heads = references = 0

    def __init__(self, transformer: torch.nn.Module, grid: Grid, text: TextPlace | None, *, check: bool) -> None:
        """Prepares, and changes nothing yet.

        Args:
            transformer: whose attention processors call diffusers' dispatcher.
            grid: image tokens, as they follow one another in its attentions.
            text: where text stands in a sequence of text and image tokens; None where there is no such.
            check: whether the first call is compared with the transformer as it is.

        Raises:
            BadInput: if no attention of the transformer calls the dispatcher.
        """
        self.model: Any = getattr(transformer, "_orig_mod", transformer)
        modules = [] if self.model is not transformer else list(self.model.modules())
        if not modules or any(module._compiled_call_impl is not None for module in modules):
            raise BadInput(_COMPILED)
        self.grid, self.text_first = grid, text != "last"
        self._has_text, self._check = text is not None, check
        self._attentions = [
            module
            for module in self.model.modules()
            if hasattr(getattr(module, "processor", None), "_attention_backend")
        ]
        if not self._attentions:
            raise BadInput(
                f"no attention of the {type(self.model).__name__} calls diffusers' dispatcher: "
                "GRAT cannot be tried on it"
            )
        if getattr(self.model, "is_cache_enabled", False):
            raise BadInput(
                "a transformer that GRAT does not know is not supported with a step cache: disable_cache() first"
            )
        if any(is_of_layer(attention.processor) for attention in self._attentions):
            raise BadInput(
                "GRAT is already installed on this transformer: leave the other `with grat_cli.install(...)` first"
            )

    @property
    def called(self) -> torch.nn.Module:
        """The transformer."""
        return self.model

    def whole_obstacle(self) -> str | None:
        """See `adapter.Adapter`."""
        return _COMPILED

    @contextmanager
    def attached(
        self,
        run: Run,
        backend: Backend,
        observer: CallObserver | None = None,
        carrying: Carrying | None = None,
        split: GuidanceSplit | None = None,
    ) -> Iterator[None]:
        """While inside, attention goes over spans; leaving restores the transformer exactly, also after an exception.

        Args:
            run: gives plans and the step of each call.
            backend: how span attention is computed.
            observer: told of calls and attentions, or None.
            carrying: None: nothing is carried over steps here.
            split: None: ranks do not share calls here.
        """
        stock = [attention.processor for attention in self._attentions]
        calls = _Calls(self, run, over_spans(backend), observer, [processor._attention_backend for processor in stock])
        backends = [named(functools.partial(calls.attention, number)) for number in range(len(stock))]
        self.layers = self.heads = 0
        with ExitStack() as stack:
            stack.enter_context(registered(backends))
            for attention, processor, own in zip(self._attentions, stock, backends, strict=True):
                stack.callback(attention.set_processor, processor)
                attention.set_processor(with_backend(processor, own))
            stack.callback(self.model.register_forward_pre_hook(calls.before, with_kwargs=True).remove)
            stack.callback(self.model.register_forward_hook(calls.after).remove)
            yield

    def text_tokens(self, tokens: int) -> int | None:
        """Text tokens in a sequence of so many tokens; None where that is none with image tokens.

        Raises:
            BadInput: if there are tokens beside those of the image, and it was not said where.
        """
        beside = tokens - self.grid.tokens
        if beside > 0 and not self._has_text:
            raise BadInput(
                f"an attention has {tokens} tokens, {beside} more than the grid "
                f"{'x'.join(map(str, self.grid.shape))}: say where text stands, text='first' or text='last', "
                "or give the grid of the call"
            )
        return beside if beside >= 0 else None


@dataclass(frozen=True)
class _Sequence:
    """A joint sequence in the order of a plan: where each of its tokens comes from, and what undoes it."""

    order: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, plan: Plan | HeadPlan, device: torch.device) -> _Sequence:
        """Of a plan, moved to a device once."""

        def build() -> _Sequence:
            order, inverse, _ = plan.tensors(device)
            before = torch.arange(plan.image_start, device=device)
            after = torch.arange(plan.image_stop, plan.tokens, device=device)
            return cls(*(torch.cat([before, plan.image_start + of_image, after]) for of_image in (order, inverse)))

        return plan.cached(("joint order", device), build)


class _Calls:
    """The transformer calls of one run: of each attention how it is computed."""

    def __init__(
        self,
        adapter: AnyTransformer,
        run: Run,
        attend: Callable[[AttentionInputs], torch.Tensor],
        observer: CallObserver | None,
        stock_backends: Sequence[Any],
    ) -> None:
        self._adapter, self._run, self._observer = adapter, run, observer
        self._attend, self._stock_backends = attend, stock_backends
        # By number of the attention: its layer, and which it is in the order of the calls.
        self._layers: dict[int, tuple[LayerAttention, int]] = {}
        self._mode: Literal["stock", "full", "own"] = "own"
        self._text_len = self._step = 0

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call. Before the first one it is found out which attentions there are, and that they are right."""
        if not self._layers:
            expected = self._in_mode("stock", args, kwargs)
            adapter = self._adapter
            adapter.layers = len(self._layers)
            if not self._layers:
                raise BadInput(
                    f"no attention of the {type(adapter.model).__name__} runs over {adapter.grid.tokens} tokens: "
                    "give the grid of the call, tokens=Grid((frames, rows, columns))"
                )
            if adapter._check:
                _compare(expected, self._in_mode("full", args, kwargs))
            adapter.preparation = "stock modules"
        self._step = self._run.current_step()
        if self._observer:
            self._observer.begin_call(self._step, self._run.schedule(self._text_len).density_of_step(self._step))

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """After a call."""
        if self._observer and self._mode == "own":
            self._observer.end_call()

    def _in_mode(self, mode: Literal["stock", "full"], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._mode = mode
        try:
            return self._adapter.model.forward(*args, **kwargs)
        finally:
            self._mode = "own"

    def attention(
        self,
        number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> torch.Tensor:
        """One attention, `[B, N, H, D]`; arguments after the first are the dispatcher's."""
        adapter = self._adapter
        text = adapter.text_tokens(query.shape[1]) if query.shape[1] == key.shape[1] else None

        def stock() -> torch.Tensor:
            return dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale,
                enable_gqa,
                backend=self._stock_backends[number],
                parallel_config=_parallel_config,
            )

        if text is None:
            return stock()
        if is_causal or dropout_p or _parallel_config is not None or key.shape != query.shape:
            raise BadInput(
                "the transformer's attention is causal, dropped out, split or of shared heads: not supported"
            )
        if scale is not None and abs(scale * query.shape[3] ** 0.5 - 1) > 1e-6:
            raise BadInput(f"the transformer scales scores by {scale:g}, not by 1/sqrt of the channels: not supported")
        if self._mode == "stock":
            _refuse_mask(attn_mask, query.shape[1], text, adapter.text_first)
            place = len(self._layers)
            self._layers.setdefault(number, (LayerAttention(place, self._attend, self._observer), place))
            adapter.heads, self._text_len = query.shape[2], max(text, self._text_len)
            return stock()

        if number not in self._layers:
            raise BadInput("an attention that ran over other tokens in the first call runs over image tokens now")
        (layer, place), schedule = self._layers[number], self._run.schedule(text)
        if self._mode == "full":
            layer = LayerAttention(0, self._attend, None)
            plan: Plan | HeadPlan = build_plan(schedule.plans[0].grouping, Full(), text, adapter.text_first)
        else:
            plan = schedule.plan(self._step, place)
        layer.plan = plan
        layer.text_valid = None if attn_mask is None else _text_valid(attn_mask, text, adapter.text_first)
        sequence = _Sequence.of(plan, query.device)
        query, key, value = (tensor.index_select(1, sequence.order) for tensor in (query, key, value))
        return layer(query, key, value).index_select(1, sequence.inverse)


def _keys_kept(mask: torch.Tensor) -> torch.Tensor:
    """Which keys of each sample a mask of padding lets be attended, `[B, N]` bool."""
    kept = mask if mask.dtype == torch.bool else mask > -1
    return kept.reshape(kept.shape[0], kept.shape[-1])


def _text_valid(mask: torch.Tensor, text: int, text_first: bool) -> torch.Tensor | None:
    """Valid text tokens of each sample, `[B]`; nothing is waited for."""
    if not text:
        return None
    kept = _keys_kept(mask)
    return (kept[:, :text] if text_first else kept[:, kept.shape[1] - text :]).sum(1, dtype=torch.int32)


def _refuse_mask(mask: torch.Tensor | None, tokens: int, text: int, text_first: bool) -> None:
    """Raises BadInput unless a mask hides nothing but the end of the text."""
    if mask is None:
        return
    if mask.numel() != mask.shape[0] * tokens or mask.shape[-1] != tokens:
        raise BadInput(
            f"the transformer masks attention by query and key {list(mask.shape)}: only padded text is supported"
        )
    kept = _keys_kept(mask)
    at = 0 if text_first else tokens - text
    of_text = kept[:, at : at + text]
    of_image = torch.cat([kept[:, :at], kept[:, at + text :]], dim=1)
    ends = torch.arange(text, device=kept.device) < of_text.sum(1, keepdim=True)
    if not of_image.all() or not torch.equal(of_text, ends):
        raise BadInput("the transformer masks more than the end of the text: try it with one prompt and no padding")


def _compare(expected: Any, made: Any) -> None:
    """Raises NumericalFailure unless two outputs of a transformer are one but for rounding.

    Sums of attention in another order differ by some units in the last place of the dtype, and a transformer carries
    them on from block to block: on average by a few hundredths in 16 bits, by a few millionths in 32.
    """
    for stock, ours in zip(_tensors(expected), _tensors(made), strict=True):
        unit = torch.finfo(stock.dtype).eps if stock.dtype.is_floating_point else 0.0
        error = (ours.double() - stock.double()).norm() / stock.double().norm().clamp_min(1e-30)
        if not error <= max(16 * unit, 1e-4):
            raise NumericalFailure(
                f"full attention through GRAT differs from the transformer's own by {float(error):.2g}: "
                "the grid or the place of the text is not what it says, or its attention is of another kind"
            )


def _tensors(output: Any) -> list[torch.Tensor]:
    """All tensors of an output: a tensor, a sequence or a dataclass of diffusers."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
