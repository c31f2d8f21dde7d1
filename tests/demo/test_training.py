"""Training of the demo's transformer and autoencoder, at a size that takes seconds."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift
from typer.testing import CliRunner

from grat_cli.demo import DEMO_FLUX, precision
from grat_cli.demo.architecture import build_pipeline, load_pipeline, save_pipeline
from grat_cli.demo.autoencoding import AutoencoderSettings, AutoencoderTrainer
from grat_cli.demo.flow import draw_sigmas
from grat_cli.demo.picture_flow import PictureSettings, PictureTrainer, image_positions, time_shift, use_plain_attention
from grat_cli.demo.train import app

SETTINGS = PictureSettings(side=16, steps=6, batch=4, warm_up=2, decay=2, save_every=100)
STREAM = {"shard_size": 4, "window": 2, "reuse": 2}  # a new shard every second step


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """At these sizes threads only wait for each other, for minutes when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return load_pipeline(DEMO_FLUX.path)


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_resuming_changes_no_bit(pipe, tmp_path) -> None:
    whole = PictureTrainer(pipe, tmp_path / "whole", SETTINGS, **STREAM)
    whole.train()
    stopped = PictureTrainer(pipe, tmp_path / "halves", SETTINGS, **STREAM)
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    resumed = PictureTrainer(pipe, tmp_path / "halves", SETTINGS, **STREAM)
    resumed.train()
    assert resumed.step == whole.step == SETTINGS.steps
    assert torch.equal(weights_of(resumed.master), weights_of(whole.master))
    assert torch.equal(weights_of(resumed.average), weights_of(whole.average))
    assert not torch.equal(weights_of(whole.master), weights_of(pipe.transformer))


def test_another_seed_trains_another_model(pipe, tmp_path) -> None:
    trained = []
    for seed in (1, 2):
        trainer = PictureTrainer(pipe, tmp_path / str(seed), PictureSettings(side=16, batch=4, seed=seed), **STREAM)
        trainer.train_step()
        trained.append(weights_of(trainer.master))
    assert not torch.equal(*trained)


def test_a_new_model_learns(tmp_path) -> None:
    trainer = PictureTrainer(build_pipeline(), tmp_path, PictureSettings(side=16, batch=8, warm_up=1), shard_size=8)
    losses = [trainer.train_step() for _ in range(30)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_orthogonalises_in_what_the_cpu_is_fast_in(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "training_dtype", lambda: dtype)
    gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros(24, 40))
    weight.grad = gradient.clone()
    with precision.orthogonalising():
        torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0).step()
    # Newton-Schulz (Jordan, "Muon: an optimizer for hidden layers"), five times, in fp64.
    exact = gradient.double() / gradient.double().norm()
    for _ in range(5):
        gram = exact @ exact.T
        exact = 3.4445 * exact + (2.0315 * gram @ gram - 4.7750 * gram) @ exact
    error = float((weight.detach().double() + exact).abs().max())
    assert (error < 1e-5) == (dtype is torch.float32)
    assert error < 0.05


def test_the_same_seed_builds_the_same_pipeline() -> None:
    first, again = build_pipeline(), build_pipeline()
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert torch.equal(weights_of(getattr(first, part)), weights_of(getattr(again, part)))


def test_an_exported_run_holds_the_averaged_weights(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    trainer = PictureTrainer(pipe, tmp_path / "run", SETTINGS, **STREAM)
    trainer.train_step()
    trainer.save()
    result = CliRunner().invoke(app, ["export", "--folder", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    exported = FluxPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16, local_files_only=True)
    assert torch.equal(weights_of(exported.transformer), weights_of(trainer.average).bfloat16())
    assert str(tmp_path) not in "".join(file.read_text() for file in Path(tmp_path / "out").rglob("*.json"))


def test_a_run_without_weights_is_refused(tmp_path) -> None:
    for command in ("export", "samples"):
        result = CliRunner().invoke(app, [command, "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        # Typer frames its complaint, and breaks lines where the folder's name has them end.
        assert "no trained transformer" in " ".join(result.output.replace("│", " ").split())
    assert not any(tmp_path.iterdir())


def test_a_saved_pipeline_can_replace_the_one_it_was_loaded_from(pipe, tmp_path) -> None:
    save_pipeline(pipe, tmp_path / "pipeline", half=False)
    save_pipeline(load_pipeline(tmp_path / "pipeline"), tmp_path / "pipeline", half=False)
    again = load_pipeline(tmp_path / "pipeline")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert torch.equal(weights_of(getattr(again, part)), weights_of(getattr(pipe, part)))
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_seeds_that_would_reach_the_held_out_scenes_are_refused(pipe, tmp_path) -> None:
    with pytest.raises(ValueError, match="seed"):
        PictureTrainer(pipe, tmp_path, PictureSettings(side=16, batch=4, seed=1000), **STREAM)


def test_positions_are_those_of_the_pipeline(pipe) -> None:
    rows = DEMO_FLUX.native_side // 8
    theirs = pipe._prepare_latent_image_ids(1, rows, rows, torch.device("cpu"), torch.float32)
    assert torch.equal(image_positions(rows), theirs)
    halved = image_positions(rows // 2).view(rows // 2, rows // 2, 3)
    # A token of the small picture lies in the middle of the four that cover the same square of the large one.
    assert torch.equal(halved, theirs.view(rows // 2, 2, rows // 2, 2, 3).mean((1, 3)))


def test_noise_levels_are_shifted_as_the_scheduler_does(pipe) -> None:
    config = pipe.scheduler.config
    for tokens in (256, 1024):
        mu = calculate_shift(
            tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        shift = time_shift(pipe.scheduler, tokens)
        theirs = pipe.scheduler.time_shift(mu, 1.0, torch.tensor([0.25]))
        assert (shift * 0.25 / (1 + (shift - 1) * 0.25)) == pytest.approx(theirs.item(), rel=1e-6)
    sigmas = draw_sigmas(20_000, shift, torch.Generator().manual_seed(0))
    # The shift is monotonic: the median of times, one half, goes to shift / (1 + shift). Its deviation is below 0.01.
    assert sigmas.median().item() == pytest.approx(shift / (1 + shift), abs=0.02)
    assert 0 < sigmas.min() < 0.05 < 0.95 < sigmas.max() <= 1


def test_plain_attention_is_flux_attention(pipe) -> None:
    inputs = {
        "hidden_states": torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([0.3, 0.8]),
        "pooled_projections": torch.ones(2, 64),
        "encoder_hidden_states": torch.ones(2, 24, 128),
        "txt_ids": torch.zeros(24, 3),
        "img_ids": image_positions(4),
        "return_dict": False,
    }
    transformer = load_pipeline(DEMO_FLUX.path).transformer
    with torch.no_grad():
        stock = transformer(**inputs)[0]
        use_plain_attention(transformer)
        plain = transformer(**inputs)[0]
    # Both sum in another order in fp32: five blocks of rounding errors of 2^-24 each, in sums of up to 960 terms.
    assert (plain - stock).abs().max() <= 5 * 960 * 2**-24 * stock.abs().max()


@pytest.mark.parametrize("decoder_only", [True, False])
def test_training_the_autoencoder_resumes_and_can_spare_the_encoder(pipe, tmp_path, decoder_only) -> None:
    settings = AutoencoderSettings(decoder_only=decoder_only, side=64, crop=32, steps=4, batch=2, pool=4)
    encoder = weights_of(pipe.vae.encoder).clone()

    def trainer(folder: Path) -> AutoencoderTrainer:
        folder.mkdir(exist_ok=True)
        return AutoencoderTrainer(load_pipeline(DEMO_FLUX.path), folder, settings)

    whole, stopped = trainer(tmp_path / "whole"), trainer(tmp_path / "halves")
    whole.train()
    for _ in range(2):
        stopped.train_step()
    stopped.save()
    resumed = trainer(tmp_path / "halves")
    resumed.train()
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert torch.equal(weights_of(whole.model.encoder), encoder) == decoder_only
