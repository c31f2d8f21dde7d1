"""Train the demo's Flux: `python -m grat_cli.demo.train --help`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Folder = Annotated[Path, typer.Option(help="Folder of the run: its pipeline, training state and encoded scenes.")]
Init = Annotated[
    Path | None, typer.Option(help="Pipeline folder a new run starts from; without it, from random weights.")
]
Threads = Annotated[int, typer.Option(help="CPU threads.")]


def open_run(folder: Path, init: Path | None, threads: int):
    """Return the pipeline that the run in `folder` starts from, and make the run if there is none."""
    import torch

    from grat_cli.demo.architecture import build_pipeline, load_pipeline, save_pipeline

    torch.set_num_threads(threads)
    start = folder / "pipeline"
    if not start.exists():
        pipe = load_pipeline(init) if init else build_pipeline()
        save_pipeline(pipe, start, half=False)
    return load_pipeline(start)


@app.command()
def transformer(
    folder: Folder,
    init: Init = None,
    resolution: Annotated[int, typer.Option(help="Side of the training pictures in pixels.")] = 128,
    steps: Annotated[int, typer.Option(help="Step of the run to stop at.")] = 10_000,
    minutes: Annotated[float, typer.Option(help="Stop after so many minutes, to be continued later.")] = 1e9,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    decay: Annotated[int, typer.Option(help="Last steps, over which the rate falls.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of pictures and noise.")] = 1,
    threads: Threads = 2,
) -> None:
    """Train the transformer, continuing where the run stopped."""
    pipe = open_run(folder, init, threads)
    from grat_cli.demo.flow import FlowSettings, FlowTrainer

    settings = FlowSettings(
        side=resolution, steps=steps, batch=batch, learning_rate=learning_rate, decay=decay, seed=seed
    )
    trainer = FlowTrainer(pipe, folder, settings)
    typer.echo(", ".join(f"{field.name} {getattr(settings, field.name)}" for field in fields(settings)))
    trainer.train(minutes, log=lambda line: print(line, flush=True))


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Pipeline folder to write.")],
) -> None:
    """Write the averaged weights of a run as a bf16 pipeline folder."""
    import torch

    from grat_cli.demo.architecture import save_pipeline

    pipe = open_run(folder, None, threads=2)
    state = torch.load(folder / "transformer.pt")
    pipe.transformer.load_state_dict(state["average"])
    save_pipeline(pipe, out, half=True)
    typer.echo(f"step {state['step']} written to {out}")


if __name__ == "__main__":
    app()
