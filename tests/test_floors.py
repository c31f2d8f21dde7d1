"""Imports point downward only, and what must start fast loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"grat_kernels": ROOT / "kernels", "grat_cli": ROOT / "grat_cli"}

# Lowest floor first; modules of one floor do not import each other. A name with a star covers a folder, whose modules
# may import each other without a cycle. A package's own name is its __init__, which loads its exports when asked.
FLOORS = (
    # grat_kernels: what is attended, and how it is computed
    (
        "geometry",
        "padded_text",
        "sass",
        "span_kernel",
        "hopper_kernel",
        "rope_norm_kernel",
        "summaries",
        "tile_configs",
        "tile_lists",
    ),
    ("pattern", "ws_kernel", "compilation"),
    ("plan",),
    ("launching",),
    ("reference", "sdpa_backend", "flex_backend", "triton_backend", "ws_backend", "gluon_backend"),
    ("self_test",),
    ("rope_norm",),
    ("attention", "rope_norm_builds"),
    ("aot",),
    ("grat_kernels",),
    # Data and measurement
    ("errors", "ranges", "knapsack", "architectures", "timing", "time_shift", "environment", "progress", "peak_rates"),
    (
        "pages.*",
        "yaml_source",
        "preset_problems",
        "devices",
        "hardware",
        "resolution",
        "report",
        "whole_files",
        "gif_comment",
        "ffmpeg",
    ),
    ("preset_schema", "tensor_files", "video_check", "image_coding", "offloading", "quantization", "picture_files"),
    ("presets", "latents_file", "run_checkpoint", "media", "preview"),
    # What runs when; models and how they are entered
    (
        "schedule",
        "extrapolation",
        "recall",
        "tuning_palette",
        "tuning_preset",
        "adapters",
        "adapters.base",
        "adapters.chunking",
        "adapters.observers",
        "adapters.preparation",
        "demo.*",
        "video_files",
    ),
    ("adapters.flux", "adapters.hunyuan", "models", "attention_record", "query_record", "online_recall"),
    ("guard",),
    ("generation_request", "highres", "installation", "guidance", "hub", "video_size", "components"),
    ("checkpoints", "image_request", "video_request", "denoising", "memory_estimate"),
    ("video_run", "low_resolution_guidance"),
    ("video_decoding",),
    ("grat_cli",),
    ("staged_generation",),
    ("generation", "video_generation", "seeds", "selection"),
    ("makers", "prompt_files"),
    # What people and machines are told
    ("planning", "picture", "pattern_figure", "output", "batch_layout"),
    ("time_estimate", "video_output", "fitting", "batch"),
    ("bench.*",),
    ("options", "comparison", "tuning", "attend"),
    ("attend_figures", "attend_pictures"),
    ("attend_page",),
    ("attend_files",),
    (
        "commands",
        "commands.image",
        "commands.attend",
        "commands.batch",
        "commands.plan",
        "commands.bench",
        "commands.compare",
        "commands.presets",
        "commands.env",
        "commands.info",
        "commands.video",
        "commands.resume",
        "commands.tune",
        "commands.decode",
    ),
    ("app",),
    ("__main__",),
)
KERNEL_FLOORS = 10
NOT_IN_KERNELS = {"diffusers", "transformers", "typer", "yaml", "pydantic", "rich", "PIL", "grat_cli", "grat_presets"}


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


MODULES = _modules()


class _Imports(ast.NodeVisitor):
    """Modules that are imported when code runs, inside functions too; not those for type checkers alone."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "relative imports hide the floor"
        for alias in node.names:
            member = f"{node.module}.{alias.name}"
            self.names.add(member if member in MODULES else str(node.module))


def imports_of(source: str) -> set[str]:
    visitor = _Imports()
    visitor.visit(ast.parse(source))
    return visitor.names


def floor_of(module: str) -> int:
    package, _, name = module.partition(".")
    name = name or package
    for number, names in enumerate(FLOORS):
        in_kernels = number < KERNEL_FLOORS
        covered = name in names or any(n.endswith(".*") and f"{name}.".startswith(n[:-1]) for n in names)
        if covered and in_kernels == (package == "grat_kernels"):
            return number
    raise AssertionError(f"{module} has no floor yet: give it one in tests/test_floors.py")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_lower_floors(module: str) -> None:
    own_floor = floor_of(module)
    for imported in imports_of(MODULES[module].read_text()):
        if imported not in MODULES or imported == module:
            continue
        same_folder = any(
            module.startswith(folder) and imported.startswith(folder)
            for folder in ("grat_cli.demo", "grat_cli.bench", "grat_cli.pages")
        )
        # A package's __init__ hands out what lies beside it.
        assert same_folder or floor_of(imported) < own_floor, f"{module} must not import {imported}"


def test_there_is_no_import_cycle() -> None:
    """Also none inside folders that share a floor; an __init__ that loads its exports when asked closes no cycle."""
    graph = {
        module: {name for name in imports_of(path.read_text()) if name in MODULES and name not in PACKAGES}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    remaining = {module: {name for name in names if name in graph} for module, names in graph.items()}
    while free := [module for module, names in remaining.items() if not names]:
        for module in free:
            del remaining[module]
        for names in remaining.values():
            names.difference_update(free)
    assert not remaining


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("grat_kernels")])
def test_kernels_know_nothing_of_models_or_the_command_line(module: str) -> None:
    packages = {name.partition(".")[0] for name in imports_of(MODULES[module].read_text())}
    assert not packages & NOT_IN_KERNELS


def test_the_check_itself_sees_imports_wherever_they_stand() -> None:
    source = (
        "import a.b\nif TYPE_CHECKING:\n    import c\ndef f():\n    from grat_cli import presets\n    from d import e\n"
    )
    assert imports_of(source) == {"a.b", "grat_cli.presets", "d"}


def test_every_module_on_a_floor_exists() -> None:
    for number, names in enumerate(FLOORS):
        package = "grat_kernels" if number < KERNEL_FLOORS else "grat_cli"
        for name in names:
            assert name.endswith(".*") or name in PACKAGES or f"{package}.{name}" in MODULES


# One process for all: each command runs after the others, so whatever one of them loads shows up.
_LIGHT_COMMANDS = """
import sys
from grat_cli.app import run
codes = [run(arguments) for arguments in (
    ["--help"], ["image", "--help"], ["--version"], ["presets"], ["presets", "demo"], ["presets", "flux-far"],
    ["plan", "flux-x", "--res", "8192"], ["plan", "demo-far", "--json"], ["plan", "--model", "flux-schnell"],
    ["bench", "--help"], ["video", "--help"], ["resume", "--help"], ["decode", "--help"],
    ["info", "missing.png"], ["image", ""], ["bench", "--compare", "grat-c"],
    ["batch", "--help"], ["batch", "none.txt"],
    ["video", ""], ["video", "waves", "--model", "demo", "--res", "huge"], ["resume", "a.mp4"], ["decode", "a.mp4"],
    ["image", "a fox", "--model", "demo", "--res", "1000"], ["attend", ""],
    ["attend", "a fox", "--model", "demo", "--patterns", "na"],
)]
heavy = {"torch", "diffusers", "transformers", "triton"} & set(sys.modules)
print(codes, sorted(heavy), file=sys.stderr)
sys.exit(codes != [0] * 13 + [2] * 3 + [0] + [2] * 8 or bool(heavy))
"""


def test_commands_that_need_no_model_load_no_torch(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LIGHT_COMMANDS], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Q query group" in done.stdout


def test_the_public_package_loads_no_torch_either() -> None:
    code = "import grat_cli, grat_kernels, sys; grat_kernels.build_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
