"""Flux: joint sequence [text, image], two grid axes, double blocks first, then single blocks.

Everything in the transformer but attention acts on each token alone. So image tokens and their positions are put in
group order once, before a transformer call, and the prediction is put back in raster order once, after it; in between
only the attention processors differ from stock (read against diffusers 0.42.1, `transformer_flux.py`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor, FluxTransformer2DModel
from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device

from grat_cli.attention import chunking, preparation
from grat_cli.attention.adapter import AttentionInputs, CallObserver, Run
from grat_cli.attention.extrapolation import Extrapolation, frequencies, query_scale
from grat_cli.errors import BadInput
from grat_cli.presets.schema import ChunkTokens
from grat_kernels import Backend, Grid, HeadPlan, Plan, span_attention
from grat_kernels.rope_norm import Joined, Projections

_PARAMETERS = tuple(inspect.signature(FluxTransformer2DModel.forward).parameters)[1:]


class Scaling(NamedTuple):
    """Of scores, beside 1/√D: a factor for all queries, and one for each, `[N, 1 or H, 1]` fp32, or None."""

    factor: float = 1.0
    queries: torch.Tensor | None = None


class SpanAttentionProcessor:
    """Stock Flux attention, with span attention in place of dense attention.

    Attributes:
        plan: what attends what in the next call; the adapter sets it before every transformer call.
        fused: whether norms, rotation, joining of text and image, and far-field means are one kernel; likewise.
        scaling: of the scores, beside 1/√D; likewise.
    """

    plan: Plan | HeadPlan
    fused: bool
    scaling: Scaling

    def __init__(self, backend: Backend, observer: CallObserver | None, layer: int) -> None:
        self.backend, self.layer = backend, layer
        self.observed = observer.attention if observer else nullcontext

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one block.

        Args:
            attn: the block's attention module.
            hidden_states: image tokens `[B, image, C]` in a double block, `[B, text + image, C]` in a single one.
            encoder_hidden_states: text tokens `[B, text, C]` in a double block, else None.
            attention_mask: must be None.
            image_rotary_emb: a pair, cosines and sines `[text + image, D]`, image rows in group order.

        Returns:
            `[B, text + image, C]` in a single block; image and text tokens apart in a double one.
        """
        if attention_mask is not None:
            raise BadInput("attention masks are not supported: Flux attends all of its text tokens")
        image = _project(attn, hidden_states)
        text = None if encoder_hidden_states is None else _project_text(attn, encoder_hidden_states)
        if self.fused:
            query, key, value, summaries = preparation.at_once(attn, image, text, image_rotary_emb, self.plan)
        else:
            query, key, value, summaries = _prepared_as_stock(attn, image, text, image_rotary_emb)
        del image, text  # else the projections would be kept for as long as attention runs

        # Scores are scaled through the queries, one more pass over them, because keys share their rotation tables and
        # kernels take one scale. Where all queries have one factor, which is then the kernel's, it costs nothing.
        if self.scaling.queries is not None:
            query.mul_(self.scaling.queries)
        scale = self.scaling.factor / math.sqrt(attn.head_dim)
        with self.observed(AttentionInputs(self.layer, query, key, value, self.plan, scale, None, summaries)):
            attended = span_attention(
                query, key, value, self.plan, scale=scale, backend=self.backend, summaries=summaries
            )
        attended = attended.flatten(2, 3)
        if encoder_hidden_states is None:
            return attended
        text, image = attended.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        projection, dropout = attn.to_out
        return dropout(projection(image.contiguous())), attn.to_add_out(text.contiguous())


def _prepared_as_stock(
    attn: FluxAttention, image: Projections, text: Projections | None, image_rotary_emb: Any
) -> Joined:
    """The joint sequence, normalised and rotated by the modules and functions of stock attention."""
    query, key, value = attn.norm_q(image.query), attn.norm_k(image.key), image.value
    if text is not None:
        query = torch.cat([attn.norm_added_q(text.query), query], dim=1)
        key = torch.cat([attn.norm_added_k(text.key), key], dim=1)
        value = torch.cat([text.value, value], dim=1)
    if image_rotary_emb is not None:
        query, key = _rotated(query, image_rotary_emb), _rotated(key, image_rotary_emb)
    return Joined(query, key, value, None)


def _project(attn: FluxAttention, tokens: torch.Tensor) -> Projections:
    """Query, key and value of image (or joint) tokens, `[B, N, H, D]` each."""
    if attn.fused_projections:
        projected = attn.to_qkv(tokens).chunk(3, dim=-1)
    else:
        projected = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
    return Projections(*(tensor.unflatten(-1, (-1, attn.head_dim)) for tensor in projected))


def _project_text(attn: FluxAttention, tokens: torch.Tensor) -> Projections:
    """Query, key and value of the text tokens of a double block, `[B, text, H, D]` each."""
    if attn.fused_projections:
        projected = attn.to_added_qkv(tokens).chunk(3, dim=-1)
    else:
        projected = attn.add_q_proj(tokens), attn.add_k_proj(tokens), attn.add_v_proj(tokens)
    return Projections(*(tensor.unflatten(-1, (-1, attn.head_dim)) for tensor in projected))


def _rotated(tokens: torch.Tensor, image_rotary_emb: Any) -> torch.Tensor:
    """Queries or keys `[B, N, H, D]` with their positions rotated in."""
    return cast(torch.Tensor, apply_rotary_emb(tokens, image_rotary_emb, sequence_dim=1))


class FluxAdapter:
    """Runs a `FluxTransformer2DModel` on image tokens in group order; an `adapters.base.Adapter`."""

    text_first = True
    preparation: str | None = None
    chunking: tuple[int | None, str] = None, "not attached yet"

    def __init__(
        self,
        transformer: torch.nn.Module,
        grid: Grid,
        fused: bool | None = None,
        extrapolation: Extrapolation | None = None,
        chunk_tokens: ChunkTokens = "auto",
    ) -> None:
        """Prepares, and changes nothing yet.

        Args:
            transformer: the model, or what `torch.compile` made of it.
            grid: rows and columns of image tokens of the calls to come.
            fused: whether norms, rotation and joining before attention are one kernel, and calls that it cannot serve
                are refused; by default, wherever it can run on a GPU. `preparation` tells.
            extrapolation: how positions and scores are fitted to the grid; None leaves them as they are.
            chunk_tokens: see `preset_schema.Memory`. `chunking` tells.
        """
        self._fused, self._extrapolation = fused, extrapolation
        self._chunk_tokens: ChunkTokens = chunk_tokens
        # Hooks go on the outermost module, so that a compiled model runs them outside its graph.
        self._called = transformer
        self._model: Any = getattr(transformer, "_orig_mod", transformer)
        self._grid = grid
        self._blocks: list[Any] = [*self._model.transformer_blocks, *self._model.single_transformer_blocks]
        self._attentions: list[Any] = [block.attn for block in self._blocks]

    @property
    def layers(self) -> int:
        """Attention layers: double blocks, then single blocks."""
        return len(self._attentions)

    @property
    def heads(self) -> int:
        """Heads of each."""
        return self._attentions[0].heads

    def _choose_preparation(self, hidden_states: torch.Tensor) -> bool:
        """Whether the fused kernel prepares a call with these image tokens; says why in `preparation`.

        Raises:
            BadInput: if the fused kernel was asked for and cannot run.
        """
        fused, self.preparation = preparation.choose(self._fused, self._attentions, torch.nn.RMSNorm, hidden_states)
        return fused

    def _has_compiled_blocks(self) -> bool:
        return any(block._compiled_call_impl is not None for block in self._blocks)

    @contextmanager
    def attached(self, run: Run, backend: Backend, observer: CallObserver | None = None) -> Iterator[None]:
        """See `adapters.base.Adapter.attached`."""
        for attention in self._attentions:
            _check_stock(attention.processor)
        compiled_in_place = getattr(self._model, "_compiled_call_impl", None) is not None
        compiled = compiled_in_place or self._called is not self._model or self._has_compiled_blocks()
        if observer and compiled:
            raise BadInput(
                "attention inside a compiled transformer cannot be observed: install without an observer and a guard"
            )
        self.chunking = chunking.choose(self._chunk_tokens, self._grid.tokens, self._blocks, compiled)
        stock = [attention.processor for attention in self._attentions]
        processors = [SpanAttentionProcessor(backend, observer, layer) for layer in range(self.layers)]
        positions = None
        stock_positions = self._model.pos_embed
        if self._extrapolation is not None and self._extrapolation.moves(_sides(self._grid)):
            positions = FittedPositions(stock_positions, self._extrapolation, self._grid)
        trained = None
        if self._extrapolation is not None and self._extrapolation.proportional_attention:
            trained = math.prod(self._extrapolation.trained_grid)
        call = _Calls(
            self._grid, self._attentions, processors, self._choose_preparation, run, observer, positions, trained
        )
        handles = []
        try:
            if positions is not None:
                self._model.pos_embed = positions
            for attention, processor in zip(self._attentions, processors, strict=True):
                attention.set_processor(processor)
            before: Any = call.before
            after: Any = call.after
            if compiled_in_place:  # such a module's hooks are compiled with it, and these are no tensor code
                before, after = torch.compiler.disable(before), torch.compiler.disable(after)
            handles.append(self._called.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(self._called.register_forward_hook(after))
            with chunking.in_chunks(self._blocks, self.chunking[0]):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for attention, processor in zip(self._attentions, stock, strict=True):
                attention.set_processor(processor)
            self._model.pos_embed = stock_positions


def _check_stock(processor: Any) -> None:
    """Raises BadInput unless attention is as diffusers made it."""
    if isinstance(processor, SpanAttentionProcessor):
        raise BadInput(
            "GRAT is already installed on this transformer: leave the other `with grat_cli.install(...)` first"
        )
    if type(processor) is not FluxAttnProcessor:
        raise BadInput(
            f"the transformer's attention was replaced by {type(processor).__name__} (IP-Adapter, or another tool), "
            "which GRAT does not combine with: unload it first"
        )
    if processor._parallel_config is not None:
        raise BadInput("the transformer splits its sequence over several devices, which GRAT does not support")


class _Calls:
    """The hooks around transformer calls."""

    def __init__(
        self,
        grid: Grid,
        attentions: list[Any],
        processors: list[SpanAttentionProcessor],
        choose_preparation: Callable[[torch.Tensor], bool],
        run: Run,
        observer: CallObserver | None,
        positions: FittedPositions | None,
        trained_image_tokens: int | None,
    ) -> None:
        self._grid, self._attentions, self._processors = grid, attentions, processors
        self._positions, self._trained_image_tokens = positions, trained_image_tokens
        self._choose_preparation = choose_preparation
        self._run, self._observer = run, observer
        self._raster_ids: torch.Tensor | None = None
        self._group_ids: torch.Tensor | None = None
        self._inverse: torch.Tensor | None = None

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook: checks the call, hands out plans, and puts image tokens in group order."""
        call = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        _check_extras(call)
        for attention, processor in zip(self._attentions, self._processors, strict=True):
            if attention.processor is not processor:
                raise BadInput(
                    "attention processors were replaced inside `with grat_cli.install(...)`: do that outside"
                )
        hidden_states, image_ids = call["hidden_states"], call["img_ids"]
        step = self._run.current_step()
        schedule = self._run.schedule(call["encoder_hidden_states"].shape[1])
        fused = self._choose_preparation(hidden_states)
        if self._observer:
            self._observer.begin_call(step, schedule.density_of_step(step))
        for layer, processor in enumerate(self._processors):
            processor.plan, processor.fused = schedule.plan(step, layer), fused
            processor.scaling = self._scaling(processor.plan, hidden_states.device)

        # All plans of a schedule share one token order.
        order, self._inverse, _ = self._processors[0].plan.tensors(hidden_states.device)
        if image_ids is not self._raster_ids:
            self._group_ids = self._exact_ids(hidden_states, image_ids)[order]
            self._raster_ids = image_ids
        call["hidden_states"] = hidden_states.index_select(1, order)
        call["img_ids"] = self._group_ids
        if self._positions is not None:
            self._positions.prepare(order, schedule.plan(step, 0).text_len, call["timestep"], step)
        return (), call

    def after(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: puts the prediction back in raster order."""
        assert self._inverse is not None
        if isinstance(output, Transformer2DModelOutput):
            result = replace(output, sample=output.sample.index_select(1, self._inverse))
        else:
            result = (output[0].index_select(1, self._inverse), *output[1:])
        if self._observer:
            self._observer.end_call()
        return result

    def _scaling(self, plan: Plan | HeadPlan, device: torch.device) -> Scaling:
        """Proportional attention; made once for each plan and device."""
        if self._trained_image_tokens is None:
            return Scaling()
        trained = self._trained_image_tokens + plan.text_len

        def build() -> Scaling:
            of_class = np.stack([query_scale(member, trained) for member in plan.classes], axis=1)
            factors = of_class[:, plan.class_of_head] if isinstance(plan, HeadPlan) else of_class
            if (factors == factors[0, 0]).all():
                return Scaling(float(factors[0, 0]))
            return Scaling(1.0, torch.from_numpy(factors).float().to(device)[:, :, None])

        return plan.cached(("scaling", trained, device), build)

    def _exact_ids(self, hidden_states: torch.Tensor, image_ids: torch.Tensor) -> torch.Tensor:
        """Raster positions `[tokens, 3]` (0, row, column) in fp32, checked against those of the call.

        Pipelines make positions in the model's dtype, and bf16 holds integers up to 256 only: beyond 4096 pixels
        a side, neighbouring columns would share a position. The comparison waits for the device, but a pipeline
        makes one tensor of positions for all of its steps, and each tensor is compared once.

        Raises:
            BadInput: if they are not those of the grid.
        """
        rows, columns = self._grid.shape
        count = image_ids.shape[-2]
        if count != self._grid.tokens or hidden_states.shape[1] != self._grid.tokens:
            raise BadInput(
                f"GRAT was installed for {rows}x{columns} = {self._grid.tokens} image tokens, the call has "
                f"{hidden_states.shape[1]}: give the pipeline call the height and width of the install "
                "(image tokens of references or controls, as in Kontext, are not supported)"
            )
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        exact = torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float().to(image_ids.device)
        given = image_ids[0] if image_ids.dim() == 3 else image_ids
        if not torch.equal(given, exact.to(given.dtype)):
            raise BadInput(
                f"the call's image positions are not those of the {rows}x{columns} grid that GRAT was installed for: "
                "give the pipeline call the height and width of the install, in this order"
            )
        return exact


class FittedPositions(torch.nn.Module):
    """Stands in for the transformer's `pos_embed`, with frequencies fitted to a larger grid than it was trained on.

    Angles are worked out per row and per column, in float64 as in stock, and handed to the tokens; nothing waits for
    the device.
    """

    def __init__(self, stock: Any, extrapolation: Extrapolation, grid: Grid) -> None:
        """Prepares.

        Args:
            stock: the transformer's `FluxPosEmbed`.
            extrapolation: how frequencies are fitted.
            grid: rows and columns of image tokens.
        """
        super().__init__()
        self._stock, self._extrapolation, self._sides = stock, extrapolation, _sides(grid)
        self._made_for: tuple[Any, ...] = ()
        self._cosines = self._sines = torch.empty(0)

    def prepare(self, order: torch.Tensor, text_len: int, timestep: torch.Tensor, step: int) -> None:
        """Makes the tables of the image tokens for a call, unless the last ones serve.

        Args:
            order: raster index of each image token in the order of the call.
            text_len: text tokens before them, whose rows are left open.
            timestep: of the call, `[B]`, from 1 in noise to 0; one for all.
            step: its number; positions that depend on time are made anew at each.
        """
        wanted = (order.data_ptr(), order.device, text_len, step if self._extrapolation.positions == "dype" else None)
        if self._made_for == wanted:
            return
        idle, *turning = self._stock.axes_dim  # the first axis is 0 for all tokens
        unturned = torch.ones(self._sides[0] * self._sides[1], idle, device=order.device)
        cosines, sines = [unturned], [torch.zeros_like(unturned)]
        dtype = maybe_adjust_dtype_for_device(torch.float64, order.device)
        places = order // self._sides[1], order % self._sides[1]
        ratios = self._extrapolation.ratios(self._sides)
        for axis, (channels, place) in enumerate(zip(turning, places, strict=True)):
            turns = frequencies(
                channels,
                self._stock.theta,
                self._extrapolation.positions if ratios[axis] > 1 else "none",
                self._extrapolation.trained_grid[axis],
                ratios[axis],
                timestep[0],
                device=order.device,
                dtype=dtype,
            )
            angles = torch.outer(torch.arange(self._sides[axis], dtype=dtype, device=order.device), turns)
            cosines.append(angles.cos().float().repeat_interleave(2, dim=1)[place])
            sines.append(angles.sin().float().repeat_interleave(2, dim=1)[place])
        text = torch.empty(text_len, sum(self._stock.axes_dim), device=order.device)
        self._cosines, self._sines = (torch.cat([text, torch.cat(parts, dim=1)]) for parts in (cosines, sines))
        self._made_for = wanted

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[text + image, D]` fp32 for positions `[text + image, 3]`, those of text as in stock."""
        text_len = self._made_for[2]
        # The tables are large, 1 GB at a million tokens: the rows of the text are filled in, the rest stays.
        self._cosines[:text_len], self._sines[:text_len] = self._stock(ids[:text_len])
        return self._cosines, self._sines


def _sides(grid: Grid) -> tuple[int, int]:
    rows, columns = grid.shape
    return rows, columns


def _check_extras(call: dict[str, Any]) -> None:
    """Raises BadInput for inputs that carry image tokens in an order of their own."""
    if call.get("controlnet_block_samples") is not None or call.get("controlnet_single_block_samples") is not None:
        raise BadInput("ControlNet is not supported: its residuals are in raster order, the tokens are in group order")
    # `scale` is LoRA's, and changes no token order.
    extras = sorted(set(call.get("joint_attention_kwargs") or {}) - {"scale"})
    if extras:
        raise BadInput(
            f"attention arguments {', '.join(extras)} are not supported (IP-Adapter among them): leave them out"
        )
