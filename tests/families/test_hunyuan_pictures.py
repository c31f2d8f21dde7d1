"""HunyuanVideo from a first frame: by token replacement, whose first frame is modulated apart, and by concatenation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_hunyuan
import tiny_hunyuan15
import torch
from flux_runs import relative_difference
from hunyuan15_runs import Run
from hunyuan_runs import attentions, raster_mask, snapshot, under_masks

import grat_cli
from grat_cli.attention.chunking import in_chunks
from grat_cli.errors import BadInput
from grat_cli.families import FAMILIES
from grat_cli.families.base import Call, Pictures
from grat_cli.families.hunyuan import HunyuanAdapter
from grat_cli.models.catalogue import KNOWN_MODELS, choose_model
from grat_cli.presets import Preset
from grat_kernels import Backend, Block, CrissCross, Far, Full, Grid, Pattern, Union

FAMILY = FAMILIES["hunyuan"]
# Two computations of one fp32 forward pass: sums of a few hundred terms in another order, through three layers.
RELATIVE = 1e-5
PADDED = (tiny_hunyuan.TEXT_TOKENS - 4, tiny_hunyuan.TEXT_TOKENS - 1)
GRID = Grid((5, 6, 8))
STEPS, PROMPT_ROOM = 3, 16
SIZE: dict[str, Any] = {"height": 80, "width": 112, "num_frames": 13}
LONG, SHORT = "waves at night under a red boat", "snow"
FIRST = tiny_hunyuan15.first_frame(SIZE["width"], SIZE["height"])
GUIDED: dict[str, Any] = {"negative_prompt": SHORT, "true_cfg_scale": 3.0}


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_hunyuan.transformer(image_condition_type="token_replace")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_hunyuan.pipeline_from_picture()


def preset(variant: str = "full", **attention: Any) -> Preset:
    attention = {"variant": variant, "group": [2, 3, 3], **attention}
    return Preset.model_validate(
        {"name": "test", "model": "hunyuan", "attention": attention, "kernel": {"backend": "sdpa"}}
    )


def call(pipe: Any, **arguments: Any) -> torch.Tensor:
    defaults = {
        "image": FIRST,
        "prompt": LONG,
        **SIZE,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(5),
        "output_type": "latent",
        "max_sequence_length": PROMPT_ROOM,
    }
    return pipe(**(defaults | arguments)).frames


# ---- Blocks that modulate the first frame apart


@pytest.mark.parametrize("shape", [(5, 6, 8), (1, 7, 5), (4, 1, 1)])
@pytest.mark.parametrize("valid", [(tiny_hunyuan.TEXT_TOKENS,), PADDED])
def test_full_attention_equals_stock(model: Any, shape: tuple[int, ...], valid: tuple[int, ...]) -> None:
    inputs = tiny_hunyuan.inputs(shape, valid)
    with HunyuanAdapter(model, Grid(shape)).attached(Run(Grid(shape), Full()), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, model(**inputs)[0]) < RELATIVE


def test_the_first_frame_is_modulated_apart(model: Any) -> None:
    """Else the other tests would show nothing."""
    usual: Any = tiny_hunyuan.transformer()
    usual.load_state_dict(model.state_dict())
    inputs = tiny_hunyuan.inputs(GRID.shape)
    assert relative_difference(usual(**inputs)[0], model(**inputs)[0]) > 0.01


@pytest.mark.parametrize(
    ("pattern", "radius", "share"), [(Block(1), 1, None), (Block(0), 0, None), (CrissCross(2), None, 2)]
)
def test_patterns_equal_stock_attention_under_a_mask(
    model: Any, pattern: Pattern, radius: int | None, share: int | None
) -> None:
    inputs = tiny_hunyuan.inputs(GRID.shape, PADDED)
    expected = under_masks(model, inputs, raster_mask(GRID, radius, share))
    with HunyuanAdapter(model, GRID).attached(Run(GRID, pattern), Backend.SDPA):
        result = model(**inputs)[0]
    assert relative_difference(result, expected) < RELATIVE
    assert relative_difference(result, model(**inputs)[0]) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [256, 10_000])
def test_blocks_are_those_of_stock_bit_by_bit(dtype: torch.dtype, chunk: int) -> None:
    """In chunks, and all tokens at once."""
    model: Any = torch.nn.Module.to(tiny_hunyuan.transformer(image_condition_type="token_replace"), dtype)
    grid = Grid((6, 10, 12))
    inputs = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in tiny_hunyuan.inputs(grid.shape, PADDED).items()
    }
    expected = model(**inputs)[0]
    adapter = HunyuanAdapter(model, grid)
    with in_chunks(adapter.blocks, adapter.chunked_blocks(), chunk):
        assert torch.equal(model(**inputs)[0], expected)


def test_chunks_change_no_bit_of_grouped_tokens(model: Any) -> None:
    grid, results = Grid((6, 10, 12)), []
    inputs = tiny_hunyuan.inputs(grid.shape, PADDED)
    for chunk_tokens in (None, 256):
        adapter = HunyuanAdapter(model, grid, chunk_tokens=chunk_tokens)
        with adapter.attached(Run(grid, Union(Block(0), Far([(0, (1, 3, 3))]))), Backend.SDPA):
            results.append(model(**inputs)[0])
        assert adapter.chunking[0] == chunk_tokens
    assert torch.equal(*results)


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_blocks_processors_and_hooks(model: Any, fails: bool) -> None:
    inputs = tiny_hunyuan.inputs(GRID.shape)
    before, expected = snapshot(model), model(**inputs)[0]
    forwards = [vars(block).get("forward") for block in (*model.transformer_blocks, *model.single_transformer_blocks)]
    try:
        with HunyuanAdapter(model, GRID).attached(Run(GRID, Block(0)), Backend.SDPA):
            model(**inputs)
            if fails:
                raise RuntimeError("inside")
    except RuntimeError:
        assert fails
    after = [vars(block).get("forward") for block in (*model.transformer_blocks, *model.single_transformer_blocks)]
    assert (snapshot(model), after) == (before, forwards)
    assert torch.equal(model(**inputs)[0], expected)


# ---- Pipelines


@pytest.mark.parametrize("condition", ["token_replace", "latent_concat"])
@pytest.mark.parametrize("arguments", [{}, GUIDED, {"num_frames": 5, "height": 48}], ids=["one", "guided", "small"])
def test_full_attention_equals_the_stock_pipeline(condition: str, arguments: dict[str, Any]) -> None:
    pipe = tiny_hunyuan.pipeline_from_picture(condition=condition)
    expected, before = call(pipe, **arguments), snapshot(pipe.transformer)
    size = SIZE | {name: arguments[name] for name in SIZE if name in arguments}
    with grat_cli.install(pipe, preset(), **size):
        assert relative_difference(call(pipe, **arguments), expected) < 1e-5
    assert snapshot(pipe.transformer) == before
    assert torch.equal(call(pipe, **arguments), expected)


def test_two_videos_with_prompts_of_different_lengths(pipe: Any) -> None:
    """By embeddings: the pipeline encodes one picture and one prompt at a time."""
    texts = [pipe.encode_prompt(FIRST, prompt, max_sequence_length=PROMPT_ROOM) for prompt in (LONG, SHORT)]
    names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    arguments = {name: torch.cat(parts) for name, parts in zip(names, zip(*texts, strict=True), strict=True)}
    arguments |= {"prompt": None, "image": [FIRST, FIRST]}
    expected = call(pipe, **arguments)
    assert expected.shape[0] == 2
    with grat_cli.install(pipe, preset(), **SIZE):
        assert relative_difference(call(pipe, **arguments), expected) < 1e-5


@pytest.mark.parametrize(
    ("attention", "radius", "share"),
    [({"variant": "b", "radius": [0, 1, 1]}, (0, 1, 1), None), ({"variant": "x", "share": 2}, None, 2)],
)
def test_patterns_equal_the_stock_transformer_under_a_mask(
    pipe: Any, attention: dict[str, Any], radius: Any, share: int | None
) -> None:
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((kwargs, output[0]))

    with grat_cli.install(pipe, preset(**attention), **SIZE) as installation:
        hook = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
        call(pipe, num_inference_steps=1)
        hook.remove()
    ((inputs, result),) = seen
    expected = under_masks(pipe.transformer, inputs, raster_mask(installation.grid, radius, share))
    assert relative_difference(result, expected) < RELATIVE


@pytest.mark.parametrize("guided", [True, False])
def test_a_run_is_that_of_the_stock_pipeline(pipe: Any, guided: bool) -> None:
    """Also where it goes on after a step."""
    arguments = {"guidance_scale": 6.0} | (GUIDED if guided else {})
    expected = call(pipe, **arguments)
    model = replace(KNOWN_MODELS["video"]["hunyuan-i2v"], text_tokens=PROMPT_ROOM)
    text = FAMILY.encode_text(pipe, model, LONG, SHORT if guided else None, Pictures(FIRST))
    given = {name: value for name, value in arguments.items() if name != "negative_prompt"}
    kept: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept.append(tensors["latents"].clone())
        return {}

    asked = Call(112, 80, 13, STEPS, text | given, torch.Generator().manual_seed(5), keep, pictures=Pictures(FIRST))
    whole, before = FAMILY.denoise(pipe, asked), sorted(vars(pipe))
    assert torch.equal(whole, expected)
    again = replace(asked, begun=kept[0], first_step=1, generator=torch.Generator().manual_seed(5))
    assert torch.equal(FAMILY.denoise(pipe, again), whole)
    assert sorted(vars(pipe)) == before
    lengths: list[int] = []
    hook = attentions(pipe.transformer)[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    with grat_cli.install(pipe, preset(), **SIZE):
        FAMILY.denoise(pipe, replace(asked, callback=None, generator=torch.Generator()))
    hook.remove()
    assert tuple(lengths) == FAMILY.text_lens(text) * STEPS


def test_a_folder_tells_that_it_needs_a_picture(pipe: Any, tmp_path: Any) -> None:
    pipe.save_pretrained(tmp_path / "model")
    chosen = choose_model(str(tmp_path / "model"), medium="video")
    assert (chosen.family, chosen.takes, chosen.needs) == ("hunyuan", {"start"}, {"start"})
    config = FAMILY.transformer_config(KNOWN_MODELS["video"]["hunyuan-i2v"])
    assert config["image_condition_type"] == "token_replace"
    assert FAMILY.transformer_shape(config).joint_text(256) == 144 + 256
    assert choose_model("hunyuanvideo-community/HunyuanVideo-I2V", medium="video").needs == {"start"}


def test_concatenation_is_left_to_its_own_pipeline(tmp_path: Any) -> None:
    pipe = tiny_hunyuan.pipeline_from_picture(condition="latent_concat")
    asked = Call(112, 80, 13, 1, {}, torch.Generator(), pictures=Pictures(FIRST))
    with pytest.raises(BadInput, match=r"four frames less .*use hunyuan-i2v"):
        FAMILY.denoise(pipe, asked)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match=r"four frames less .*use hunyuan-i2v"):
        choose_model(str(tmp_path / "model"), medium="video")
