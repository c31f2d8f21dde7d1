"""The demo's moving scenes, and the training of its video model at a size that takes seconds."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from typer.testing import CliRunner

from grat_cli.demo.architecture import save_pipeline
from grat_cli.demo.moving import clips as clips_module
from grat_cli.demo.moving.architecture import (
    FRAMES_PER_LATENT,
    build_autoencoder,
    build_llama_tokenizer,
    build_pipeline,
    load_pipeline,
)
from grat_cli.demo.moving.autoencoding import (
    AutoencoderSettings,
    AutoencoderTrainer,
    mean_latents,
    normalise_latents,
    signal_to_noise,
    start_as_averages,
    to_tensor,
)
from grat_cli.demo.moving.clips import ClipStream, Shape, draw_shard, encode_captions, token_positions
from grat_cli.demo.moving.flow import ClipSettings, ClipTrainer, use_plain_attention
from grat_cli.demo.moving.scenes import LIGHTS, MOTIONS, PAINTS, View, draw_scene, known_words
from grat_cli.demo.moving.train import app

TINY = Shape(48, 32, 5, 1.0)
TINY_WINDOW = Shape(48, 32, 5, 1.0, canvas=(96, 64))
SETTINGS = ClipSettings(steps=6, tokens_per_step=24, warm_up=2, decay=2, native_from=2, save_every=100)
STREAM = {"shard_tokens": 36, "window": 2, "first_window": 1, "steps_per_shard": 2}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """At these sizes threads only wait for each other, for minutes when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untrained") / "pipeline"
    save_pipeline(build_pipeline(), folder, half=False)
    return folder


@pytest.fixture
def pipe(folder):
    return load_pipeline(folder)


@pytest.fixture
def tiny_shapes(monkeypatch) -> None:
    shapes = {"small": ((TINY, 1.0),), "native": ((TINY_WINDOW, 0.5), (TINY, 0.5))}
    monkeypatch.setattr(clips_module, "shapes_of", shapes.__getitem__)


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_the_seed_decides_the_scene() -> None:
    view = View.whole(64, 36)
    first, again, other = (draw_scene(seed) for seed in (7, 7, 8))
    assert first.caption == again.caption
    assert numpy.array_equal(first.frames(view, 0, 3), again.frames(view, 0, 3))
    assert not numpy.array_equal(first.frames(view, 0, 3), other.frames(view, 0, 3))


@pytest.mark.parametrize("size", [(320, 180), (96, 160), (100, 100)])
def test_a_window_is_a_part_of_the_whole_picture(size) -> None:
    width, height = size
    for seed in range(12):
        scene = draw_scene(seed)
        whole = scene.frames(View.whole(width, height), 9, 1)[0]
        part = scene.frames(View(width, height, 16, 32, 48, 40), 9, 1)[0]
        differs = (part != whole[32:72, 16:64]).any(-1)
        # Pillow rounds corners that lie left of or above a picture the other way: an edge may move by half a pixel.
        assert differs.mean() < 0.05, scene.caption


def test_every_scene_moves_at_every_time() -> None:
    view = View.whole(64, 36)
    for seed in range(60):
        scene = draw_scene(seed)
        early, late = scene.frames(view, 0, 9), scene.frames(view, 24, 9)
        for frames in (early, late):
            changed = numpy.abs(frames[0].astype(int) - frames[8]).max(-1) > 24
            assert changed.mean() > 0.004, (scene.caption, changed.mean())


def test_captions_say_what_is_drawn() -> None:
    scenes = [draw_scene(seed) for seed in range(600)]
    words = set(known_words())
    nouns = {"waves": {"waves", "sea"}, "boat": {"boat"}, "sun": {"sun", "sunrise"}, "ball": {"ball"}, "snow": {"snow"}}
    for scene in scenes:
        said = set(scene.caption.split())
        assert said <= words
        assert said & nouns[scene.motion], scene.caption
        assert not said & set(PAINTS) - {scene.paint}
        assert ("night" in said) == (scene.light == "night")
        assert ("sunset" in said) == (scene.light == "sunset")
    assert {scene.motion for scene in scenes} == set(MOTIONS)
    assert {scene.light for scene in scenes} == set(LIGHTS)


def test_the_template_is_as_long_as_the_pipeline_cuts_off() -> None:
    tokenizer = build_llama_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format("Waves at NIGHT, zyx")).input_ids
    )
    assert tokens[DEFAULT_PROMPT_TEMPLATE["crop_start"] :] == ["waves", "at", "night", ",", "<unk>", "<|eot_id|>"]
    assert "<unk>" not in tokens[: DEFAULT_PROMPT_TEMPLATE["crop_start"]]


def test_every_known_word_is_one_token() -> None:
    tokenizer = build_llama_tokenizer()
    for word in known_words():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1


def test_embeddings_depend_on_the_caption_alone(pipe) -> None:
    prompt, valid, pooled = encode_captions(pipe, ["waves at night", "a red boat"])
    alone, _, pooled_alone = encode_captions(pipe, ["a red boat"])
    assert valid.sum(1).tolist() == [4, 4]
    torch.testing.assert_close(prompt[1, :4], alone[0, :4])
    torch.testing.assert_close(pooled[1], pooled_alone[0])
    assert (prompt[0, :3] - prompt[1, :3]).abs().max() > 0.5
    assert (pooled[0] - pooled[1]).abs().max() > 0.5


def test_the_untrained_autoencoder_passes_colours() -> None:
    torch.manual_seed(0)
    autoencoder = build_autoencoder()
    start_as_averages(autoencoder)
    # A picture of one colour has a mean squared error of about 0.12 (15 dB) on these scenes.
    assert signal_to_noise(autoencoder, 1) > 15


def test_normalised_latents_change_no_pixel() -> None:
    torch.manual_seed(0)
    autoencoder = build_autoencoder()
    start_as_averages(autoencoder)
    clip = to_tensor(draw_scene(3).frames(View.whole(64, 64), 0, 5))

    def round_trip() -> torch.Tensor:
        with torch.no_grad():
            return autoencoder.decode(mean_latents(autoencoder, clip), return_dict=False)[0]

    before = round_trip()
    normalise_latents(autoencoder, crops=12)
    torch.testing.assert_close(round_trip(), before, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        latents = torch.cat(
            [mean_latents(autoencoder, to_tensor(draw_scene(n).frames(View.whole(64, 64), 0, 9))) for n in range(8)]
        )
        encoded: Any = autoencoder.encode(clip)
    assert 0.3 < latents.std() < 3
    torch.testing.assert_close(encoded.latent_dist.sample(), encoded.latent_dist.mean, atol=1e-4, rtol=0)


def test_positions_of_whole_native_clips_are_those_of_the_transformer(pipe) -> None:
    native = clips_module.NATIVE[0]
    latents, rows, columns = 2, native.height // 16, native.width // 16
    positions = token_positions(latents, rows, columns, (0, 0, 0), stretched=True)
    given = torch.zeros(1, 8, latents, 2 * rows, 2 * columns)
    trainer_like: Any = pipe.transformer.rope(given)
    own = pipe.transformer.rope
    rebuilt = torch.cat(
        [
            clips_module.torch.outer(
                positions[:, axis],
                1.0 / own.theta ** (torch.arange(0, size, 2)[: size // 2].float() / size),
            ).repeat_interleave(2, 1)
            for axis, size in enumerate(own.rope_dim)
        ],
        1,
    )
    torch.testing.assert_close(rebuilt.cos(), trainer_like[0])


def test_small_clips_cover_the_native_positions() -> None:
    positions = token_positions(5, 5, 8, (0, 0, 0), stretched=True)
    # 5x8 small tokens over 9x16 native ones, of about the same shape: no token lies farther out than the native ones.
    assert positions[:, 1].min() >= 0
    assert positions[:, 1].max() <= 9
    assert positions[:, 2].min() >= 0
    assert positions[:, 2].max() <= 15
    assert positions[:, 0].max() == 4


def test_a_window_holds_the_latents_of_its_place(pipe) -> None:
    shard = draw_shard(pipe, 5, TINY_WINDOW, 11, 2)
    frames_of_latents = (TINY_WINDOW.frames - 1) // FRAMES_PER_LATENT + 1
    assert shard.latents.shape == (2, 8, frames_of_latents, 4, 6)
    assert len(shard.positions) == frames_of_latents * 2 * 3
    assert shard.positions[:, 1].max() <= 3
    assert shard.positions[:, 2].max() <= 5
    assert torch.equal(shard.latents, draw_shard(pipe, 5, TINY_WINDOW, 11, 2).latents)


def test_plain_attention_is_the_stock_attention(pipe) -> None:
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    prompt, valid, pooled = encode_captions(pipe, ["waves", "a red boat sailing at night"])
    call = {
        "hidden_states": torch.randn(2, 8, 2, 4, 6, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": prompt,
        "encoder_attention_mask": valid,
        "pooled_projections": pooled,
        "return_dict": False,
    }
    with torch.no_grad():
        stock = pipe.transformer(**call)[0]
        use_plain_attention(pipe.transformer)
        plain = pipe.transformer(**call)[0]
    torch.testing.assert_close(plain, stock, atol=1e-5, rtol=1e-4)
    assert stock.abs().max() > 0.1


def test_the_stream_changes_from_small_to_native(tiny_shapes, pipe, tmp_path) -> None:
    stream = ClipStream(pipe, tmp_path, native_from=4, seed=1, tokens_per_step=12, **STREAM)
    first = stream.batch(0, torch.Generator().manual_seed(0))
    assert len(first.latents) == 1
    late = [stream.batch(step, torch.Generator().manual_seed(step)) for step in (20, 24, 28, 32)]
    # Whole small pictures are stretched over the native positions, windows are not.
    assert first.positions[:, 1].unique().diff().min() > 1
    assert any(batch.positions[:, 1].unique().diff().min() == 1 for batch in late)
    assert len(list(tmp_path.glob("*.pt"))) == STREAM["window"]


def test_resuming_changes_no_bit(tiny_shapes, pipe, tmp_path) -> None:
    whole = ClipTrainer(pipe, tmp_path / "whole", SETTINGS, **STREAM)
    whole.train()
    stopped = ClipTrainer(pipe, tmp_path / "halves", SETTINGS, **STREAM)
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    resumed = ClipTrainer(pipe, tmp_path / "halves", SETTINGS, **STREAM)
    resumed.train()
    assert resumed.step == whole.step == SETTINGS.steps
    assert torch.equal(weights_of(resumed.master), weights_of(whole.master))
    assert torch.equal(weights_of(resumed.average), weights_of(whole.average))
    assert not torch.equal(weights_of(whole.master), weights_of(pipe.transformer))


def test_a_new_autoencoder_learns_and_resumes(pipe, tmp_path) -> None:
    start_as_averages(pipe.vae)
    settings = AutoencoderSettings(crop=32, frames=5, steps=40, batch=1, pool=1, refresh=0, save_every=100)
    trainer = AutoencoderTrainer(pipe, tmp_path, settings)
    losses = [trainer.train_step() for _ in range(30)]
    assert sum(losses[-6:]) < sum(losses[:6])
    trainer.save()
    resumed = AutoencoderTrainer(pipe, tmp_path, settings)
    assert (resumed.step, resumed.train_step()) == (30, trainer.train_step())


def test_an_exported_run_holds_the_averaged_weights(tiny_shapes, folder, tmp_path) -> None:
    pipe = load_pipeline(folder)
    save_pipeline(pipe, tmp_path / "run" / "pipeline", half=False)
    trainer = ClipTrainer(pipe, tmp_path / "run", SETTINGS, **STREAM)
    trainer.train_step()
    trainer.save()
    result = CliRunner().invoke(app, ["export", "--folder", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    exported = load_pipeline(tmp_path / "out")
    assert torch.equal(weights_of(exported.transformer), weights_of(trainer.average).bfloat16().float())
    assert str(tmp_path) not in "".join(file.read_text() for file in Path(tmp_path / "out").rglob("*.json"))


def test_a_run_without_weights_is_refused(tmp_path) -> None:
    for command in ("export", "samples"):
        result = CliRunner().invoke(app, [command, "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        # Typer frames its complaint, and breaks lines where the folder's name has them end.
        assert "no trained transformer" in " ".join(result.output.replace("│", " ").split())


def test_seeds_that_would_reach_the_held_out_scenes_are_refused(pipe, tmp_path) -> None:
    with pytest.raises(ValueError, match="seed"):
        ClipTrainer(pipe, tmp_path, ClipSettings(seed=1000), **STREAM)
