"""Compiling a kernel for a GPU that is not there, and reading its machine code, by the tools that come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from sass import MachineCode, parse


def compile_for(architecture: str, kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> Any:
    """What Triton makes of a kernel for an architecture such as `sm_90` or `gfx942`.

    Args:
        architecture: by name.
        kernel: Triton's or Gluon's.
        arguments: as launched; tensors may lie on the meta device.
        options: constants and options of the compiler.

    Raises:
        RuntimeError: if Triton runs as an interpreter in this process, which compiles nothing.
    """
    import triton
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver

    driver.set_active(cast(DriverBase, _TargetOnly(architecture)))
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Triton's interpreter compiles nothing: unset TRITON_INTERPRET")
    return kernel.warmup(*arguments, grid=(1,), **options)


class _TargetOnly:
    """Stands where Triton expects a GPU's driver: it names an architecture and runs nothing."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def get_current_device(self) -> str:
        # Triton keeps one compiler per device: each architecture counts as one.
        return self._architecture

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self._architecture.startswith("sm_"):
            return GPUTarget("cuda", int(self._architecture.removeprefix("sm_")), 32)
        return GPUTarget("hip", self._architecture, 64)


class Code(NamedTuple):
    """What is read off machine code; attributes as those of `aot.Build`."""

    registers: int
    spills: int
    spills_in_loops: int
    matrix_loops: int | None
    opcodes: dict[str, int]
    threads: int
    machine: MachineCode | None  # None where it is not NVIDIA's


def read_cuda(
    compiled: Any, matrix_opcode: str, tile_loops: Callable[[MachineCode], tuple[tuple[int, ...], ...]]
) -> Code:
    """Reads a cubin by the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file], **_CAPTURE).stdout
        listing = subprocess.run([tools / "nvdisasm", "-c", file], **_CAPTURE).stdout
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump names no registers: {usage!r}")
    code = parse(listing)
    opcodes = {opcode: code.count(opcode) for opcode in ("HMMA", "HGMMA", "UTC*MMA", "UTMALDG", "LDGSTS")}
    loops = tile_loops(code)
    matrix_loops = code.loops_with(matrix_opcode, among=loops)
    threads = 32 * compiled.metadata.num_warps
    return Code(int(registers[1]), code.spills, code.spills_within(loops), matrix_loops, opcodes, threads, code)


def read_rocm(compiled: Any) -> Code:
    """Reads the figures at the end of an assembly listing, which do not tell where a spill lies."""
    listing = compiled.asm["amdgcn"]
    registers, spills = (
        sum(int(number) for number in re.findall(rf"\.{name}:\s+(\d+)", listing))
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    threads = 64 * compiled.metadata.num_warps
    return Code(registers, spills, spills, None, {"v_mfma": listing.count("v_mfma")}, threads, None)


_CAPTURE: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
