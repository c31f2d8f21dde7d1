"""Blocks that run in chunks of tokens give what they give on all tokens at once, bit by bit, and take less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_flux
import tiny_hunyuan
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks.group_offloading import apply_group_offloading
from torch.utils._python_dispatch import TorchDispatchMode

import grat_cli
from grat_cli.attention.chunking import choose, in_chunks, spans
from grat_cli.errors import BadInput
from grat_cli.families.flux import FluxAdapter
from grat_cli.families.hunyuan import HunyuanAdapter
from grat_cli.presets import load_preset, resolve_preset
from grat_cli.presets.schema import chunk_for
from grat_kernels import Grid

CHUNK = 256
FORWARDS = {
    **FluxAdapter(tiny_flux.transformer(), Grid((1, 1))).chunked_blocks(),
    **HunyuanAdapter(tiny_hunyuan.transformer(), Grid((1, 1, 1))).chunked_blocks(),
}


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def blocks_of(model: Any) -> list[Any]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def flux_inputs(dtype: torch.dtype = torch.float32, batch: int = 1) -> dict[str, Any]:
    inputs = tiny_flux.inputs(25, 31, batch)  # 775 tokens and 6 of text: chunks of 193 to 196
    return {name: value.to(dtype) if name != "return_dict" else value for name, value in inputs.items()}


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 512, 513, 781])
def test_chunks_cover_all_tokens_and_none_is_small(tokens: int) -> None:
    cuts = spans(tokens, CHUNK)
    assert [place for cut in cuts for place in range(cut.start, cut.stop)] == list(range(tokens))
    lengths = [cut.stop - cut.start for cut in cuts]
    assert max(lengths) <= CHUNK
    assert min(lengths) >= min(tokens, CHUNK // 2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flux_in_chunks_is_the_same_bit_by_bit(dtype: torch.dtype, batch: int) -> None:
    model: Any = tiny_flux.transformer()
    model.to(dtype)
    inputs = flux_inputs(dtype, batch)
    stock = model(**inputs)[0]
    with in_chunks(blocks_of(model), FORWARDS, CHUNK):
        assert torch.equal(model(**inputs)[0], stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hunyuan_in_chunks_is_the_same_bit_by_bit(dtype: torch.dtype) -> None:
    model: Any = tiny_hunyuan.transformer()
    model.to(dtype)
    inputs = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in tiny_hunyuan.inputs((3, 12, 17)).items()
    }
    stock = model(**inputs)[0]
    with in_chunks(blocks_of(model), FORWARDS, CHUNK):
        assert torch.equal(model(**inputs)[0], stock)


@pytest.mark.parametrize("rows", [128, 181, 256, 1000, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_products_do_not_depend_on_how_many_there_are(dtype: torch.dtype, rows: int) -> None:
    """What bit-by-bit equality rests on, at the widths of Flux; `128` is the least that chunks of 256 come to."""
    for width, made in ((3072, 1024), (15360, 256)):
        torch.manual_seed(0)
        layer, tokens = torch.nn.Linear(width, made).to(dtype), torch.randn(1, 1061, width).to(dtype)
        whole = layer(tokens)
        for start in (0, 37, 1061 - rows):
            assert torch.equal(layer(tokens[:, start : start + rows]), whole[:, start : start + rows])


class _LargestResult(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            # A view makes nothing new.
            if isinstance(tensor, torch.Tensor) and tensor._base is None and function.overloadpacket not in _VIEWS:
                self.numbers = max(self.numbers, tensor.numel())
        return made


_VIEWS = {getattr(torch.ops.aten, name) for name in ("t", "view", "slice", "split", "unbind", "_unsafe_view", "expand")}


def test_nothing_wider_than_a_token_exists_for_all_tokens() -> None:
    model, inputs = tiny_flux.transformer(), flux_inputs()
    blocks = blocks_of(model)
    for block in blocks:
        # Attention is not in question, and its stock form makes a matrix of all pairs on a CPU.
        block.attn.forward = lambda hidden_states, encoder_hidden_states=None, **others: (
            hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)
        )
    tokens = 775 + tiny_flux.TEXT_TOKENS
    with _LargestResult() as stock:
        model(**inputs)
    with in_chunks(blocks, FORWARDS, CHUNK), _LargestResult() as chunked:
        model(**inputs)
    assert stock.numbers == tokens * 5 * model.inner_dim
    longest = max(cut.stop - cut.start for cut in spans(tokens, CHUNK))
    assert chunked.numbers == max(tokens, longest * 5) * model.inner_dim


def _sequential(model: Any) -> Callable[[], Any]:
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    return lambda: remove_hook_from_module(model, recurse=True)


def _groups(kind: str) -> Callable[[Any], Callable[[], Any]]:
    def apply(model: Any) -> Callable[[], Any]:
        apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), kind, num_blocks_per_group=1)
        return lambda: None

    return apply


@pytest.mark.parametrize("offload", [_sequential, _groups("block_level"), _groups("leaf_level")])
def test_hooks_of_offloading_go_on_around_chunks(offload: Callable[[Any], Callable[[], Any]]) -> None:
    model, inputs = tiny_flux.transformer(), flux_inputs()
    stock = model(**inputs)[0]
    remove = offload(model)
    called: list[Any] = []
    for block in blocks_of(model):
        registry = getattr(block, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry else ():
            hook.group.onload_ = lambda block=block: called.append(block)
    before = [dict(vars(block)) for block in blocks_of(model)]
    with in_chunks(blocks_of(model), FORWARDS, CHUNK):
        assert torch.equal(model(**inputs)[0], stock)
    assert [dict(vars(block)) for block in blocks_of(model)] == before
    if hasattr(model.transformer_blocks[0], "_diffusers_hook"):
        assert {id(block) for block in called} == {id(block) for block in blocks_of(model)}
    remove()
    assert torch.equal(model(**inputs)[0], stock)


@pytest.mark.parametrize("offload", [lambda model: None, _sequential, _groups("block_level"), _groups("leaf_level")])
def test_a_pipeline_with_grat_gives_the_same_picture_in_chunks_and_offloaded(offload: Callable[[Any], Any]) -> None:
    def latents(pipe: Any, chunk_tokens: Any) -> tuple[torch.Tensor, Any]:
        generator = torch.Generator().manual_seed(0)
        with grat_cli.install(pipe, "demo-far", height=200, width=248, chunk_tokens=chunk_tokens) as installation:
            made = pipe(
                **tiny_flux.prompt(),
                height=200,
                width=248,
                num_inference_steps=2,
                generator=generator,
                output_type="latent",
            )
        return made.images, installation.chunking

    plain = tiny_flux.pipeline()
    expected, chunking = latents(plain, "auto")
    assert chunking == (None, "775 tokens are few")
    pipe = tiny_flux.pipeline()
    for part in (pipe.vae, pipe.transformer):
        offload(part)
    made, chunking = latents(pipe, CHUNK)
    assert chunking == (CHUNK, "chosen by number")
    assert torch.equal(made, expected)


def test_leaving_restores_the_blocks_also_after_an_exception() -> None:
    model = tiny_flux.transformer()
    before = [dict(vars(block)) for block in blocks_of(model)]

    def fail() -> None:
        with in_chunks(blocks_of(model), FORWARDS, CHUNK):
            assert all("forward" in vars(block) for block in blocks_of(model))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert [dict(vars(block)) for block in blocks_of(model)] == before


def test_chunks_come_by_themselves_where_there_are_many_tokens() -> None:
    blocks = blocks_of(tiny_flux.transformer())
    assert choose("auto", 32_768, blocks, FORWARDS, compiled=False) == (None, "32,768 tokens are few")
    assert choose("auto", 32_769, blocks, FORWARDS, compiled=False) == (16_384, "32,769 tokens are many")
    assert choose("auto", 40_000, blocks, FORWARDS, compiled=True) == (None, "the transformer is compiled")
    assert choose(None, 40_000, blocks, FORWARDS, compiled=False) == (None, "not wanted")
    assert chunk_for("auto", 262_144) == 16_384


def test_what_cannot_run_in_chunks_is_refused() -> None:
    blocks = blocks_of(tiny_flux.transformer())
    with pytest.raises(BadInput, match=r"is compiled; set memory\.chunk_tokens=null"):
        choose(CHUNK, 100, blocks, FORWARDS, compiled=True)
    with pytest.raises(BadInput, match="it has blocks of Linear"):
        choose(CHUNK, 100, [torch.nn.Linear(2, 2)], FORWARDS, compiled=False)
    blocks[0].norm1.norm = torch.nn.Identity()
    blocks[0].norm1 = torch.nn.Identity()
    with pytest.raises(BadInput, match="replaced a norm of its FluxTransformerBlock"):
        choose(CHUNK, 100, blocks, FORWARDS, compiled=False)
    blocks[2].forward = lambda *args, **kwargs: None
    with pytest.raises(BadInput, match="replaced the forward of its FluxSingleTransformerBlock"):
        choose(CHUNK, 100, blocks[1:], FORWARDS, compiled=False)
    pipe = tiny_flux.pipeline()
    installed = grat_cli.install(pipe, "demo-x", height=64, width=64, chunk_tokens=12)
    with pytest.raises(BadInput, match="chunk_tokens 12: expected 256 or more"), installed:
        pass


def test_the_preset_says_how_many() -> None:
    assert load_preset("flux-x").memory.chunk_tokens == "auto"
    chosen = resolve_preset(load_preset("flux-x"), set_items=["memory.chunk_tokens=4096"])
    assert chosen.memory.chunk_tokens == 4096
    assert resolve_preset(chosen, set_items=["memory.chunk_tokens=null"]).memory.chunk_tokens is None
    with pytest.raises(BadInput, match="expected auto, null or a whole number from 256 to 1,000,000,000, not 12"):
        resolve_preset(chosen, set_items=["memory.chunk_tokens=12"])
