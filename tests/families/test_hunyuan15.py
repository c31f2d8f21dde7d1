"""HunyuanVideo-1.5 against stock diffusers, with its padding and its mask: full attention, patterns, pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_hunyuan15
import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from flux_runs import NoHostReads, relative_difference
from hunyuan15_runs import (
    LONG,
    QUOTING,
    SHORT,
    SIZE,
    SIZE_OF_PICTURE,
    Run,
    call,
    call_with_picture,
    preset,
    snapshot,
    under_masks,
    unguided,
)
from hunyuan_runs import raster_mask
from operator_names import record_operators
from tiny_hunyuan15 import PICTURE_TOKENS, QUOTED_TOKENS, TEXT_TOKENS
from tracked_memory import track

import grat_cli
from grat_cli.attention.chunking import in_chunks
from grat_cli.errors import BadInput
from grat_cli.families.hunyuan15 import Hunyuan15Adapter
from grat_cli.models.catalogue import KNOWN_MODELS
from grat_kernels import Backend, Block, CrissCross, Far, Full, Grid, Pattern, Union

# Two computations of one fp32 forward pass: sums of a few hundred terms in another order, through two layers.
RELATIVE = 1e-5
# Three steps, each guided six times as far as two predictions differ.
RELATIVE_OF_PIPELINES = 1e-5
GRID = Grid((3, 5, 7))
# Valid tokens of prompts, of what they quote, and whether there is a picture.
TEXTS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, bool]] = {
    "one": ((TEXT_TOKENS,), None, False),
    "padded": ((3,), None, False),
    "quoting": ((4,), (2,), False),
    "two-lengths": ((3, 6), None, False),
    "one-quotes": ((6, 2), (0, 4), False),
    "other-quotes": ((2, 6), (QUOTED_TOKENS, 1), False),
    "picture": ((4,), None, True),
    "picture-two-lengths": ((5, 3), (0, 3), True),
}
of_texts = pytest.mark.parametrize("text", TEXTS)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_hunyuan15.transformer()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_hunyuan15.pipeline()


@pytest.fixture(scope="module")
def picture_pipe() -> Any:
    return tiny_hunyuan15.pipeline(picture=True)


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def inputs_of(text: str, shape: tuple[int, ...] = GRID.shape) -> dict[str, Any]:
    valid, quoted, picture = TEXTS[text]
    return tiny_hunyuan15.inputs(shape, valid, quoted, picture=picture)


# ---- The transformer


@of_texts
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.SDPA])
def test_full_attention_equals_stock_without_its_padding(model: Any, text: str, backend: Backend) -> None:
    inputs = inputs_of(text)
    run = Run(GRID, Full())
    with Hunyuan15Adapter(model, GRID).attached(run, backend):
        result = model(**inputs)[0]
    assert relative_difference(result, model(**inputs)[0]) < RELATIVE
    valid, quoted, picture = TEXTS[text]
    assert run.text_lengths == [max(valid) + max(quoted or (0,)) + PICTURE_TOKENS * picture], "padding takes part"


@pytest.mark.parametrize("shape", [(1, 7, 5), (4, 1, 1), (5, 6, 8)])
def test_full_attention_equals_stock_on_any_grid(model: Any, shape: tuple[int, ...]) -> None:
    inputs = inputs_of("one-quotes", shape)
    with Hunyuan15Adapter(model, Grid(shape)).attached(Run(Grid(shape), Full()), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, model(**inputs)[0]) < RELATIVE


@pytest.mark.parametrize("text", ["one-quotes", "picture-two-lengths"])
def test_full_attention_rounds_no_more_than_stock_in_bfloat16(text: str) -> None:
    exact, rounded = tiny_hunyuan15.transformer(), torch.nn.Module.to(tiny_hunyuan15.transformer(), torch.bfloat16)
    inputs = inputs_of(text)
    expected = exact(**inputs)[0]
    inputs = {name: value.bfloat16() if torch.is_tensor(value) else value for name, value in inputs.items()}
    stock = rounded(**inputs)[0].float()
    with Hunyuan15Adapter(rounded, GRID).attached(Run(GRID, Full()), Backend.SDPA):
        result = rounded(**inputs)[0].float()
    ulp = expected.abs().max() * torch.finfo(torch.bfloat16).eps
    assert (result - expected).abs().max() < 2 * (stock - expected).abs().max() + ulp


@pytest.mark.parametrize(
    ("pattern", "radius", "share"),
    [(Block(1), 1, None), (Block(0), 0, None), (CrissCross(1), None, 1), (CrissCross(2), None, 2)],
)
@pytest.mark.parametrize("text", ["one", "one-quotes", "picture-two-lengths"])
def test_patterns_equal_stock_attention_under_a_mask(
    model: Any, pattern: Pattern, radius: int | None, share: int | None, text: str
) -> None:
    grid = Grid((5, 6, 8))
    inputs = inputs_of(text, grid.shape)
    with under_masks(raster_mask(grid, radius, share)):
        expected = model(**inputs)[0]
    with Hunyuan15Adapter(model, grid).attached(Run(grid, pattern), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE
    assert relative_difference(result, model(**inputs)[0]) > 0.01, "the mask makes no difference: this shows nothing"


def test_each_layer_takes_its_own_plan(model: Any) -> None:
    inputs = inputs_of("one")
    with under_masks(raster_mask(GRID, 0, None), raster_mask(GRID, None, 2)):
        expected = model(**inputs)[0]
    with Hunyuan15Adapter(model, GRID).attached(Run(GRID, Block(0), CrissCross(2)), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE


def test_a_batch_may_change_between_calls_and_arguments_may_go_by_place(model: Any) -> None:
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
    results = {}
    with Hunyuan15Adapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA):
        for text in TEXTS:
            inputs = inputs_of(text)
            places = [inputs.pop(name) for name in names]
            results[text] = model(*places, **inputs | {"return_dict": True}).sample
    for text, result in results.items():
        assert relative_difference(result, model(**inputs_of(text))[0]) < RELATIVE


def test_step_distilled_models_take_the_next_timestep() -> None:
    model = tiny_hunyuan15.transformer(use_meanflow=True)
    inputs = inputs_of("padded") | {"timestep_r": torch.tensor([500.0])}
    with Hunyuan15Adapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, model(**inputs)[0]) < RELATIVE


@pytest.mark.parametrize("pattern", [Full(), Union(Block(0), Far([(0, (1, 3, 3))]))], ids=["full", "far"])
@pytest.mark.parametrize("text", ["one", "one-quotes"])
def test_the_fused_kernel_changes_nothing_but_roundings(model: Any, pattern: Pattern, text: str) -> None:
    """In Triton's interpreter."""
    inputs = inputs_of(text)
    apart, fused = (Hunyuan15Adapter(model, GRID, fused=wanted) for wanted in (False, True))
    with apart.attached(Run(GRID, pattern), Backend.SDPA):
        expected = model(**inputs)[0]
    with fused.attached(Run(GRID, pattern), Backend.SDPA), record_operators() as called:
        result = model(**inputs)[0]
    assert called.count("grat::rope_norm") == tiny_hunyuan15.LAYERS
    assert relative_difference(result, expected) < RELATIVE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_bit(dtype: torch.dtype) -> None:
    model: Any = torch.nn.Module.to(tiny_hunyuan15.transformer(), dtype)
    grid = Grid((6, 10, 12))  # 720 tokens and 7 of text: two and three chunks
    inputs = {
        name: value.to(dtype) if torch.is_tensor(value) else value
        for name, value in inputs_of("one", grid.shape).items()
    }
    adapter = Hunyuan15Adapter(model, grid)
    expected = model(**inputs)[0]
    with in_chunks(adapter.blocks, adapter.chunked_blocks(), 256):
        assert torch.equal(model(**inputs)[0], expected)
    with Hunyuan15Adapter(model, grid, chunk_tokens=256).attached(Run(grid, Full()), Backend.SDPA):
        chunked = model(**inputs)[0]
    with Hunyuan15Adapter(model, grid, chunk_tokens=None).attached(Run(grid, Full()), Backend.SDPA):
        assert torch.equal(model(**inputs)[0], chunked)


def test_masks_are_read_from_the_device_once(model: Any) -> None:
    inputs = inputs_of("picture-two-lengths")
    adapter = Hunyuan15Adapter(model, GRID)
    first = adapter.read(dict(inputs))
    with NoHostReads():
        again = adapter.read(dict(inputs))
    assert (first.longest, again.longest) == (PICTURE_TOKENS + 5 + 3,) * 2
    assert again.valid is not None
    assert again.valid.tolist() == [PICTURE_TOKENS + 5, PICTURE_TOKENS + 3 + 3]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_states": torch.zeros(1, 9, 3, 5, 8)}, r"installed for 3x5x7 video tokens .* the call has 3x5x8"),
        ({"encoder_attention_mask": torch.tensor([[0.0] * 7])}, "no valid token"),
        ({"encoder_attention_mask": torch.tensor([[0.0, 1, 1, 1, 1, 1, 1]])}, "before or between valid tokens"),
        ({"encoder_attention_mask_2": torch.tensor([[1.0, 0, 1, 0, 0]])}, "before or between valid tokens"),
    ],
)
def test_calls_that_do_not_fit_are_refused(model: Any, changes: dict[str, Any], reason: str) -> None:
    with (
        pytest.raises(BadInput, match=reason),
        Hunyuan15Adapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA),
    ):
        model(**inputs_of("one") | changes)


class OtherProcessor(HunyuanVideo15AttnProcessor2_0):
    """Another tool's."""


def test_transformers_in_another_state_are_refused() -> None:
    model: Any = tiny_hunyuan15.transformer()

    def attempt() -> None:
        with Hunyuan15Adapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA):
            pass

    with (
        Hunyuan15Adapter(model, GRID).attached(Run(GRID, Full()), Backend.SDPA),
        pytest.raises(BadInput, match="already installed"),
    ):
        attempt()
    model.transformer_blocks[1].attn.set_processor(OtherProcessor())
    with pytest.raises(BadInput, match=r"replaced by OtherProcessor .*undo that first"):
        attempt()
    compiled: Any = tiny_hunyuan15.transformer()
    compiled.compile()
    with pytest.raises(BadInput, match=r"compiled as a whole is not supported: .*compile_repeated_blocks"):
        Hunyuan15Adapter(compiled, GRID).attached(Run(GRID, Full()), Backend.SDPA).__enter__()


# ---- The mask of all pairs


def test_an_attention_layer_needs_no_mask_of_all_pairs() -> None:
    """Stock attention makes a byte for every pair of tokens, twice, and torch numbers of them; ours none at all.

    A layer on 3,840 video tokens with a prompt of 60 tokens in a text of 1,985, as the real pipeline pads it.
    """
    grid, prompt, padded = Grid((4, 24, 40)), 60, 1000 + 256 + 729
    model: Any = tiny_hunyuan15.transformer(num_layers=1)
    attention = model.transformer_blocks[0].attn
    inputs = tiny_hunyuan15.inputs(grid.shape)
    video, text = torch.randn(1, grid.tokens, 32), torch.randn(1, padded, 32)
    mask, rotation = torch.arange(padded)[None] < prompt, model.rope(inputs["hidden_states"])
    pairs = (grid.tokens + padded) ** 2
    stock = track(lambda: attention(video, text, attention_mask=mask, image_rotary_emb=rotation)).peak_bytes
    with Hunyuan15Adapter(model, grid).attached(Run(grid, Full()), Backend.SDPA):
        text = text[:, :prompt]
        inputs["encoder_hidden_states"], inputs["encoder_attention_mask"] = torch.randn(1, prompt, 32), mask[:, :prompt]
        layer, plans = attention.processor.attention, []
        handle = attention.register_forward_pre_hook(lambda *_: plans.append(layer.plan))
        model(**inputs)
        handle.remove()
        (layer.plan,) = plans  # which is that of the call alone
        ours = track(lambda: attention(video, text, image_rotary_emb=rotation)).peak_bytes
    print(f"stock {stock / 2**20:.1f} MiB, ours {ours / 2**20:.1f}, a byte a pair {pairs / 2**20:.1f}")
    assert stock > 2 * pairs
    assert ours < pairs / 4


@pytest.mark.parametrize(("name", "tokens", "gigabytes"), [("480p", 49_290, 2.6), ("720p", 111_600, 12.9)])
def test_the_mask_at_the_sizes_of_users(name: str, tokens: int, gigabytes: float) -> None:
    model = KNOWN_MODELS["video"][f"hunyuan15-{name}"]
    video = model.require_video()
    grid = model.grid(video.width, video.height, video.frames)
    assert grid.tokens == tokens
    assert (grid.tokens + model.text_tokens + 256 + 729) ** 2 / 1e9 == pytest.approx(gigabytes, abs=0.05)


# ---- Pipelines


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt": QUOTING},
        {"prompt": [LONG, QUOTING], "negative_prompt": [SHORT, "a dull grey sea"]},
        {"num_frames": 1, "height": 16, "width": 96},
    ],
    ids=["one", "quoting", "two-lengths", "one-row"],
)
@pytest.mark.parametrize("guided", [True, False])
def test_full_attention_equals_the_stock_pipeline(arguments: dict[str, Any], guided: bool) -> None:
    pipe = tiny_hunyuan15.pipeline() if guided else unguided(tiny_hunyuan15.pipeline())
    expected = call(pipe, **arguments)
    before, size = snapshot(pipe), SIZE | {name: arguments[name] for name in SIZE if name in arguments}
    with grat_cli.install(pipe, preset(), **size):
        assert relative_difference(call(pipe, **arguments), expected) < RELATIVE_OF_PIPELINES
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe, **arguments), expected)


@pytest.mark.parametrize("prompt", [LONG, [QUOTING, SHORT]], ids=["one", "two-lengths"])
@pytest.mark.parametrize("guided", [True, False])
def test_full_attention_equals_the_stock_pipeline_from_a_picture(prompt: Any, guided: bool) -> None:
    pipe = tiny_hunyuan15.pipeline(picture=True)
    pipe = pipe if guided else unguided(pipe)
    expected = call_with_picture(pipe, prompt)
    before = snapshot(pipe)
    with grat_cli.install(pipe, preset(), **SIZE_OF_PICTURE) as installation:
        assert relative_difference(call_with_picture(pipe, prompt), expected) < RELATIVE_OF_PIPELINES
    assert installation.grid.shape == (4, 3, 5)
    assert snapshot(pipe) == before
    assert torch.equal(call_with_picture(pipe, prompt), expected)


@pytest.mark.parametrize(
    ("attention", "radius", "share"),
    [({"variant": "b", "radius": [0, 1, 1]}, (0, 1, 1), None), ({"variant": "x", "share": 2}, None, 2)],
)
@pytest.mark.parametrize("picture", [False, True])
def test_patterns_equal_the_stock_pipeline_under_a_mask(
    pipe: Any, picture_pipe: Any, picture: bool, attention: dict[str, Any], radius: Any, share: int | None
) -> None:
    chosen, make, size = (picture_pipe, call_with_picture, SIZE_OF_PICTURE) if picture else (pipe, call, SIZE)
    with grat_cli.install(chosen, preset(**attention), **size) as installation:
        result = make(chosen, [QUOTING, SHORT], num_inference_steps=1)
    with under_masks(raster_mask(installation.grid, radius, share)):
        expected = make(chosen, [QUOTING, SHORT], num_inference_steps=1)
    assert relative_difference(result, expected) < RELATIVE_OF_PIPELINES
    assert relative_difference(result, make(chosen, [QUOTING, SHORT], num_inference_steps=1)) > 0.01


def test_leaving_restores_the_pipeline_after_an_exception(pipe: Any) -> None:
    before, expected = snapshot(pipe), call(pipe)

    def fail(*args: Any) -> None:
        raise RuntimeError("inside")

    hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"), grat_cli.install(pipe, preset("b"), **SIZE):
        call(pipe)
    hook.remove()
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), expected)


def test_shipped_presets_run(pipe: Any) -> None:
    """On a size that their groups of 4x8x8 cut."""
    size: dict[str, Any] = {"height": 144, "width": 176, "num_frames": 17}
    stock = call(pipe, num_inference_steps=1, **size)
    results = {}
    for variant in ("full", "b", "lines", "far"):
        with grat_cli.install(pipe, f"hunyuan15-{variant}", **size):
            results[variant] = relative_difference(call(pipe, num_inference_steps=1, **size), stock)
    assert results["full"] < RELATIVE_OF_PIPELINES
    assert results["lines"] > 1e-3


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ({"height": 90}, "multiples of 16 for this model, not 90 and 112: the nearest are 96 and 112"),
        ({"num_frames": 12}, r"num_frames must be 4k\+1 for this model, not 12: use 9 or 13"),
        ({"num_frames": None}, "makes videos: give num_frames"),
        ({"height": 64}, "installed for 4x4x7 video tokens .* the call has 4x5x7"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(pipe: Any, size: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=reason), grat_cli.install(pipe, preset(), **(SIZE | size)):
        call(pipe)


def test_a_picture_of_another_shape_is_refused(picture_pipe: Any) -> None:
    """The pipeline chooses the size by its picture, and the message says for which to install."""
    size: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 13}
    with (
        pytest.raises(BadInput, match=r"the call has 4x3x5: .*height=48, width=80, num_frames=13"),
        grat_cli.install(picture_pipe, preset(), **size),
    ):
        call_with_picture(picture_pipe)


def test_a_preset_of_another_family_is_refused(pipe: Any) -> None:
    with pytest.raises(BadInput, match=r"preset flux-x is for flux models, .*use one of grat presets hunyuan15"):
        grat_cli.install(pipe, "flux-x", **SIZE).__enter__()
