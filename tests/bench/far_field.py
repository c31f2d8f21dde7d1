"""How close each pattern comes to full attention on the demo Flux: `make fidelity`.

The image level of `grat bench` with sixteen prompts, one seed each, and far fields of two levels, which have no names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from grat_cli.bench.contact_sheet import draw
from grat_cli.bench.image_level import PROMPTS, ImageSettings, run_image_level
from grat_cli.bench.tables import bench_tables
from grat_cli.bench.variants import Request, Variant, parse_variants
from grat_cli.demo import DEMO_FLUX
from grat_cli.models import choose_model
from grat_cli.output import Output
from grat_kernels import Block, Far, Grid, Grouping, Union

TOKENS = DEMO_FLUX.native_side // 8
NAMES = "na:window=13,grat-b,grat-x,grat-b:radius=2,grat-bx,grat-far:block=4"


def two_levels(name: str, radius: int, finer_to: int) -> Variant:
    """GRAT-B in groups of 4×4 tokens, means of 2×2 up to a distance in groups, and of 4×4 beyond."""
    grid = Grid((TOKENS, TOKENS))
    pattern = Union(Block(radius), Far([(radius, (2, 2)), (finer_to, (4, 4))]))
    words = f"radius {radius}, means of 2x2 to distance {finer_to}, of 4x4 beyond, groups of 4x4"
    far = [{"beyond": radius, "block": [2, 2]}, {"beyond": finer_to, "block": [4, 4]}]
    section = {"variant": "b", "group": [4, 4], "radius": radius, "far": far}
    return Variant(name, "grat-far", "pattern", words, grid, Grouping(grid, (4, 4)), pattern, section)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts")
    parser.add_argument("--steps", type=int, default=DEMO_FLUX.steps)
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON and a contact sheet as PNG")
    options = parser.parse_args()
    compare: tuple[Request | Variant, ...] = (
        *parse_variants(NAMES),
        two_levels("two-far, radius 0", 0, 1),
        two_levels("two-far, radius 1", 1, 3),
    )
    settings = ImageSettings(
        model=choose_model("demo"),
        compare=compare,
        prompts=PROMPTS[: options.prompts],
        steps=options.steps,
        device="cpu",
        dtype="float32",
    )
    with Output().progress() as progress:
        result, pictures = run_image_level(settings, progress)
    Console().print(*bench_tables(result), sep="\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "far-field.json").write_text(json.dumps(result.as_dict(), indent=1) + "\n")
        draw(pictures.rows, pictures.column_titles).save(options.out / "far-field.png")


if __name__ == "__main__":
    main()
