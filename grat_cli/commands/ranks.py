"""Commands whose outputs several GPUs make together: who runs the command line, and how the outputs are shared."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from grat_cli.console.output import Output, print_error
from grat_cli.errors import BadInput
from grat_cli.generation.sharing import of_launcher
from grat_cli.models.parallel import ALONE, Parallel, choose_parallel

if TYPE_CHECKING:
    import typer

    from grat_cli.commands.options import ParallelOptions
    from grat_cli.generation.checkpoint import Run
    from grat_cli.generation.request import Request
    from grat_cli.generation.world import World


def leave_to_others(context: typer.Context, ranks: ParallelOptions) -> None:
    """Starts the ranks that `--gpus` asks for, or does, as one of them, what the first one says, and ends this process.

    It returns where the command line is to be run here: without ranks, and on the first of them.

    Raises:
        BadInput: if there cannot be so many.
        SystemExit: when it is done; all that is to be said has been.
    """
    ranks.check()
    here = of_launcher(os.environ)
    if here is None:
        if (ranks.gpus or 1) == 1:
            _refuse_alone(ranks)
            return
        from grat_cli.generation.world import launch

        code, why = launch(ranks.gpus or 1, context.find_root().obj or ())
        if why is not None:
            print_error(why)
        sys.exit(code)
    if ranks.gpus not in (None, here.count):
        raise BadInput(f"--gpus {ranks.gpus}, but torchrun has started {here.count}: leave --gpus out")
    if here.rank == 1:
        return
    from grat_cli.console.progress import ProgressDisplay
    from grat_cli.generation.run import follow

    sys.exit(follow(here, ProgressDisplay()))


def _refuse_alone(ranks: ParallelOptions) -> None:
    """Raises BadInput for options that say how several ranks share an output."""
    for flag, given in (("--parallel", ranks.parallel), ("--shard-weights", ranks.shard_weights)):
        if given:
            raise BadInput(f"{flag} is for several GPUs: add --gpus COUNT")


def shared_by(request: Request, ranks: ParallelOptions) -> Parallel:
    """How the ranks that this process leads share outputs; `ALONE` for this process alone.

    Raises:
        BadInput: if they cannot share these outputs.
    """
    if (here := of_launcher(os.environ)) is None:
        return ALONE
    from grat_cli.estimates.components import denoising_shapes
    from grat_cli.families.guidance import calls_per_step
    from grat_cli.generation.stage import stages_for

    calls = min(calls_per_step(request.model, stage.preset, request.negative_prompt) for stage in stages_for(request))
    heads = denoising_shapes(request.model)[0].heads
    return choose_parallel(ranks.parallel or "auto", here.count, heads, calls, shards_weights=ranks.shard_weights)


def led(request: Request, ranks: ParallelOptions, run: Run | None, output: Output) -> World | None:
    """The ranks that make outputs together, which this one leads; None for this process alone.

    Raises:
        BadInput: as `shared_by`.
        RankLost: if they do not come.
    """
    if (here := of_launcher(os.environ)) is None:
        return None
    from grat_cli.generation.machine import foretold
    from grat_cli.generation.world import lead

    parallel, shards_weights = shared_by(request, ranks), ranks.shard_weights
    output.hint(f"{here.count} ranks, {parallel}: {parallel.reason}")
    of_plan = foretold(request, parallel, shards_weights=shards_weights)
    return lead(request, run, here, parallel, shards_weights=shards_weights, foretold=of_plan)
