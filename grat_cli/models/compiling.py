"""Compiling: the blocks of transformers by `torch.compile`, each kind of block once, with attention as an operator.

Attention itself is by the same kernels, compiled or not. What a compiler gains is the rest of a block: norms,
modulation, activations and rotation are computed together in place of one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput, first_line

if TYPE_CHECKING:
    import torch

# Step caches whose hooks are around blocks and leave most of a block in one piece. By the others dynamo gives up on a
# block (MagCache), or makes code for each layer and again as its state changes (those in attentions).
_CACHES = ("first-block",)
BACKEND = "inductor"  # torch's own
# Some sizes have code of their own: a text of one token, or a batch of one. Beyond so many forms of a kind of block it
# would run uncompiled without a word.
_MOST_FORMS = 64
# A transformer of 12 billion weights on an H200 saves some 5 microseconds for each token of each step, and compiling
# takes about half a minute there.
_WORTHWHILE_TOKENS = 5_000_000


def require_compile(device: torch.device, offload: str = "none", cache: str | None = None) -> None:
    """Makes sure that a transformer can be compiled.

    Args:
        device: where it runs.
        offload: how weights are offloaded.
        cache: the kind of a step cache, None without one.

    Raises:
        BadInput: if it cannot, with the reason.
    """
    if offload in ("group", "sequential"):
        raise BadInput(
            f"--compile with --offload {offload}: its hooks bring weights in the midst of what is compiled; "
            "use --offload model or none, or leave --compile out"
        )
    if cache not in (None, *_CACHES):
        raise BadInput(
            f"--compile with --cache {cache}: its hooks in blocks and attentions differ from layer to layer and are no "
            f"code for a compiler; use --cache {' or '.join(_CACHES)}, or leave --compile out"
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise BadInput("--compile needs Triton on a CUDA device, which is not installed: leave it out")
    if device.type == "cpu":
        _require_cpp_compiler()
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--compile is for CUDA devices and CPUs, and the run is on {device.type}: leave it out")


def _require_cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of inductor's own kinds
        raise BadInput(
            "--compile needs a C++ compiler on a CPU, such as g++, and there is none: install one, or leave it out"
        ) from error


def compile_blocks(transformers: Iterable[Any]) -> None:
    """Has the repeated blocks of transformers compiled when they are first called, for any size at once: what a run
    computes does not depend on which sizes came before, so one that is taken up goes on the same.

    Raises:
        BadInput: if diffusers compiles none of a transformer's blocks.
    """
    import torch._dynamo
    import torch.fx.experimental._config as shapes

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_FORMS)
    shapes.use_duck_shape = False  # else as many tokens as a head has channels would always have to be as many
    for transformer in transformers:
        transformer.compile_repeated_blocks(dynamic=True, backend=BACKEND)
        lists = [part for part in transformer.children() if isinstance(part, torch.nn.ModuleList)]
        if not any(block._compiled_call_impl is not None for blocks in lists for block in blocks):
            kinds = sorted({type(block).__name__ for blocks in lists for block in blocks})
            raise BadInput(f"--compile: diffusers compiles no blocks of the kind {', '.join(kinds)}: leave it out")


def expectation(token_steps: int) -> str:
    """What is to be said of compiling before a run.

    Args:
        token_steps: image tokens times steps, of all outputs.
    """
    said = "the first step compiles the transformer's blocks, which takes a minute or so"
    if token_steps < _WORTHWHILE_TOKENS:
        said += "; so few steps of so small an output hardly win that back: leave --compile out, or make more at once"
    return said


@contextmanager
def explained_failures() -> Iterator[None]:
    """Around a run: what a compiler fails at is bad input.

    Raises:
        BadInput: with what it said.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        said = first_line(getattr(error, "inner_exception", error))
        raise BadInput(f"the transformer cannot be compiled here: {said}; leave --compile out") from error
