"""HunyuanVideo: joint sequence [video, text], three grid axes, double blocks first, then single blocks.

Everything in the transformer but attention acts on each token alone. So video tokens are put in group order where they
leave the patch embedding, their positions where they leave the rotary embedding, and the prediction is put back in
raster order where it leaves the output projection; in between only the attention processors differ from stock (read
against diffusers 0.42.1, `transformer_hunyuan_video.py`). The refiner, which sees text alone, stays as it is.

Stock attention runs over all padding of the text, under a mask that keeps torch from its fastest kernels. Padding
changes no prediction, so the text is cut to its longest valid length before the transformer sees it.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoTransformer3DModel,
)

from grat_cli.attention import chunking, preparation
from grat_cli.attention.adapter import AttentionInputs, CallObserver, Run
from grat_cli.errors import BadInput
from grat_cli.presets.schema import ChunkTokens
from grat_kernels import Backend, Grid, HeadPlan, Plan, span_attention
from grat_kernels.rope_norm import Joined, Projections

_PARAMETERS = tuple(inspect.signature(HunyuanVideoTransformer3DModel.forward).parameters)[1:]


class SpanAttentionProcessor:
    """Stock HunyuanVideo attention, with span attention in place of dense attention.

    Attributes:
        plan: what attends what in the next call; the adapter sets it before every transformer call.
        text_valid: valid text tokens of each sample `[B]` in the next call, None where all are valid.
        fused: whether norms, rotation, joining of video and text, and far-field means are one kernel; likewise.
    """

    plan: Plan | HeadPlan
    text_valid: torch.Tensor | None
    fused: bool

    def __init__(self, backend: Backend, observer: CallObserver | None, layer: int) -> None:
        self.backend, self.layer = backend, layer
        self.observed = observer.attention if observer else nullcontext

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one block.

        Args:
            attn: the block's attention module.
            hidden_states: video tokens `[B, video, C]` in group order.
            encoder_hidden_states: text tokens `[B, text, C]`.
            attention_mask: which text is valid, as the transformer makes it; `text_valid` says the same.
            image_rotary_emb: a pair, cosines and sines `[video, D]` in group order; text is not rotated.

        Returns:
            Video and text tokens.
        """
        video = _project(attn.to_q, attn.to_k, attn.to_v, attn, hidden_states)
        if attn.add_q_proj is None:  # a single block: text goes through the weights of the video
            text = _project(attn.to_q, attn.to_k, attn.to_v, attn, encoder_hidden_states)
        else:
            text = _project(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn, encoder_hidden_states)
        if self.fused:
            query, key, value, summaries = preparation.at_once(attn, video, text, image_rotary_emb, self.plan)
        else:
            query, key, value, summaries = _prepared_as_stock(attn, video, text, image_rotary_emb)
        del video, text  # else the projections would be kept for as long as attention runs

        scale = query.shape[-1] ** -0.5
        inputs = AttentionInputs(self.layer, query, key, value, self.plan, scale, self.text_valid, summaries)
        with self.observed(inputs):
            attended = span_attention(
                query, key, value, self.plan, self.text_valid, scale, self.backend, summaries=summaries
            )
        video, text = attended.flatten(2, 3).tensor_split([hidden_states.shape[1]], dim=1)
        if getattr(attn, "to_out", None) is not None:
            projection, dropout = cast(Any, attn.to_out)
            video = dropout(projection(video))
        if getattr(attn, "to_add_out", None) is not None:
            text = cast(Any, attn.to_add_out)(text)
        return video, text


def _prepared_as_stock(attn: Attention, video: Projections, text: Projections, image_rotary_emb: Any) -> Joined:
    """The joint sequence, normalised and rotated by the modules and functions of stock attention."""
    single = attn.add_q_proj is None
    text_norms = (attn.norm_q, attn.norm_k) if single else (attn.norm_added_q, attn.norm_added_k)
    query = _rotated(_normed(attn.norm_q, video.query), image_rotary_emb)
    key = _rotated(_normed(attn.norm_k, video.key), image_rotary_emb)
    return Joined(
        torch.cat([query, _normed(text_norms[0], text.query)], dim=1),
        torch.cat([key, _normed(text_norms[1], text.key)], dim=1),
        torch.cat([video.value, text.value], dim=1),
        None,
    )


def _project(to_query: Any, to_key: Any, to_value: Any, attn: Attention, tokens: torch.Tensor) -> Projections:
    """Query, key and value, `[B, N, H, D]` each."""
    return Projections(*(project(tokens).unflatten(2, (attn.heads, -1)) for project in (to_query, to_key, to_value)))


def _normed(norm: Any, tokens: torch.Tensor) -> torch.Tensor:
    return tokens if norm is None else norm(tokens)


def _rotated(tokens: torch.Tensor, image_rotary_emb: Any) -> torch.Tensor:
    """Queries or keys of the video `[B, N, H, D]` with their positions rotated in."""
    return cast(torch.Tensor, apply_rotary_emb(tokens, image_rotary_emb, sequence_dim=1))


class HunyuanAdapter:
    """Runs a `HunyuanVideoTransformer3DModel` on video tokens in group order; an `adapters.base.Adapter`."""

    text_first = False
    preparation: str | None = None
    chunking: tuple[int | None, str] = None, "not attached yet"

    def __init__(
        self, transformer: torch.nn.Module, grid: Grid, fused: bool | None = None, chunk_tokens: ChunkTokens = "auto"
    ) -> None:
        """Prepares, and changes nothing yet.

        Args:
            transformer: the model; one that `torch.compile` made is refused when it is attached.
            grid: frames, rows and columns of video tokens of the calls to come.
            fused: whether norms, rotation and joining before attention are one kernel, and calls that it cannot serve
                are refused; by default, wherever it can run on a GPU. `preparation` tells.
            chunk_tokens: see `preset_schema.Memory`. `chunking` tells.
        """
        self._fused = fused
        self._chunk_tokens: ChunkTokens = chunk_tokens
        self._model: Any = transformer
        self._grid = grid
        model: Any = getattr(transformer, "_orig_mod", transformer)
        self._blocks: list[Any] = [*model.transformer_blocks, *model.single_transformer_blocks]

    @property
    def layers(self) -> int:
        """Attention layers: double blocks, then single blocks."""
        return len(self._blocks)

    @property
    def heads(self) -> int:
        """Heads of each."""
        return self._blocks[0].attn.heads

    def _choose_preparation(self, hidden_states: torch.Tensor) -> bool:
        """Whether the fused kernel prepares a call with these latents; says why in `preparation`.

        Raises:
            BadInput: if the fused kernel was asked for and cannot run.
        """
        attentions = [block.attn for block in self._blocks]
        fused, self.preparation = preparation.choose(self._fused, attentions, RMSNorm, hidden_states)
        return fused

    @contextmanager
    def attached(self, run: Run, backend: Backend, observer: CallObserver | None = None) -> Iterator[None]:
        """See `adapters.base.Adapter.attached`."""
        self._refuse_unfit()
        self.chunking = chunking.choose(self._chunk_tokens, self._grid.tokens, self._blocks, compiled=False)
        attentions = [block.attn for block in self._blocks]
        stock = [attention.processor for attention in attentions]
        processors = [SpanAttentionProcessor(backend, observer, layer) for layer in range(self.layers)]
        call = _Calls(self._model, self._grid, attentions, processors, self._choose_preparation, run, observer)
        handles = []
        try:
            for attention, processor in zip(attentions, processors, strict=True):
                attention.set_processor(processor)
            handles.append(self._model.register_forward_pre_hook(call.before, with_kwargs=True))
            handles.append(self._model.rope.register_forward_hook(call.order_positions))
            handles.append(self._model.x_embedder.register_forward_hook(call.order_tokens))
            handles.append(self._model.proj_out.register_forward_hook(call.restore_raster))
            handles.append(self._model.register_forward_hook(call.after))
            with chunking.in_chunks(self._blocks, self.chunking[0]):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for attention, processor in zip(attentions, stock, strict=True):
                attention.set_processor(processor)

    def _refuse_unfit(self) -> None:
        """Raises BadInput unless the transformer is as diffusers made it, and of a kind that is supported."""
        if hasattr(self._model, "_orig_mod") or any(
            module._compiled_call_impl is not None for module in (self._model, *self._blocks)
        ):
            raise BadInput("GRAT inside a compiled HunyuanVideo transformer is not supported: leave torch.compile out")
        kind = type(self._model)
        if not issubclass(kind, HunyuanVideoTransformer3DModel):
            raise BadInput(
                f"the transformer is a {kind.__name__}, and GRAT knows HunyuanVideoTransformer3DModel: "
                "use a pipeline of HunyuanVideo, text-to-video"
            )
        if self._model.config.image_condition_type == "token_replace":
            raise BadInput(
                "image-to-video by token replacement treats the first frame's tokens apart, "
                "which GRAT does not support: use a model with latent_concat, or text-to-video"
            )
        for block in self._blocks:
            processor = block.attn.processor
            if isinstance(processor, SpanAttentionProcessor):
                raise BadInput(
                    "GRAT is already installed on this transformer: leave the other `with` block of its adapter first"
                )
            if type(processor) is not HunyuanVideoAttnProcessor2_0:
                raise BadInput(
                    f"the transformer's attention was replaced by {type(processor).__name__}, "
                    "which GRAT does not combine with: undo that first"
                )
            if processor._parallel_config is not None:
                raise BadInput("the transformer splits its sequence over several devices, which GRAT does not support")


class _Text(NamedTuple):
    """A text: its mask `[B, text]`, its longest valid length, and where they differ its valid lengths `[B]`."""

    mask: torch.Tensor
    longest: int
    valid: torch.Tensor | None


class _Calls:
    """The hooks around and inside transformer calls."""

    def __init__(
        self,
        model: Any,
        grid: Grid,
        attentions: list[Any],
        processors: list[SpanAttentionProcessor],
        choose_preparation: Callable[[torch.Tensor], bool],
        run: Run,
        observer: CallObserver | None,
    ) -> None:
        self._model, self._grid = model, grid
        self._attentions, self._processors = attentions, processors
        self._choose_preparation = choose_preparation
        self._run, self._observer = run, observer
        self._texts: deque[_Text] = deque(maxlen=2)
        self._order: torch.Tensor | None = None
        self._inverse: torch.Tensor | None = None

    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook of the transformer: checks the call, cuts padding off the text, and hands out plans."""
        call = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
        for attention, processor in zip(self._attentions, self._processors, strict=True):
            if attention.processor is not processor:
                raise BadInput("attention processors were replaced while GRAT was installed: do that outside")
        self._check_size(call["hidden_states"])
        text = self._text(call["encoder_attention_mask"])
        call["encoder_hidden_states"] = call["encoder_hidden_states"][:, : text.longest]
        call["encoder_attention_mask"] = call["encoder_attention_mask"][:, : text.longest]

        step = self._run.current_step()
        schedule = self._run.schedule(text.longest)
        fused = self._choose_preparation(call["hidden_states"])
        if self._observer:
            self._observer.begin_call(step, schedule.density_of_step(step))
        for layer, processor in enumerate(self._processors):
            processor.plan, processor.text_valid = schedule.plan(step, layer), text.valid
            processor.fused = fused
        # All plans of a schedule share one token order.
        self._order, self._inverse, _ = self._processors[0].plan.tensors(call["hidden_states"].device)
        return (), call

    def order_positions(self, module: torch.nn.Module, args: Any, output: Any) -> tuple[torch.Tensor, ...]:
        """Hook after the rotary embedding: cosines and sines `[video, D]` in group order."""
        assert self._order is not None
        return tuple(part.index_select(0, self._order) for part in output)

    def order_tokens(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Hook after the patch embedding: video tokens `[B, video, C]` in group order."""
        assert self._order is not None
        return output.index_select(1, self._order)

    def restore_raster(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Hook after the output projection: the prediction `[B, video, patch]` in raster order."""
        assert self._inverse is not None
        return output.index_select(1, self._inverse)

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the transformer."""
        if self._observer:
            self._observer.end_call()

    def _check_size(self, latents: torch.Tensor) -> None:
        """Raises BadInput unless latents `[B, C, frames, height, width]` are those of the grid."""
        config = self._model.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        shape = tuple(size // side for size, side in zip(latents.shape[2:], patch, strict=True))
        if shape != self._grid.shape:
            installed, given = ("x".join(map(str, sizes)) for sizes in (self._grid.shape, shape))
            raise BadInput(
                f"GRAT was installed for {installed} video tokens (frames x rows x columns), the call has {given}: "
                "give the pipeline call the frames, height and width of the install"
            )

    def _text(self, mask: torch.Tensor) -> _Text:
        """The valid lengths of a text, from its mask `[B, text]`.

        That waits for the device, but a pipeline makes one mask for all of its steps, or with classifier-free guidance
        two that take turns, and each is read once.

        Raises:
            BadInput: if valid text does not come first, or there is none.
        """
        for known in self._texts:
            if known.mask is mask:
                return known
        valid = mask.sum(dim=1, dtype=torch.int32)
        first = torch.arange(mask.shape[1], device=mask.device)[None, :] < valid[:, None]
        lengths = valid.tolist()
        if not torch.equal(first, mask.bool()) or min(lengths) == 0:
            raise BadInput(
                "the call's text mask has padding before or between valid tokens, or no valid token: "
                "pad prompts at their end, as the pipeline does"
            )
        longest = max(lengths)
        text = _Text(mask, longest, valid if min(lengths) < longest else None)
        self._texts.append(text)
        return text
