"""Large pictures: which stages make them, that they run as stock pipelines would, that the result holds together."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_flux
import torch
from command_line import grat, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_pictures import DEMO, PROMPT, SMALL_DEMO, Progress, pixels
from small_pictures import generate_staged as generate
from small_pictures import sparse_stages as small
from small_pictures import staged as preset

from grat_cli.bench.highres_level import HighresSettings, run_highres_level
from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput
from grat_cli.estimates.stages import Stage, stages_of, uses_highres
from grat_cli.families import family_of, family_of_presets
from grat_cli.families.base import NO_PICTURES
from grat_cli.fidelity.quality import likeness
from grat_cli.generation import run as generation
from grat_cli.generation.low_resolution_guidance import low_frequencies, low_resolution_guidance
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import LoadedModel, load_model
from grat_cli.models.resolution import Resolution
from grat_cli.presets import Preset, load_preset, preset_names, resolve_preset

CPU = torch.device("cpu")
FLUX = choose_model("flux-dev")
FAMILY = family_of(FLUX)


def stages(width: int, height: int, /, chosen: Preset | None = None, **options: Any) -> tuple[Stage, ...]:
    return stages_of(chosen or preset(), FLUX, width, height, **options)


@pytest.mark.parametrize("name", [name for name in preset_names() if family_of_presets(load_preset(name).model).stages])
def test_presets_of_pictures_say_how_large_ones_come_about(name: str) -> None:
    """One and the same for a family, but where a preset is made for a size."""
    section, usual = load_preset(name).highres, load_preset(f"{name.partition('-')[0]}-full").highres
    assert section is not None
    assert section.mode == "cascade"
    if not name.endswith(("k", "4x")):
        assert section == usual


def sizes(made: tuple[Stage, ...]) -> list[str]:
    return [stage.size for stage in made]


def test_a_large_picture_grows_from_the_trained_area_in_equal_ratios() -> None:
    assert sizes(stages(8192, 8192)) == ["1024x1024", "2048x2048", "4096x4096", "8192x8192"]
    assert sizes(stages(4096, 2304)) == ["1360x768", "2368x1328", "4096x2304"]
    assert sizes(stages(8192, 8192, preset(growth=None))) == ["1024x1024", "8192x8192"]
    assert sizes(stages(8192, 8192, preset(growth=3))) == ["1024x1024", "2896x2896", "8192x8192"]
    # Without a section of its own a preset has the defaults.
    plain = load_preset("flux-far").model_copy(update={"highres": None})
    assert stages(4096, 4096, plain) == stages(4096, 4096)


@given(st.integers(1, 512), st.integers(1, 512))
def test_stages_of_any_shape_grow_and_end_at_the_asked_size(columns: int, rows: int) -> None:
    width, height = columns * 16, rows * 16
    made = stages(width, height)
    assert (made[-1].width, made[-1].height) == (width, height)
    assert all(side % 16 == 0 and side > 0 for stage in made for side in (stage.width, stage.height))
    assert all(
        before.width <= after.width and before.height <= after.height and before.size != after.size
        for before, after in pairwise(made)
    )
    if len(made) > 1:
        assert made[0].strength is None
        # Rounded to 16 pixels a side.
        assert made[0].width * made[0].height <= (1024 + 16) ** 2 + 16 * (width + height)


def test_up_to_twice_the_trained_area_and_when_switched_off_there_is_one_plain_stage() -> None:
    own = load_preset("flux-far").model_copy(update={"highres": None})
    for made in (stages(1440, 1440, own), stages(8192, 8192, preset(mode="off"))):
        (stage,) = made
        assert (stage.preset, stage.strength, stage.positions, stage.proportional_attention) == (
            *(own, None, "none"),
            False,
        )
    assert not uses_highres(own, FLUX, 1440, 1440)
    assert uses_highres(own, FLUX, 1456, 1456)


def test_direct_is_one_stage_from_noise_with_everything_fitted() -> None:
    (stage,) = stages(4096, 2304, preset(mode="direct", positions="dype", shift=8, guidance=5, steps=12))
    assert (stage.size, stage.strength, stage.steps) == ("4096x2304", None, 12)
    assert (stage.positions, stage.proportional_attention, str(stage.trained)) == ("dype", True, "1360x768")
    assert (stage.preset.sampling.shift, stage.preset.sampling.guidance) == (8, 5)
    assert stage.preset.attention.variant == "b"


def test_the_base_is_dense_and_plain_and_stages_are_sparse_where_they_are_long() -> None:
    rules = {"dense_steps": 2, "rules": [{"layers": 0, "variant": "full"}]}
    chosen = Preset.model_validate(
        {**preset(dense_below=20_000, guidance=7.5, steps=20).model_dump(), "schedule": rules}
    )
    base, short, long = stages(4096, 4096, chosen)
    for dense in (base, short):  # 64x64 and 128x128 tokens
        assert dense.preset.attention.variant == "full"
        assert dense.preset.schedule.dense_steps == 0
        assert dense.preset.schedule.rules == ()
    assert (long.preset.attention, long.preset.schedule) == (chosen.attention, chosen.schedule)
    assert (base.preset.sampling, base.positions, base.proportional_attention) == (chosen.sampling, "none", False)
    assert (short.preset.sampling.steps, short.preset.sampling.guidance) == (20, 7.5)


def test_strength_and_overrides_of_each_stage() -> None:
    made = stages(8192, 8192, preset(strength=[0.7, 0.5, 0.3]))
    assert [stage.strength for stage in made] == [None, 0.7, 0.5, 0.3]
    own = {
        "attention": {"variant": "x", "group": [16, 16]},
        "schedule": {"dense_steps": 1},
        "strength": 0.2,
        "steps": 9,
    }
    made = stages(8192, 8192, preset(stages=[{}, own]))
    assert [stage.strength for stage in made] == [None, 0.6, 0.2, 0.6]
    assert [stage.preset.attention.variant for stage in made] == ["full", "b", "x", "b"]
    assert [stage.preset.schedule.dense_steps for stage in made] == [0, 0, 1, 0]
    assert [stage.preset.sampling.steps for stage in made] == [28, 28, 9, 28]
    with pytest.raises(BadInput, match=r"highres.strength has 3 numbers, but 4096x4096 takes 2 stages .* give 2"):
        stages(4096, 4096, preset(strength=[0.7, 0.5, 0.3]))
    with pytest.raises(BadInput, match=r"highres.stages overrides 2 stages, but 2048x2048 takes 1"):
        stages(2048, 2048, preset(stages=[{}, own]))


@pytest.mark.parametrize("steps", [1, 3, 20, 28, 50])
@pytest.mark.parametrize("strength", [0.01, 0.3, 0.55, 0.6, 0.7, 1.0])
def test_steps_are_counted_as_diffusers_counts_them(steps: int, strength: float) -> None:
    pipe = tiny_flux.image_to_image()
    pipe.scheduler.set_timesteps(steps, mu=1.0)
    _, expected = pipe.get_timesteps(steps, strength, CPU)
    chosen = resolve_preset(preset(strength=strength), steps=steps)
    assert stages(2048, 2048, chosen)[1].steps == expected


def test_a_picture_to_start_from_takes_the_place_of_the_base_and_of_stages_no_larger() -> None:
    small, large = Resolution(640, 640), Resolution(4096, 4096)
    assert sizes(stages(8192, 8192, start=small)) == ["2048x2048", "4096x4096", "8192x8192"]
    assert sizes(stages(8192, 8192, start=large)) == ["8192x8192"]
    assert sizes(stages(4096, 4096, start=large)) == ["4096x4096"]
    made = stages(8192, 8192, start=small, strength=0.9)
    assert [stage.strength for stage in made] == [0.9, 0.6, 0.6]
    (plain,) = stages(1024, 1024, start=small)
    assert plain.strength == 0.7


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("highres.mode=casc", "did you mean 'cascade'"),
        ("highres.growth=1", "expected 1.1 or more, not 1"),
        ("highres.strength=[0.5, 1.5]", "expected a share above 0 and up to 1, or one per stage"),
        ("highres.strength=[]", "expected a share above 0 and up to 1, or one per stage"),
        ("highres.positions=rope", "unknown value 'rope'"),
        ("highres.proportional_attention=1", "expected true or false, not 1"),
        ("highres.low_resolution_guidance=2", "expected 1 or less, not 2"),
        ("highres.stages=[{strenth: 1}]", "did you mean 'strength'"),
        ("highres.stages=[{attention: {variant: b, group: [3, 3, 3]}}]", "expected 2 sizes for flux"),
    ],
)
def test_mistakes_in_the_section_are_named(item: str, says: str) -> None:
    message = refusal("plan", "flux-far", "--set", item)
    assert message.startswith(f"--set {item}: ")
    assert says in message


def test_videos_have_no_such_section() -> None:
    assert "make videos" in refusal("plan", "hunyuan-far", "--highres", "cascade")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pipelines that generation was given."""
    made: list[Any] = []

    def load(*arguments: Any, **options: Any) -> LoadedModel:
        made.append(load_model(*arguments, **options).pipe)
        return LoadedModel(made[-1], None)

    monkeypatch.setattr(generation, "load_model", load)
    return made


@pytest.mark.parametrize("upscale", ["pixel", "latent"])
def test_a_cascade_with_nothing_fitted_is_what_stock_pipelines_make(upscale: str) -> None:
    chosen = small(upscale=upscale, strength=0.5, positions="none", proportional_attention=False, dense_below=10**6)
    (made,) = generate(chosen)

    stock = load_model(DEMO, device=CPU, dtype=torch.float32).pipe
    generator = torch.Generator().manual_seed(7)
    common = {
        "prompt": PROMPT,
        "negative_prompt": "",
        "true_cfg_scale": 2.0,
        "num_inference_steps": 3,
        "max_sequence_length": DEMO_FLUX.text_tokens,
        "generator": generator,
    }
    output = "pil" if upscale == "pixel" else "latent"
    base = stock(**common, height=64, width=64, output_type=output).images[0]
    if upscale == "pixel":
        start = base.resize((128, 128), Image.Resampling.LANCZOS)
    else:
        unpacked = stock._unpack_latents(base[None], 64, 64, stock.vae_scale_factor)
        start = torch.nn.functional.interpolate(unpacked, (32, 32), mode="bicubic", antialias=True)
    from_picture = FAMILY.pipeline_for(stock, frozenset({"start"}))
    expected = from_picture(**common, image=start, strength=0.5, height=128, width=128).images[0]
    assert np.abs(made.pixels - pixels(expected)).max() <= 1


def test_pipelines_for_noise_and_for_pictures_share_their_parts() -> None:
    pipe = tiny_flux.pipeline()
    other = FAMILY.pipeline_for(pipe, frozenset({"start"}))
    assert type(other).__name__ == "FluxImg2ImgPipeline"
    assert all(other.components[name] is part for name, part in pipe.components.items())
    assert FAMILY.pipeline_for(other, frozenset({"start"})) is other
    assert type(FAMILY.pipeline_for(other, NO_PICTURES)).__name__ == "FluxPipeline"


def test_one_seed_gives_one_picture_whatever_came_before_and_the_model_is_loaded_once(loads: list[Any]) -> None:
    first, second = generate(small(), seeds=(7, 8))
    assert len(loads) == 1
    (again,) = generate(small(), seeds=(8,))
    assert again.bytes == second.bytes
    assert first.bytes != second.bytes


def test_what_is_reported_of_stages() -> None:
    progress = Progress()
    (made,) = generate(small(strength=0.6), 256, progress)
    assert made.image.size == (256, 256)
    report = made.report
    assert [(stage["number"], stage["width"], stage["height"]) for stage in report["stages"]] == [
        *((0, 64, 64), (1, 128, 128)),
        (2, 256, 256),
    ]
    assert [step["stage"] for step in report["steps"]] == [0, 0, 0, 1, 1, 2, 2]
    assert [step["index"] for step in report["steps"]] == list(range(7))
    assert report["sampling"]["steps"] == 7
    assert [event for event in progress.events if isinstance(event, str)] == [
        *("load", "text", "denoise", "decode", "denoising 128x128", "decode", "denoising 256x256", "decode", "save")
    ]
    for name in ("denoise", "decode", "encode"):
        parts = [stage["phases"].get(name, 0.0) for stage in report["stages"]]
        assert report["phases"][name] == pytest.approx(sum(parts), abs=1e-2)
    densities = [stage["density"] for stage in report["stages"]]
    assert densities[0] == 1
    assert densities[0] > densities[1] > densities[2] == report["density"]
    assert report["grid"] == [32, 32]


def test_positions_and_scores_of_the_stages_make_a_difference() -> None:
    settings = [
        {},
        {"positions": "none"},
        {"positions": "dype"},
        {"proportional_attention": False},
        {"low_resolution_guidance": 0.5},
        {"shift": 3.0},
        {"guidance": 3.0},
    ]
    made = [generate(small(**changes))[0].bytes for changes in settings]
    assert len(set(made)) == len(made)


def test_a_picture_to_start_from_skips_the_base(tmp_path: Path) -> None:
    path = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(path)
    (made,) = generate(small(), 256, init_image=path, strength=0.4)
    assert [(stage["width"], stage["strength"]) for stage in made.report["stages"]] == [(128, 0.4), (256, 0.6)]
    assert "encode" in made.report["phases"]


def test_low_resolution_guidance_moves_the_prediction_by_its_weight() -> None:
    pipe = tiny_flux.pipeline()
    pipe.scheduler.set_timesteps(4, mu=1.0)
    pipe.scheduler.set_begin_index(1)
    reference, sample, velocity = (
        torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(n)) for n in range(3)
    )

    def pack(latents: torch.Tensor) -> torch.Tensor:
        return pipe._pack_latents(latents, *latents.shape)

    sigma, following = pipe.scheduler.sigmas[1], pipe.scheduler.sigmas[2]
    with low_resolution_guidance(FAMILY, pipe, reference, (6, 10), 0.4):
        (made,) = pipe.scheduler.step(pack(velocity), pipe.scheduler.timesteps[1], pack(sample), return_dict=False)
    clean = sample - sigma * velocity
    wanted = clean + 0.4 * low_frequencies(reference - clean, (6, 10))
    # Euler's step along the line from the sample to the clean latents.
    expected = sample + (following - sigma) * (sample - wanted) / sigma
    torch.testing.assert_close(made, pack(expected))
    assert "step" not in vars(pipe.scheduler)


def test_low_frequencies_are_those_that_a_smaller_picture_holds() -> None:
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(32.0), indexing="ij")
    finest = torch.where((rows + columns) % 2 == 0, 1.0, -1.0)[None, None]
    assert low_frequencies(finest, (8, 16)).abs().max() == 0
    flat = torch.full((1, 2, 16, 32), 3.0)
    torch.testing.assert_close(low_frequencies(flat, (8, 16)), flat)


def test_commands_tell_of_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = grat("plan", "flux-8k", "--res", "8192", "--json").data
    assert [(stage["width"], stage["steps"]) for stage in planned["stages"]] == [
        *((1024, 28), (2048, 10), (4096, 10), (8192, 10))
    ]
    assert planned["stages"][-1]["density"] == planned["density"]
    shown = grat("plan", "flux-8k", "--res", "8192").out
    assert "4096x4096: 66,048 tokens" in " ".join(shown.split())
    (only,) = grat("plan", "flux-8k", "--res", "8192", "--highres", "off", "--json").data["stages"]
    assert only["positions"] == "none"

    monkeypatch.chdir(tmp_path)
    options = ("--model", "demo", "--steps", "1", "--seed", "1", "--out", "fox.png", "--set", "highres.dense_below=0")
    made = grat("image", PROMPT, *options, "--res", "384", "--json")
    assert made.code == 0, made.err
    assert "stages: 256x256 (1 steps), 384x384 (1 steps)" in made.err
    (report,) = made.data["images"]
    assert [stage["width"] for stage in report["stages"]] == [256, 384]
    assert [step["stage"] for step in report["steps"]] == [0, 1]
    assert report["stages"][1]["phases"]["denoise"] > 0
    inside = grat("info", "fox.png")
    assert inside.code == 0


def test_the_highres_option_is_checked() -> None:
    assert "did you mean 'direct'" in refusal("image", PROMPT, "--model", "demo", "--highres", "dircet")


@pytest.mark.parametrize("name", ["flux-2k", "flux-4k", "flux-8k", "demo-4x"])
def test_presets_of_large_pictures_fit_every_size_that_takes_them(name: str) -> None:
    chosen = load_preset(name)
    model = DEMO if chosen.model == "demo" else FLUX
    assert chosen.highres is not None
    for factor in (2, 3, 4, 8):
        side = factor * model.native_side
        assert stages_of(chosen, model, side, side)[-1].size == f"{side}x{side}"


def test_the_benchmark_compares_with_the_base() -> None:
    settings = HighresSettings(
        model=SMALL_DEMO, preset=small(2), width=128, height=128, prompts=(PROMPT,), device="cpu"
    )
    result, pictures = run_highres_level(settings)
    (case,) = result.cases
    assert [row.name for row in case.rows] == ["base", "off", "direct", "cascade"]
    assert [name for name, _ in pictures.rows] == ["base", "off", "direct", "cascade"]
    assert [made[0].size[0] for _, made in pictures.rows] == [64, 128, 128, 128]
    for row, (_, (picture,)) in zip(case.rows[1:], pictures.rows[1:], strict=True):
        base = pictures.rows[0][1][0]
        expected = likeness([np.asarray(base)], [np.asarray(picture.resize(base.size, Image.Resampling.LANCZOS))]).ssim
        assert row.quality is not None
        assert row.quality.ssim == pytest.approx(expected)
    (made,) = generate(small(2), seeds=(0,))
    assert made.bytes == pictures.rows[3][1][0].tobytes()


def test_a_large_picture_is_no_blurry_mess() -> None:
    """At twice the trained side; from noise, the same prompt and seed give one."""
    settings = HighresSettings(
        model=DEMO,
        preset=resolve_preset(load_preset("demo-4x"), steps=6),
        width=512,
        height=512,
        compare=("off", "cascade"),
        prompts=(PROMPT,),
        device="cpu",
    )
    result, _ = run_highres_level(settings)
    _, from_noise, cascade = (row.quality.ssim if row.quality else 1.0 for row in result.cases[0].rows)
    assert cascade >= 0.8
    assert from_noise < cascade - 0.2


def test_guidance_of_stages_alone_steers_them() -> None:
    unguided = Preset.model_validate({**small().model_dump(), "sampling": {"steps": 3, "guidance": 1.0}})
    (plain,) = generate(unguided)
    section = {**unguided.highres.model_dump(), "guidance": 3.0} if unguided.highres else {}
    (guided,) = generate(Preset.model_validate({**unguided.model_dump(), "highres": section}))
    assert [stage["guidance"] for stage in plain.report["stages"]] == [None, None]
    assert [stage["guidance"] for stage in guided.report["stages"]] == [None, 3.0]
    assert plain.bytes != guided.bytes
