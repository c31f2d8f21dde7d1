"""Transformers whose weights ranks share, and what they predict; with all weights on one rank as well."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import tiny_flux
import torch
from shared_calls import STEPS
from small_transformers import MODELS, Run
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import grat_cli
from grat_cli.demo import DEMO_FLUX
from grat_cli.families import FAMILIES
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import load_model
from grat_cli.models.sharding import shard_weights
from grat_cli.models.weights import Lora, Weights
from grat_cli.presets import Preset
from grat_kernels import Backend


class Sharded(NamedTuple):
    """Of a transformer.

    Attributes:
        predictions: `[steps, ...]`.
        share: of the bytes of weights that this rank holds after calls.
        whole: blocks that are whole at the end of one, at most.
        chunking: of the adapter.
    """

    predictions: torch.Tensor
    share: float
    whole: int
    chunking: tuple[int | None, str]


def sharded(
    ranks: ProcessGroup | None, names: Sequence[str], *, chunk: int | None = None, is_call_shared: bool = False
) -> dict[str, Sharded]:
    """Of the small transformer of each family, with GRAT, at steps with other plans.

    Args:
        ranks: that share the weights; None for one that has them all.
        names: of families.
        chunk: most tokens of a chunk.
        is_call_shared: whether they share calls, too.
    """
    made = {}
    for name in names:
        kind = MODELS[name]
        model: Any = kind.make()
        size = sum(parameter.nbytes for parameter in model.parameters())
        if ranks is not None:
            shard_weights(model, DeviceMesh.from_group(ranks, "cpu"))
        adapter = kind.adapter(model, kind.grids[0], chunk_tokens=chunk, ranks=ranks if is_call_shared else None)
        run, whole, outputs = Run(adapter), [0], []

        def count(*_: Any, blocks: Any = adapter.blocks, whole: list[int] = whole) -> None:
            parameters = [next(block.parameters()) for block in blocks]
            whole.append(sum(not isinstance(parameter, DTensor) for parameter in parameters))

        for block in adapter.blocks:
            block.register_forward_pre_hook(count)
        with torch.no_grad(), adapter.attached(run, Backend.SDPA):
            for run.step in range(STEPS):
                output: Any = model(**kind.inputs(adapter.grid))
                outputs.append(output[0] if isinstance(output, tuple) else output.sample)
        share = sum(local(parameter).nbytes for parameter in model.parameters()) / size
        made[name] = Sharded(torch.stack(outputs), share, max(whole), adapter.chunking)
    return made


def local(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def held(ranks: ProcessGroup | None) -> tuple[int, int]:
    """Bytes of the tensors of a small Flux before and after a call."""

    def count() -> int:
        gc.collect()
        storages = [local(one).untyped_storage() for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    given = tiny_flux.inputs(4, 4)
    others = count()
    model = tiny_flux.transformer()
    if ranks is not None:
        shard_weights(model, DeviceMesh.from_group(ranks, "cpu"))
    before = count()
    with torch.no_grad():
        model(**given)
    return before - others, count() - others


class Ran(NamedTuple):
    """A run of a pipeline that was loaded.

    Attributes:
        made: latents or pixels.
        shares: of the bytes of weights of each transformer that this rank holds.
        dtypes: of their weights.
        elsewhere: weights in other parts that ranks share.
    """

    made: torch.Tensor
    shares: list[float]
    dtypes: set[torch.dtype]
    elsewhere: list[str]


def _ran(pipe: Any, made: torch.Tensor) -> Ran:
    transformers = [one for name, one in pipe.components.items() if name.startswith("transformer")]
    weights = [list(one.parameters()) for one in transformers if one is not None]
    rest = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module) and part not in transformers]
    return Ran(
        made,
        [sum(local(one).nbytes for one in own) / sum(one.nbytes for one in own) for own in weights],
        {one.dtype for own in weights for one in own},
        [name for part in rest for name, one in part.named_parameters() if isinstance(one, DTensor)],
    )


def runs(ranks: ProcessGroup | None, wan: str, lora: str) -> tuple[Ran, Ran]:
    """Of Wan's two transformers, in bf16 but for what is always in fp32; and of the demo with a LoRA and a step cache.

    Args:
        ranks: that share the weights; None for one that has them all.
        wan: a folder.
        lora: a file.
    """
    mesh = None if ranks is None else DeviceMesh.from_group(ranks, "cpu")
    cpu = torch.device("cpu")
    choice = choose_model(wan, "video")
    pipe = load_model(choice, device=cpu, dtype=torch.bfloat16, shard_over=mesh).pipe
    text = FAMILIES["wan"].encode_text(pipe, choice, "a red fox", None)
    size: dict[str, Any] = {"height": 48, "width": 64, "num_frames": 9}
    preset = Preset.model_validate({"name": "own", "model": "wan", "attention": {"variant": "b", "group": [2, 2, 2]}})
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(5), "guidance_scale": 1.0}
    with grat_cli.install(pipe, preset, **size):
        latents = pipe(**size, **text, **options, num_inference_steps=3, output_type="latent").frames
    of_wan = _ran(pipe, latents)

    weights = Weights(loras=(Lora(source=lora),))
    pipe = load_model(choose_model("demo"), device=cpu, dtype=torch.float32, weights=weights, shard_over=mesh).pipe
    size = {"height": 64, "width": 64}
    with grat_cli.install(pipe, "demo-b", **size, cache="first-block"):
        pixels = pipe(
            "a red fox",
            num_inference_steps=3,
            max_sequence_length=DEMO_FLUX.text_tokens,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **size,
        ).images
    return of_wan, _ran(pipe, pixels)


class Everything(NamedTuple):
    """Of transformers as they are, and where ranks share calls as well and tokens come in chunks; bytes of `held`; and
    runs of pipelines."""

    plain: dict[str, Sharded]
    shared: dict[str, Sharded]
    held: tuple[int, int]
    runs: tuple[Ran, Ran]


def alone(_: ProcessGroup, wan: str, lora: str) -> Everything:
    """By one process, which holds no tensors of other tests."""
    return everything(None, wan, lora)


def everything(ranks: ProcessGroup | None, wan: str, lora: str) -> Everything:
    """By one group of processes; arguments are those of `runs`."""
    return Everything(
        sharded(ranks, tuple(MODELS)),
        sharded(ranks, ("flux", "wan"), chunk=16, is_call_shared=ranks is not None),
        held(ranks),
        runs(ranks, wan, lora),
    )
