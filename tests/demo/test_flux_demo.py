"""The bundled demo Flux, as stock diffusers loads and runs it."""

import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import load_pipeline
from grat_cli.demo.drawing import COLOURS
from grat_cli.demo.evaluation import held_out_losses
from grat_cli.demo.scenes import known_words

LARGEST_BYTES = 12_000_000


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two runs are only sure to agree bit for bit on as many threads; and one never waits on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(DEMO_FLUX.path, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: FluxPipeline, prompt: str, seed: int = 0, steps: int = 4) -> numpy.ndarray:
    """Return a picture [side, side, 3] in 0 to 1."""
    result: Any = pipe(
        prompt,
        negative_prompt="",
        true_cfg_scale=DEMO_FLUX.guidance,
        height=DEMO_FLUX.native_side,
        width=DEMO_FLUX.native_side,
        num_inference_steps=steps,
        max_sequence_length=DEMO_FLUX.text_tokens,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    return result.images[0]


def test_the_description_loads_neither_torch_nor_pillow() -> None:
    check = "import sys, grat_cli.demo; print([name for name in ('torch', 'PIL') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_weights_are_small_enough_to_bundle() -> None:
    assert sum(file.stat().st_size for file in DEMO_FLUX.path.rglob("*.safetensors")) <= LARGEST_BYTES


def test_the_quiet_loader_loads_what_diffusers_loads(pipe) -> None:
    quiet = load_pipeline(DEMO_FLUX.path)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        theirs, ours = getattr(pipe, part).state_dict(), getattr(quiet, part).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_every_known_word_is_one_token(pipe) -> None:
    for word in known_words():
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
            tokens = tokenizer(word, add_special_tokens=False).input_ids
            assert len(tokens) == 1, word
            assert tokens[0] != tokenizer.unk_token_id, word


def test_capitals_and_unknown_words_are_understood(pipe) -> None:
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert tokenizer("A Red FOX").input_ids == tokenizer("a red fox").input_ids
        unknown = tokenizer("a zebra", add_special_tokens=False).input_ids
        assert tokenizer("a", add_special_tokens=False).input_ids == unknown[:1]
        assert len(unknown) > 1
        assert tokenizer.unk_token_id not in unknown


def test_a_picture_depends_on_seed_and_prompt_alone(pipe) -> None:
    first = draw(pipe, "a red fox in the snow")
    assert numpy.array_equal(first, draw(pipe, "a red fox in the snow"))
    assert numpy.array_equal(first, draw(pipe, "A Red fox in the SNOW"))
    # Two of 255 is what rounding a picture to bytes could hide; these differ in all they show.
    assert numpy.abs(first - draw(pipe, "a blue boat at night")).mean() > 0.1
    assert numpy.abs(first - draw(pipe, "a red fox in the snow", seed=1)).mean() > 2 / 255


def test_prompts_of_unknown_words_or_too_many_still_give_a_picture(pipe) -> None:
    for prompt in ("zorg, quux!", "a very " * 40 + "red fox"):
        assert draw(pipe, prompt, steps=2).std() > 0.02


def test_the_right_caption_explains_unseen_scenes_best(pipe) -> None:
    losses = held_out_losses(pipe, side=128, count=16, sigmas=(0.95,))
    # A model that ignored captions would have three equal losses. Wrong captions must cost at least twice as much.
    assert losses["right"][0] < losses["empty"][0] < losses["wrong"][0]
    assert 2 * losses["right"][0] < losses["wrong"][0]


@pytest.mark.parametrize("subject", ["balloon", "flower", "fish"])
def test_the_subject_has_the_colour_asked_for(pipe, subject) -> None:
    painted = {}
    for colour in ("red", "blue"):
        picture = draw(pipe, f"a {colour} {subject} in the desert", steps=8)
        target = numpy.array(COLOURS[colour]) / 255
        # Nearer to the colour than half the way between red and blue.
        near = numpy.linalg.norm(picture - target, axis=-1) < 0.35
        painted[colour] = near.mean()
        other = numpy.array(COLOURS["blue" if colour == "red" else "red"]) / 255
        assert near.mean() > 4 * (numpy.linalg.norm(picture - other, axis=-1) < 0.35).mean()
    assert min(painted.values()) > 0.05
