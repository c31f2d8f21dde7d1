"""What an adapter is: a transformer's blocks run on tokens in group order, and their attention goes over spans.

Everything in a transformer but attention acts on each token alone. So image tokens and their positions are put in
group order once, before its blocks, and the prediction is put back in raster order once, after them. How a family's
transformer is put together is told by its own adapter, in the file of the family.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from grat_cli.attention.layer import Attend, AttentionInputs, CallObserver, LayerAttention, Text, over_spans
from grat_cli.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from grat_cli.attention.carrying import CarriedLayers, Carrying
    from grat_cli.attention.chunking import Forward
    from grat_cli.attention.context_parallel import Shared
    from grat_cli.attention.extrapolation import Extrapolation
    from grat_cli.attention.guidance_split import GuidanceSplit
    from grat_cli.attention.processor import SpanAttentionProcessor
    from grat_cli.attention.schedule import AttentionSchedule
    from grat_cli.presets.schema import ChunkTokens
    from grat_kernels import Backend, Grid, HeadPlan, Plan

__all__ = ["Adapter", "AttentionInputs", "CallObserver", "DispatchAdapter", "ProcessorAdapter", "Run"]


class Run(Protocol):
    """What an adapter asks while a pipeline runs. Answers never wait for the device."""

    def current_step(self) -> int:
        """The denoising step of the call under way, counted from 0 over the steps that are run."""
        ...

    def schedule(self, text_len: int, references: int = 0) -> AttentionSchedule:
        """Plans for every step, layer and head of a joint sequence with so many tokens of text and of references."""
        ...


class Adapter(ABC):
    """Runs a transformer on tokens in group order with span attention, and undoes it.

    Attributes:
        text_first: whether text tokens come before image tokens in the joint sequence.
        model: the transformer, without what `torch.compile` put around it.
        grid: image tokens of the calls to come.
        blocks: whose attention takes a plan, in order.
        references: tokens of pictures to refer to, in the call under way.
        order: raster index of each image token of the call under way in its order, on its device, of those that this
            rank has where several share the call; behind them tokens of references keep their places.
        inverse: what undoes the order of all of them.
        shared: by which ranks the tokens of the call under way are shared; None where one has them all.
        preparation: what normalises, rotates and joins queries and keys, and why; None before the first call.
        chunking: how many tokens at most run through feed-forward and modulation at once, None for all; and why.
        carries_modules: whether attention modules are carried over steps as a whole.
        orders_calls: whether tokens are put in order where a call begins, and back where it ends, not by hooks inside
            the transformer.
    """

    text_first: ClassVar[bool]
    orders_calls: ClassVar[bool] = False
    references: int = 0
    order: torch.Tensor
    inverse: torch.Tensor
    preparation: str | None = None
    chunking: tuple[int | None, str] = None, "not attached yet"
    carries_modules = False
    shared: Shared | None = None
    _caller: int | None = None  # the thread whose call is under way
    _unmade: torch.Tensor | None = None  # the prediction of the call under way, where another rank makes it

    def __init__(
        self,
        transformer: torch.nn.Module,
        grid: Grid,
        *,
        extrapolation: Extrapolation | None = None,
        chunk_tokens: ChunkTokens = "auto",
        attend: Attend | None = None,
        ranks: ProcessGroup | None = None,
    ) -> None:
        """Prepares, and changes nothing yet.

        Args:
            transformer: the model, or what `torch.compile` made of it.
            grid: image tokens of the calls to come.
            extrapolation: how positions and scores are fitted to the grid; None leaves them as they are.
            chunk_tokens: see `presets.schema.Memory`. `chunking` tells.
            attend: computes attention in place of span attention by a backend.
            ranks: that share the tokens of each call, all with the same arguments; None for one alone.
        """
        # Hooks go on the outermost module, so that a compiled model runs them outside its graph.
        self._called = transformer
        self.model: Any = getattr(transformer, "_orig_mod", transformer)
        self.grid = grid
        self.blocks: list[Any] = self.blocks_of(self.model)
        self.extrapolation = extrapolation
        self._chunk_tokens: ChunkTokens = chunk_tokens
        self._attend = attend
        self._ranks = ranks
        self._hooked: list[torch.nn.Module] = []
        self._parameters = tuple(inspect.signature(type(self.model).forward).parameters)[1:]

    # ---- What a family tells

    @abstractmethod
    def blocks_of(self, model: Any) -> list[Any]:
        """The blocks of a transformer whose attention takes a plan, in order."""

    @abstractmethod
    def chunked_blocks(self) -> Mapping[type, Forward]:
        """How blocks of each class run in chunks of tokens; see `chunking`."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """Heads of each layer."""

    def obstacle(self) -> str | None:
        """Why a transformer of this kind is not supported, and what to do; None where it is."""
        return None

    @abstractmethod
    def read(self, call: dict[str, Any]) -> Text:
        """The text of a call, given by the names of its arguments; cuts off its padding.

        Raises:
            BadInput: if the call does not fit.
        """

    def enter(self, call: dict[str, Any], step: int) -> dict[str, Any]:
        """A call as the transformer is to have it; see `orders_calls`."""
        return call

    def hooks(self) -> Sequence[tuple[torch.nn.Module, Callable[..., Any]]]:
        """Forward hooks inside the transformer, such as `grouped` and `restored`."""
        return ()

    @abstractmethod
    def attending(self, layers: Sequence[LayerAttention]) -> AbstractContextManager[Any]:
        """While inside, attention of each block goes to the layer of its number.

        Raises:
            BadInput: if the blocks' attention is not as diffusers made it.
        """

    def prepare(self, tokens: torch.Tensor) -> None:
        """Chooses what prepares attention in a call with these latents, and says so in `preparation`."""
        self.preparation = "stock modules"

    # ---- What all do

    @property
    def layers(self) -> int:
        """Number of attention layers that take a plan."""
        return len(self.blocks)

    @property
    def called(self) -> torch.nn.Module:
        """The transformer, with what `torch.compile` put around it before the installation."""
        return self._called

    @property
    def is_compiled(self) -> bool:
        """Whether `torch.compile` made something of the transformer or its blocks."""
        return self.is_compiled_whole or any(map(_in_place, self.blocks))

    @property
    def is_compiled_whole(self) -> bool:
        """Whether it made one thing of all of it."""
        return self._called is not self.model or _in_place(self.model)

    def whole_obstacle(self) -> str | None:
        """Why the transformer cannot be compiled as a whole, and what to do; None where it can.

        Tokens that are put in order inside it would be so by hooks that belong to the compiled code, which is not made
        anew where hooks change.
        """
        if not self.hooks():
            return None
        return (
            f"GRAT inside a {type(self.model).__name__} that is compiled as a whole is not supported: leave that out, "
            "and compile its blocks, transformer.compile_repeated_blocks()"
        )

    def grouped(self, dim: int) -> Callable[..., Any]:
        """A forward hook that puts a module's output, a tensor or several, in group order along an axis."""
        return lambda module, args, output: self.in_groups(output, dim)

    def restored(self, dim: int) -> Callable[..., Any]:
        """A forward hook that puts it back in raster order."""
        return lambda module, args, output: self.in_raster(output, dim)

    def in_groups(self, tokens: Any, dim: int) -> Any:
        """A tensor of tokens in raster order along an axis, or several, in the order of the call under way: those that
        this rank has."""
        if isinstance(tokens, tuple):
            return tuple(self.in_groups(part, dim) for part in tokens)
        return tokens.index_select(dim, self.order)

    def in_raster(self, tokens: Any, dim: int) -> Any:
        """What undoes it: all tokens, from those that this rank has."""
        if isinstance(tokens, tuple):
            return tuple(self.in_raster(part, dim) for part in tokens)
        if self.shared is not None:
            tokens = self.shared.gathered(tokens, dim)
        return tokens.index_select(dim, self.inverse)

    @contextmanager
    def attached(
        self,
        run: Run,
        backend: Backend,
        observer: CallObserver | None = None,
        carrying: Carrying | None = None,
        split: GuidanceSplit | None = None,
    ) -> Iterator[None]:
        """While inside, the transformer attends over spans; leaving restores it exactly, also after an exception.

        Args:
            run: gives plans and the step of each call.
            backend: how span attention is computed.
            observer: told of calls and attentions, or None.
            carrying: what carries attention over steps, or None.
            split: says which calls another rank makes; None for none.

        Raises:
            BadInput: if the transformer is in a state that is not supported, with the reason.
        """
        from grat_cli.attention import chunking

        reason = self.obstacle()
        if reason is None and self.is_compiled_whole:
            reason = self.whole_obstacle()
        if reason is None and self.is_compiled_whole and split is not None:
            reason = "calls of a transformer that is compiled as a whole cannot be left to another rank: compile blocks"
        if reason is not None:
            raise BadInput(reason)
        forwards = self.chunked_blocks()
        self.chunking = chunking.choose(
            self._chunk_tokens, self.grid.tokens, self.blocks, forwards, compiled=self.is_compiled
        )
        attend = self._attend or over_spans(backend)
        layers = [LayerAttention(layer, attend, observer) for layer in range(self.layers)]
        over_steps = None
        if carrying is not None:
            over_steps = carrying.of_transformer(self.layers)
            for layer, carried in zip(layers, over_steps.layers, strict=True):
                layer.over_steps = carried
        with ExitStack() as stack:
            stack.enter_context(self.attending(layers))
            before, after, ended = self._around(run, observer, layers, over_steps, split)
            handles = [self._called.register_forward_pre_hook(before, with_kwargs=True)]
            hooks = self.hooks()
            self._hooked = [module for module, _ in hooks]
            handles += [module.register_forward_hook(hook) for module, hook in hooks]
            handles.append(self._called.register_forward_hook(after))
            handles.append(self._called.register_forward_hook(ended, always_call=True))
            for handle in handles:
                stack.callback(handle.remove)
            stack.enter_context(chunking.in_chunks(self.blocks, forwards, self.chunking[0]))
            if split is not None:
                stack.enter_context(self._leaving_out())
            yield

    @contextmanager
    def _leaving_out(self) -> Iterator[None]:
        """While inside, the transformer is not run in calls that another rank makes."""
        model, stock = self.model, self.model.forward
        had_own = "forward" in vars(model)

        @functools.wraps(stock)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._unmade is None:
                return stock(*args, **kwargs)
            if not kwargs.get("return_dict", True):
                return (self._unmade,)
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=self._unmade)

        model.forward = forward
        try:
            yield
        finally:
            if had_own:
                model.forward = stock
            else:
                del model.forward

    def _refuse_changed(self, called: torch.nn.Module) -> None:
        """Raises BadInput where a call would not run what was installed.

        Args:
            called: the module whose call it is.
        """
        if called is not self._called:
            raise BadInput(
                "this transformer is a copy of one that GRAT is installed on, which is not part of it: "
                "copy it outside of `with grat_cli.install(...)`, and install there"
            )
        if self._caller not in (None, threading.get_ident()):
            raise BadInput("two threads call a transformer that GRAT is installed on at once: let them take turns")
        hooked = [module for module, _ in self.hooks()]
        if not _same(self.blocks_of(self.model), self.blocks) or not _same(hooked, self._hooked):
            raise BadInput(
                "parts of the transformer were replaced inside `with grat_cli.install(...)`: do that outside"
            )
        if self.is_compiled_whole and (reason := self.whole_obstacle()):
            raise BadInput(reason)
        if self.chunking[0] is not None and self.is_compiled:
            raise BadInput(
                "the transformer runs in chunks of tokens, and was compiled inside `with grat_cli.install(...)`: "
                "compile it before, or give chunk_tokens=None"
            )
        if self.carries_modules and self.is_compiled:
            raise BadInput(
                "attention is carried over steps, and the transformer was compiled inside "
                "`with grat_cli.install(...)`: compile it before"
            )

    def _around(
        self,
        run: Run,
        observer: CallObserver | None,
        layers: Sequence[LayerAttention],
        over_steps: CarriedLayers | None,
        split: GuidanceSplit | None,
    ) -> tuple[Callable[..., Any], ...]:
        """Hooks before and after a transformer call, and one when it has ended, also by an exception."""
        import torch

        from grat_cli.attention.context_parallel import Shared
        from grat_cli.attention.guidance_split import unmade

        trained = None
        if self.extrapolation is not None and self.extrapolation.proportional_attention:
            trained = math.prod(self.extrapolation.trained_grid)

        def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            self._refuse_changed(module)
            self._caller = threading.get_ident()
            call = dict(zip(self._parameters, args, strict=False)) | kwargs
            if split is not None and not split.takes():
                self._unmade = unmade(self.model, call["hidden_states"])
                return (), call
            text = self.read(call)
            step = run.current_step()
            schedule = run.schedule(text.longest, text.references)
            tokens, self.references = call["hidden_states"], text.references
            if self._ranks is not None:
                observed = observer.exchange if observer else nullcontext
                self.shared = Shared.of(self._ranks, self.grid.tokens + text.references, observed)
            self.prepare(tokens)
            if observer:
                observer.begin_call(step, schedule.density_of_step(step))
            plan_of = schedule.plan
            if over_steps is not None:
                over_steps.begin_call(step, schedule)
                plan_of = schedule.reference_plan
            for number, layer in enumerate(layers):
                layer.plan, layer.text_valid, layer.shared = plan_of(step, number), text.valid, self.shared
                if trained is not None:
                    from grat_cli.attention.extrapolation import proportional_scaling

                    layer.scaling = functools.partial(
                        proportional_scaling, trained_image_tokens=trained, device=tokens.device
                    )
            # All plans of a schedule share one token order.
            self.order, self.inverse = _orders(layers[0].plan, text.references, tokens.device)
            if self.shared is not None:
                self.order = self.order[self.shared.own]
            return (), self.enter(call, step)

        def after(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._unmade is None:
                if self.orders_calls:
                    output = with_sample(output, self.in_raster(output[0], 1))
                if observer:
                    observer.end_call()
                if over_steps is not None:
                    over_steps.end_call()
            if split is not None:
                split.exchanged(output[0], observer)
            return output

        def ended(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._caller == threading.get_ident():
                self._caller = self._unmade = None
                for layer in layers:
                    layer.forget()
                if over_steps is not None:
                    over_steps.leave_call()

        # Hooks of a module that is compiled in place, or later, are compiled with it, and these are no tensor code.
        return tuple(map(torch.compiler.disable, (before, after, ended)))


class _ReplacingAdapter(Adapter):
    """An adapter that gives attention modules other processors than diffusers made."""

    def __init__(self, transformer: torch.nn.Module, grid: Grid, **options: Any) -> None:
        """See `Adapter`."""
        super().__init__(transformer, grid, **options)
        self._attentions: list[Any] = [self.attention_of(block) for block in self.blocks]
        self._processors: list[Any] = []
        self._layers: Sequence[LayerAttention] = ()

    def attention_of(self, block: Any) -> Any:
        """The attention module of a block that takes a plan."""
        return block.attn

    def returns_attention_alone(self, attention: Any) -> bool:
        """Whether an attention module computes nothing else, so that its output can be carried over steps whole."""
        return True

    @property
    def heads(self) -> int:
        """Heads of each layer."""
        return self._attentions[0].heads

    @abstractmethod
    def stock_processors(self) -> tuple[type, ...]:
        """The classes of the processors that diffusers makes."""

    @abstractmethod
    def processor_for(self, layer: LayerAttention, stock: Any) -> Any:
        """The processor of a layer in place of a stock one, which stays as it is."""

    @contextmanager
    def attending(self, layers: Sequence[LayerAttention]) -> Iterator[None]:
        """See `Adapter.attending`."""
        stock = [attention.processor for attention in self._attentions]
        for processor in stock:
            self._refuse_replaced(processor)
        self._layers = layers
        self._processors = [self.processor_for(layer, of_layer) for layer, of_layer in zip(layers, stock, strict=True)]
        self._carry_modules()
        try:
            for attention, processor in zip(self._attentions, self._processors, strict=True):
                attention.set_processor(processor)
            yield
        finally:
            for attention, processor in zip(self._attentions, stock, strict=True):
                attention.set_processor(processor)

    def _carry_modules(self) -> None:
        """Where attention is carried over steps, its modules are, as far as they can be."""
        from grat_cli.attention.carrying import with_module_carried

        self.carries_modules = False
        if self.is_compiled:  # what differs from step to step is inside of an operator there
            return
        for attention, processor, layer in zip(self._attentions, self._processors, self._layers, strict=True):
            if layer.over_steps is not None and self.returns_attention_alone(attention):
                with_module_carried(processor, layer.over_steps)
                self.carries_modules = True

    def prepare(self, tokens: torch.Tensor) -> None:
        """See `Adapter.prepare`.

        Raises:
            BadInput: if processors were replaced or changed.
        """
        if not _same([self.attention_of(block) for block in self.blocks], self._attentions):
            raise BadInput("attention was replaced inside `with grat_cli.install(...)`: do that outside")
        for attention, processor, layer in zip(self._attentions, self._processors, self._layers, strict=True):
            if attention.processor is not processor or not self.is_own(processor, layer):
                raise BadInput(
                    "attention processors were replaced inside `with grat_cli.install(...)`, or what they name was: "
                    "do that outside"
                )
        super().prepare(tokens)

    def is_own(self, processor: Any, layer: LayerAttention) -> bool:
        """Whether a processor of `processor_for` still is as it was made."""
        return True

    def _refuse_replaced(self, processor: Any) -> None:
        """Raises BadInput unless attention is as diffusers made it."""
        from grat_cli.attention.dispatching import is_of_layer
        from grat_cli.attention.processor import SpanAttentionProcessor

        if isinstance(processor, SpanAttentionProcessor) or is_of_layer(processor):
            raise BadInput(
                "GRAT is already installed on this transformer: leave the other `with grat_cli.install(...)` first"
            )
        if type(processor) not in self.stock_processors():
            raise BadInput(
                f"the transformer's attention was replaced by {type(processor).__name__} (IP-Adapter, or another "
                "tool), which GRAT does not combine with: undo that first"
            )
        if processor._parallel_config is not None:
            raise BadInput("the transformer splits its sequence over several devices, which GRAT does not support")


class ProcessorAdapter(_ReplacingAdapter):
    """An adapter of blocks with joint attention that a fused kernel may prepare.

    Attributes:
        contiguous: whether stock processors make text and image contiguous before the output projections.
    """

    contiguous: ClassVar[bool]

    def __init__(self, transformer: torch.nn.Module, grid: Grid, *, fused: bool | None = None, **options: Any) -> None:
        """As for `Adapter`, and whether norms, rotation and joining before attention are one kernel, so that calls that
        it cannot serve are refused; by default, wherever it can run on a GPU. `preparation` tells.
        """
        super().__init__(transformer, grid, **options)
        self._fused = fused

    def processor_for(self, layer: LayerAttention, stock: Any) -> SpanAttentionProcessor:
        """See `_ReplacingAdapter`."""
        from grat_cli.attention.processor import SpanAttentionProcessor

        return SpanAttentionProcessor(layer, text_first=self.text_first, contiguous=self.contiguous)

    def prepare(self, tokens: torch.Tensor) -> None:
        """See `Adapter.prepare`.

        Raises:
            BadInput: if processors were replaced, or the fused kernel was asked for and cannot run.
        """
        from grat_cli.attention import preparation

        super().prepare(tokens)
        fused, self.preparation = preparation.choose(self._fused, self._attentions, tokens, self.references)
        for processor in self._processors:
            processor.fused = fused


class DispatchAdapter(_ReplacingAdapter):
    """An adapter of blocks whose stock processors call diffusers' attention dispatcher, and go on doing so.

    Each is a copy of the stock one that names the backend of layers, and its own; see `dispatching`.
    """

    def __init__(self, transformer: torch.nn.Module, grid: Grid, *, fused: bool | None = None, **options: Any) -> None:
        """As for `Adapter`.

        Raises:
            BadInput: if attention is to be prepared by a fused kernel.
        """
        super().__init__(transformer, grid, **options)
        if fused:
            raise BadInput(f"no fused kernel prepares the attention of a {type(self.model).__name__}")

    def processor_for(self, layer: LayerAttention, stock: Any) -> Any:
        """See `_ReplacingAdapter`."""
        from grat_cli.attention.dispatching import with_layer

        return with_layer(stock, layer)

    def is_own(self, processor: Any, layer: LayerAttention) -> bool:
        """See `_ReplacingAdapter`."""
        from grat_cli.attention.dispatching import attends_by

        return attends_by(processor, layer)


def _orders(plan: Plan | HeadPlan, references: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token order of a plan and its inverse, where so many tokens follow that stay where they are."""
    order, inverse, _ = plan.tensors(device)
    if not references:
        return order, inverse

    def extended() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        behind = torch.arange(len(order), len(order) + references, device=device)
        return torch.cat([order, behind]), torch.cat([inverse, behind])

    return plan.cached(("order with references", references, device), extended)


def with_sample(output: Any, sample: torch.Tensor) -> Any:
    """What a transformer returns, a tuple or diffusers' own output, with another prediction."""
    return (sample, *output[1:]) if isinstance(output, tuple) else replace(output, sample=sample)


def _in_place(module: Any) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def _same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    return len(these) == len(those) and all(one is other for one, other in zip(these, those, strict=True))
