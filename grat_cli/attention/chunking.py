"""Transformer blocks that take their tokens in chunks, so that wide intermediate results never exist for all tokens.

Everything in a block but attention acts on each token alone. Feed-forward layers are four times as wide as the tokens,
and single blocks join them with the attention's output: 15,360 channels in Flux, 8 GB at 8192x8192 in bf16. Here only
tokens, the input of attention and its output exist for all tokens; modulation, feed-forward and projections are done
chunk by chunk, by the modules of the block. What comes before and after the blocks is no larger than they are.

Chunks change no bit of the result on a CPU: each row of a matrix product is the same for any number of rows but one,
which another routine computes (torch 2.13 with MKL and oneDNN, fp32 and bf16, widths of Flux; 8 to 1,536 rows). On
CUDA devices the library may take another kernel for another number of rows, which may round differently.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeAlias

import torch

from grat_cli.errors import BadInput
from grat_cli.presets.schema import ChunkTokens, chunk_for

_LARGEST_FP16 = 65504

# Makes the forward of a block in chunks of at most so many tokens.
Forward: TypeAlias = Callable[[Any, int], Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor]]]


def choose(
    wanted: ChunkTokens, tokens: int, blocks: Sequence[Any], forwards: Mapping[type, Forward], *, compiled: bool
) -> tuple[int | None, str]:
    """How many tokens a chunk has at most, None for all at once; and in words why.

    Args:
        wanted: so many, None for all at once, or `auto` for chunks where there are many tokens and blocks allow it.
        tokens: image tokens of the calls to come.
        blocks: of the transformer.
        forwards: by class of block, those that can run in chunks.
        compiled: whether `torch.compile` made something of them.

    Raises:
        BadInput: if chunks of a certain size are wanted and cannot be.
    """
    chunk = chunk_for(wanted, tokens)
    if chunk is None:
        return None, "not wanted" if wanted is None else f"{tokens:,} tokens are few"
    obstacle = "the transformer is compiled" if compiled else None
    obstacle = obstacle or next(filter(None, (_obstacle(block, forwards) for block in blocks)), None)
    if obstacle is None:
        return chunk, "chosen by number" if wanted != "auto" else f"{tokens:,} tokens are many"
    if wanted != "auto":
        raise BadInput(f"the transformer cannot run in chunks of tokens: {obstacle}; set memory.chunk_tokens=null")
    return None, obstacle


@contextmanager
def in_chunks(blocks: Sequence[Any], forwards: Mapping[type, Forward], chunk: int | None) -> Iterator[None]:
    """While inside, blocks run in chunks of at most so many tokens; leaving restores them exactly.

    Args:
        blocks: that `choose` found fit.
        forwards: likewise.
        chunk: None changes nothing.
    """
    made: list[tuple[Any, Any, bool]] = []
    try:
        if chunk is not None:
            for block in blocks:
                holder, name = _own_forward(block)
                forward = forwards[type(block)](block, chunk)
                made.append((block, forward, "forward" in vars(block)))
                setattr(holder, name, forward)
        yield
    finally:
        for block, forward, had_own in reversed(made):
            _restore(block, forward, had_own)


def _places(block: Any) -> list[tuple[Any, str]]:
    """Where a block's own forward may be kept: beneath hooks of diffusers, beneath those of accelerate, in itself."""
    registry = getattr(block, "_diffusers_hook", None)
    places: list[tuple[Any, str]] = []
    for reference in registry._fn_refs if registry is not None else ():
        # Hooks that take the place of a forward keep it apart.
        places.append((reference, "forward" if reference.original_forward is None else "original_forward"))
    if "_old_forward" in vars(block):
        places.append((block, "_old_forward"))
    return [*places, (block, "forward")]


def _own_forward(block: Any) -> tuple[Any, str]:
    """Where a block's own forward is kept, beneath the hooks of offloading and of caches, which go on around it."""
    places = _places(block)
    own = type(block).forward
    return next((place for place in places if getattr(getattr(*place), "__func__", None) is own), places[0])


def _restore(block: Any, forward: Any, had_own: bool) -> None:
    """Puts a block's own forward back, wherever the one in chunks has got to: hooks may have come and gone meanwhile.

    Args:
        block: as `in_chunks` left it.
        forward: in chunks.
        had_own: whether the block had a forward beside its class's before.
    """
    for holder, name in _places(block):
        if getattr(holder, name) is forward:
            if holder is block and name == "forward" and not had_own:
                del block.forward
            else:
                setattr(holder, name, type(block).forward.__get__(block))


def _obstacle(block: Any, forwards: Mapping[type, Forward]) -> str | None:
    """Why a block cannot run in chunks, or None."""
    kind = type(block)
    if kind not in forwards:
        return f"it has blocks of {kind.__name__}"
    holder, name = _own_forward(block)
    if getattr(getattr(holder, name), "__func__", None) is not kind.forward:
        return f"another tool replaced the forward of its {kind.__name__}"
    norms = [getattr(block, name) for name in ("norm", "norm1", "norm1_context") if hasattr(block, name)]
    for norm in norms:
        is_stock = type(norm).__module__.startswith(("diffusers.", "torch.nn.")) and "Norm" in type(norm).__name__
        if not is_stock or getattr(norm, "emb", None) is not None:
            return f"another tool replaced a norm of its {kind.__name__}"
    return None


def spans(tokens: int, chunk: int) -> list[slice]:
    """Chunks of at most so many tokens, as equal as can be, so that none is a row of its own."""
    count = max(1, -(-tokens // chunk))
    bounds = [index * tokens // count for index in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def by_chunks(function: Callable[..., torch.Tensor], chunk: int, *tensors: torch.Tensor) -> torch.Tensor:
    """What a function of tokens `[B, N, C]` makes of them, `[B, N, C]`, computed in chunks."""
    cuts = spans(tensors[0].shape[1], chunk)
    if len(cuts) == 1:
        return function(*tensors)
    joined: torch.Tensor | None = None
    for cut in cuts:
        made = function(*(tensor[:, cut] for tensor in tensors))
        if joined is None:
            joined = made.new_empty(made.shape[0], tensors[0].shape[1], made.shape[2])
        joined[:, cut] = made
    assert joined is not None
    return joined


def _modulation(norm: Any, emb: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """Shifts, scales and gates `[B, 1, C]` of an adaptive norm."""
    return tuple(part[:, None] for part in norm.linear(norm.silu(emb)).chunk(parts, dim=1))


def double_block(
    block: Any,
    chunk: int,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    modulations: Sequence[Sequence[torch.Tensor]],
    attend: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """A double block.

    Args:
        block: its modules.
        chunk: most tokens of a chunk.
        hidden_states: image tokens `[B, image, C]`.
        encoder_hidden_states: text tokens `[B, text, C]`.
        modulations: of image and of text: shift, scale and gate `[B, 1, C]` of attention, and those of feed-forward.
        attend: attention of normalised image and text tokens.

    Returns:
        Image and text tokens.
    """
    streams = (
        (hidden_states, block.norm1, block.norm2, block.ff),
        (encoder_hidden_states, block.norm1_context, block.norm2_context, block.ff_context),
    )
    normed = []
    for (tokens, norm, _, _), (shift, scale, *_) in zip(streams, modulations, strict=True):
        normed.append(by_chunks(modulated(getattr(norm, "norm", norm), shift, scale), chunk, tokens))
    attended = attend(normed.pop(0), normed.pop(0))

    made = []
    for (tokens, _, norm, feed_forward), (_, _, attention_gate, shift, scale, gate), attention in zip(
        streams, modulations, attended, strict=True
    ):
        of_rest = modulated(norm, shift, scale)

        def rest(
            tokens: torch.Tensor,
            attention: torch.Tensor,
            of_rest: Any = of_rest,
            feed_forward: Any = feed_forward,
            attention_gate: torch.Tensor = attention_gate,
            gate: torch.Tensor = gate,
        ) -> torch.Tensor:
            tokens = tokens + attention_gate * attention
            return tokens + gate * feed_forward(of_rest(tokens))

        made.append(by_chunks(rest, chunk, tokens, attention))
    image, text = made
    return image, text


def _single(
    block: Any,
    chunk: int,
    tokens: torch.Tensor,
    temb: torch.Tensor,
    attend: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A single block on joint tokens `[B, N, C]`.

    `temb`, `[B, C]`, is what modulation is made of; other arguments are those of `double_block`.
    """
    shift, scale, gate = _modulation(block.norm, temb, 3)
    normed = modulated(block.norm.norm, shift, scale)
    attended = attend(by_chunks(normed, chunk, tokens))

    def rest(tokens: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        wide = block.act_mlp(block.proj_mlp(normed(tokens)))
        return tokens + gate * block.proj_out(torch.cat([attended, wide], dim=2))

    return by_chunks(rest, chunk, tokens, attended)


def modulated(norm: Any, shift: torch.Tensor, scale: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A norm of tokens `[B, N, C]` with shift and scale `[B, 1, C]` after it."""
    return lambda tokens: norm(tokens) * (1 + scale) + shift


def joint_block(
    handed_on: Callable[[Mapping[str, Any]], dict[str, Any]], *, text_first: bool, joined: bool, clipped: bool
) -> Forward:
    """What makes forwards of double and single blocks with joint attention.

    Args:
        handed_on: arguments of attention beside tokens, from those that the block is given by name.
        text_first: whether text comes first in the joint tokens of single blocks, and in what all blocks return.
        joined: whether attention of single blocks takes and returns joint tokens, rather than image and text apart.
        clipped: whether text of double blocks and tokens of single ones end within the range of fp16.
    """

    def pair(image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (text, image) if text_first else (image, text)

    def clip(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.clip(-_LARGEST_FP16, _LARGEST_FP16) if clipped and tokens.dtype == torch.float16 else tokens

    def make(block: Any, chunk: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        signature = inspect.signature(type(block).forward)
        is_double = hasattr(block, "norm1")

        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            given = signature.bind(block, *args, **kwargs).arguments
            image, text, temb = (given[name] for name in ("hidden_states", "encoder_hidden_states", "temb"))
            others = handed_on(given)

            def attend(image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return block.attn(hidden_states=image, encoder_hidden_states=text, **others)

            if is_double:
                modulations = [_modulation(norm, temb, 6) for norm in (block.norm1, block.norm1_context)]
                image, text = double_block(block, chunk, image, text, modulations, attend)
                return pair(image, clip(text))

            parts = pair(image, text)
            first = parts[0].shape[1]

            def attend_joint(tokens: torch.Tensor) -> torch.Tensor:
                if joined:
                    return block.attn(hidden_states=tokens, **others)
                image, text = pair(tokens[:, :first], tokens[:, first:])
                return torch.cat(pair(*attend(image, text)), dim=1)

            tokens = clip(_single(block, chunk, torch.cat(parts, dim=1), temb, attend_joint))
            return tokens[:, :first], tokens[:, first:]

        return forward

    return make
