"""Train the demo's HunyuanVideo: `python -m grat_cli.demo.moving.train --help`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Folder = Annotated[Path, typer.Option(help="Folder of the run: its pipeline, training state and encoded clips.")]
Init = Annotated[
    Path | None, typer.Option(help="Pipeline folder a new run starts from; without it, from random weights.")
]
Minutes = Annotated[float, typer.Option(help="Stop after so many minutes, to be continued later.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]


def open_run(folder: Path, init: Path | None, threads: int) -> HunyuanVideoPipeline:
    """Return the pipeline that the run in `folder` starts from, and make the run if there is none."""
    import torch

    from grat_cli.demo.architecture import save_pipeline
    from grat_cli.demo.moving.architecture import build_pipeline, load_pipeline
    from grat_cli.demo.moving.autoencoding import start_as_averages

    torch.set_num_threads(threads)
    start = folder / "pipeline"
    if not start.exists():
        if init is None:
            pipe = build_pipeline()
            start_as_averages(pipe.vae)
        else:
            pipe = load_pipeline(init)
        save_pipeline(pipe, start, half=False)
    elif init:
        typer.echo(f"continuing the run in {folder}, which has begun already: --init is not read", err=True)
    return load_pipeline(start)


@app.command()
def autoencoder(
    folder: Folder,
    init: Init = None,
    decoder_only: Annotated[bool, typer.Option(help="Keep the encoder, so that the transformer stays valid.")] = False,
    steps: Annotated[int, typer.Option(help="Step to stop at.")] = 2_000,
    minutes: Minutes = 1e9,
    batch: Annotated[int, typer.Option(help="Crops per step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Seed of scenes, crops and noise.")] = 1,
    threads: Threads = 2,
) -> None:
    """Train the autoencoder, whose latents the transformer learns, continuing where the run stopped."""
    pipe = open_run(folder, init, threads)
    from grat_cli.demo.architecture import save_pipeline
    from grat_cli.demo.moving.autoencoding import (
        AutoencoderSettings,
        AutoencoderTrainer,
        normalise_latents,
        signal_to_noise,
    )

    settings = AutoencoderSettings(
        decoder_only=decoder_only, steps=steps, batch=batch, learning_rate=learning_rate, seed=seed
    )
    trainer = AutoencoderTrainer(pipe, folder, settings)
    trainer.train(minutes, log=lambda line: print(line, flush=True))
    pipe.vae.eval()
    if not decoder_only:
        normalise_latents(pipe.vae)
    typer.echo(f"{signal_to_noise(pipe.vae):.1f} dB after {trainer.step} steps")
    save_pipeline(pipe, folder / "pipeline", half=False)


@app.command()
def transformer(
    folder: Folder,
    init: Init = None,
    native_from: Annotated[int, typer.Option(help="Step from which on most new clips are of the native size.")] = 2_400,
    steps: Annotated[int, typer.Option(help="Step of the run to stop at.")] = 10_000,
    minutes: Minutes = 1e9,
    tokens: Annotated[int, typer.Option(help="Video tokens per step.")] = 5_000,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    decay: Annotated[int, typer.Option(help="Last steps, over which the rate falls.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of clips and noise.")] = 1,
    threads: Threads = 2,
) -> None:
    """Train the transformer, continuing where the run stopped."""
    pipe = open_run(folder, init, threads)
    from grat_cli.demo.moving.flow import ClipSettings, ClipTrainer

    settings = ClipSettings(
        native_from=native_from,
        steps=steps,
        tokens_per_step=tokens,
        learning_rate=learning_rate,
        decay=decay,
        seed=seed,
    )
    trainer = ClipTrainer(pipe, folder, settings)
    typer.echo(", ".join(f"{field.name} {getattr(settings, field.name)}" for field in fields(settings)))
    trainer.train(minutes, log=lambda line: print(line, flush=True))


def averaged_pipeline(folder: Path, threads: int) -> tuple[HunyuanVideoPipeline, int]:
    """Return the run's pipeline with the averaged weights of its transformer, and the step they are from."""
    state_file = folder / "transformer.pt"
    if not state_file.exists():
        raise typer.BadParameter(f"{folder} holds no trained transformer: run the command transformer on it first")
    import torch

    pipe = open_run(folder, None, threads)
    state = torch.load(state_file)
    pipe.transformer.load_state_dict(state["average"])
    return pipe, state["step"]


@app.command()
def export(folder: Folder, out: Annotated[Path, typer.Option(help="Pipeline folder to write.")]) -> None:
    """Write the averaged weights of a run as a bf16 pipeline folder."""
    pipe, step = averaged_pipeline(folder, threads=1)
    from grat_cli.demo.architecture import save_pipeline

    save_pipeline(pipe, out, half=True)
    typer.echo(f"step {step} written to {out}")


@app.command()
def samples(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Picture to write.")],
    count: Annotated[int, typer.Option(help="Prompts to draw, one row of frames each.")] = 10,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale (true_cfg_scale).")] = 2.0,
    threads: Threads = 2,
) -> None:
    """Draw strips of frames with a run's averaged weights, and print its losses on held-out scenes."""
    pipe, step = averaged_pipeline(folder, threads)
    from grat_cli.demo.moving.evaluation import SAMPLE_PROMPTS, draw_samples, held_out_losses

    sigmas = (0.95, 0.8, 0.5, 0.2)
    typer.echo(f"step {step}, sigmas {sigmas}")
    for caption, losses in held_out_losses(pipe, 12, sigmas).items():
        typer.echo(f"{caption} caption: " + " ".join(f"{loss:.4f}" for loss in losses))
    draw_samples(pipe, SAMPLE_PROMPTS[:count], steps, guidance).save(out)


if __name__ == "__main__":
    app()
