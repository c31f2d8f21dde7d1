"""Generation with the bundled model, against stock diffusers; how failures end."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_pictures import (
    DEMO,
    HEIGHT,
    PROMPT,
    SMALL_DEMO,
    STEPS,
    WIDTH,
    Progress,
    generate,
    pixels,
    preset,
    sparse_stages,
)

import grat_cli
from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput, NumericalFailure, OutOfMemory
from grat_cli.families.guidance import NEGATIVE_PROMPT_SCALE, choose_guidance
from grat_cli.generation import run
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import LoadedModel, load_model
from grat_kernels import BackendUnavailable

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stock() -> Any:
    """The bundled pipeline, for calls that have nothing to do with this project."""
    return load_model(DEMO, device=CPU, dtype=torch.float32).pipe


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline that the next generation gets, to be tampered with."""
    pipe = load_model(DEMO, device=CPU, dtype=torch.float32).pipe
    monkeypatch.setattr(run, "load_model", lambda *arguments, **options: LoadedModel(pipe, None))
    return pipe


@pytest.mark.parametrize("size", [(96, 80), (208, 144)])
def test_full_attention_gives_the_stock_picture(stock: Any, size: tuple[int, int]) -> None:
    width, height = size
    expected = stock(
        PROMPT,
        negative_prompt="",
        true_cfg_scale=2.0,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        max_sequence_length=DEMO_FLUX.text_tokens,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    (made,) = generate(preset=preset("full"), width=width, height=height)
    assert np.abs(made.pixels - pixels(expected)).max() <= 1
    (sparse,) = generate(preset=preset("b"), width=width, height=height)
    assert np.abs(sparse.pixels - pixels(expected)).max() > 1


def test_install_serves_several_prompts_and_pictures_per_prompt(stock: Any) -> None:
    arguments = {
        "prompt": [PROMPT, "a blue boat at night"],
        "num_images_per_prompt": 2,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 2,
        "max_sequence_length": DEMO_FLUX.text_tokens,
    }
    expected = stock(**arguments, generator=torch.Generator().manual_seed(7)).images
    with grat_cli.install(stock, preset("full"), height=HEIGHT, width=WIDTH):
        made = stock(**arguments, generator=torch.Generator().manual_seed(7)).images
    assert len(made) == 4
    for picture, other in zip(made, expected, strict=True):
        assert np.abs(pixels(picture) - pixels(other)).max() <= 1


def test_the_same_request_gives_the_same_pixels_whatever_seeds_came_before() -> None:
    first, second = generate(seeds=(7, 8))
    (again,) = generate(seeds=(8,))
    assert again.bytes == second.bytes
    assert first.bytes != second.bytes
    assert (first.report["seed"], second.report["seed"]) == (7, 8)


def test_progress_and_what_is_reported() -> None:
    progress = Progress()
    first, second = generate(progress, seeds=(7, 8), negative_prompt="a boat")
    steps = [(done, STEPS) for done in range(1, STEPS + 1)]
    assert progress.events == ["load", "text", *["denoise", *steps, "decode", "save"] * 2]
    assert progress.notes == []
    assert sum(progress.bytes_written) > 0

    for made in (first, second):
        report = made.report
        assert made.image.size == (report["width"], report["height"]) == (WIDTH, HEIGHT)
        assert report["grid"] == [10, 12]
        assert list(report["phases"]) == ["load", "text", "denoise", "decode", "save"]
        assert [step["index"] for step in report["steps"]] == list(range(STEPS))
        assert report["steps"][0]["timestep"] == 1000
        assert all(earlier["timestep"] > later["timestep"] for earlier, later in pairwise(report["steps"]))
        assert sum(step["total_ms"] for step in report["steps"]) < report["phases"]["denoise"]
        assert all(step["density"] == pytest.approx(report["density"], abs=1e-6) for step in report["steps"])
        assert (report["backend"]["used"], report["device"]["name"], report["device"]["dtype"]) == (
            *("sdpa", "cpu"),
            "float32",
        )
        assert (report["tokens"]["text"], report["sampling"]["guidance"], report["model"]["revision"]) == (
            24,
            2.0,
            None,
        )
        assert report["peak_memory_bytes"] == max(report["memory"].values()) > 50e6
        assert "process" in report["peak_memory_kind"]
    assert min(first.report["phases"].values()) > 0
    assert list(first.report["memory"]) == list(first.report["phases"])
    assert list(second.report["memory"]) == ["denoise", "decode", "save"]
    assert (second.report["phases"]["load"], second.report["phases"]["text"]) == (0, 0)


def test_a_presets_shift_replaces_the_models() -> None:
    (own,) = generate()
    (shifted,) = generate(preset=preset(sampling={"steps": STEPS, "guidance": 2.0, "shift": 6.0}))
    shifts = [made.report["sampling"]["shift"] for made in (own, shifted)]
    assert shifts == [pytest.approx(np.exp(0.477), rel=1e-3), 6.0]
    # sigma 2/3 of the unshifted second step
    assert shifted.report["steps"][1]["timestep"] == pytest.approx(1000 * 6 * (2 / 3) / (1 + 5 * 2 / 3))
    assert own.bytes != shifted.bytes


@pytest.fixture
def init_image(tmp_path: Path) -> Path:
    path = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(path)
    return path


def test_image_to_image_gives_the_stock_picture(init_image: Path) -> None:
    pipe = load_model(DEMO, device=CPU, dtype=torch.float32, pictures=frozenset({"start"})).pipe
    expected = pipe(
        PROMPT,
        image=Image.open(init_image),
        strength=0.5,
        negative_prompt="",
        true_cfg_scale=2.0,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=4,
        max_sequence_length=DEMO_FLUX.text_tokens,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    progress = Progress()
    four_steps = preset("full", sampling={"steps": 4, "guidance": 2.0})
    (made,) = generate(progress, preset=four_steps, init_image=init_image, strength=0.5)
    assert np.abs(made.pixels - pixels(expected)).max() <= 1
    assert [event for event in progress.events if isinstance(event, tuple)] == [(1, 2), (2, 2)]
    assert [step["timestep"] for step in made.report["steps"]] == pytest.approx(pipe.scheduler.timesteps[2:].tolist())


def test_a_picture_to_start_from_is_cut_to_shape(init_image: Path) -> None:
    progress = Progress()
    (made,) = generate(progress, init_image=init_image, width=64, height=64)
    assert made.image.size == (64, 64)
    assert progress.notes == ["start.png is 96x80: its middle is cut out in the shape of 64x64"]


def test_a_picture_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    for path, says in [(text, "cannot be read as a picture"), (tmp_path / "none.png", "there is no such file")]:
        with pytest.raises(BadInput, match=says):
            generate(init_image=path)
    with pytest.raises(BadInput, match="strength must lie above 0"):
        generate(init_image=text, strength=0.0)


def test_words_that_the_demo_does_not_know_are_named() -> None:
    progress = Progress()
    generate(progress, prompt="A red Zebra, in the snow with a quokka; zebra!", preset=preset(sampling={"steps": 1}))
    note, *of_cuts = progress.notes
    assert note.startswith("the demo model does not know zebra, quokka; it draws fox")
    assert all(cut.startswith("the prompt is cut: ") for cut in of_cuts)


def test_large_pictures_from_noise_are_announced(loaded: Any) -> None:
    progress = Progress()
    from_noise = preset(highres={"mode": "off"})
    generate(progress, preset=from_noise, model=SMALL_DEMO, width=96, height=96)
    assert "trained at about 64x64" in progress.notes[0]


@pytest.mark.parametrize("size", [(100, 80), (96, 0)])
def test_sizes_that_do_not_fit_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(BadInput, match=r"multiples of 16, not .*: the nearest is 96x(80|16)"):
        generate(width=size[0], height=size[1])


def test_the_first_step_that_is_not_finite_is_named(loaded: Any) -> None:
    calls = []

    def spoil(module: Any, args: Any, output: Any) -> Any:
        calls.append(module)
        return (output[0] * float("nan"),) if len(calls) == 3 else output  # two calls per step

    loaded.transformer.register_forward_hook(spoil)
    with pytest.raises(NumericalFailure, match="NaN or infinite at step 2 of 3"):
        generate()


def last_convolution(pipe: Any) -> torch.nn.Conv2d:
    return [module for module in pipe.vae.decoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]


def test_an_empty_picture_is_a_failure(loaded: Any) -> None:
    layer = last_convolution(loaded)
    torch.nn.init.zeros_(layer.weight)
    with pytest.raises(NumericalFailure, match="one flat colour"):
        generate()
    torch.nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(NumericalFailure, match="NaN after decoding"):
        generate()


def test_running_out_of_memory_says_what_helps(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    def too_large(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")

    monkeypatch.setattr(loaded.vae, "decode", too_large)
    with pytest.raises(
        OutOfMemory, match=r"(?s)memory to decode 96x80 with demo.*grat decode .*/7\.latents\.safetensors --tile 512$"
    ):
        generate()
    with pytest.raises(
        OutOfMemory, match="memory for 64x64 with demo: try a smaller"
    ):  # of the base, which has to pass
        generate(preset=sparse_stages(), model=SMALL_DEMO, width=128, height=128)
    monkeypatch.setattr(loaded.transformer, "forward", too_large)
    with pytest.raises(OutOfMemory, match=r"too little memory for 96x80 with demo: try a smaller --res such as 48x32$"):
        generate()
    monkeypatch.setattr(run, "load_model", too_large)
    monkeypatch.setattr(run, "choose_device", lambda name: SimpleNamespace(type="mps"))
    with pytest.raises(OutOfMemory, match="--offload sequential") as caught:
        generate(offload="model", dtype="float32")
    assert "--offload model" not in str(caught.value)


def test_other_errors_pass_unchanged(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    def wrong(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(loaded.vae, "decode", wrong)
    progress = Progress()
    with pytest.raises(RuntimeError, match="shape mismatch"):
        generate(progress)
    assert progress.notes[0].startswith("its latents are kept: go on with grat decode ")


def test_a_backend_that_fails_at_the_call_is_bad_input(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise BackendUnavailable("the flex backend cannot run here: too long")

    monkeypatch.setattr("grat_kernels.span_attention", refuse)
    with pytest.raises(BadInput, match="too long; use --backend auto"):
        generate()


def guidance_for(model: str, scale: float | None, negative: str | None, embeds: bool) -> Any:
    pipe = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(guidance_embeds=embeds)))
    return choose_guidance(pipe, choose_model(model), preset(sampling={"guidance": scale}), negative)


def test_guidance_of_each_model() -> None:
    demo = guidance_for("demo", None, None, embeds=False)
    assert (demo.arguments, demo.negative_prompt) == ({"true_cfg_scale": DEMO_FLUX.guidance}, "")
    assert guidance_for("demo", 3.0, "a boat", embeds=False).negative_prompt == "a boat"
    off = guidance_for("demo", 1.0, "a boat", embeds=False)
    assert (off.scale, off.negative_prompt, len(off.notes)) == (None, None, 1)

    assert guidance_for("flux-dev", None, None, embeds=True).arguments == {"guidance_scale": 3.5}
    steered = guidance_for("flux-dev", 2.5, "blur", embeds=True)
    assert steered.arguments == {"guidance_scale": 2.5, "true_cfg_scale": NEGATIVE_PROMPT_SCALE}
    assert (steered.negative_prompt, len(steered.notes)) == ("blur", 1)

    schnell = guidance_for("flux-schnell", None, None, embeds=False)
    assert (schnell.scale, schnell.arguments, schnell.notes) == (None, {"guidance_scale": 0.0}, ())
    given = guidance_for("flux-schnell", 3.5, None, embeds=False)
    assert given.notes == ("flux-schnell takes no guidance: 3.5 is not used",)
    steered = guidance_for("flux-schnell", None, "blur", embeds=False)
    assert steered.arguments == {"true_cfg_scale": NEGATIVE_PROMPT_SCALE}
