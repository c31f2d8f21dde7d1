"""How close each pattern comes to full attention on the demo Flux: `make fidelity`.

Sixteen prompts, one seed each; mean SSIM to the picture of full attention with the same seed, beside the density.
The noise floor is full attention on another backend. Neighbourhood attention is sliding tiles of one token.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import grat_cli
from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import load_pipeline
from grat_cli.demo.evaluation import SHEET_PROMPTS
from grat_cli.presets import load_preset, resolve_preset

SIDE = DEMO_FLUX.native_side
# The sample sheet's prompts without the last one, and five more.
PROMPTS = [
    *SHEET_PROMPTS[:-1],
    "a red car in the desert",
    "a white house at night",
    "a brown fox at dusk",
    "a green boat at sea",
    "a yellow flower in the snow",
]
# Name, settings of the demo preset that differ. Every group is 4×4 tokens but where it says so.
PATTERNS: dict[str, list[str]] = {
    "b, radius 1": ["attention.variant=b", "attention.radius=1"],
    "na 13×13": ["attention.variant=sta", "attention.group=[1, 1]", "attention.window=13"],
    "x": ["attention.variant=x"],
    "b, radius 2": ["attention.variant=b", "attention.radius=2"],
    "bx": ["attention.variant=bx", "attention.radius=1"],
    "b, radius 0 + 2×2 at 1 + 4×4 beyond": [
        "attention.variant=b",
        "attention.radius=0",
        "attention.far=[{beyond: 0, block: [2, 2]}, {beyond: 1, block: [4, 4]}]",
    ],
    "b, radius 1 + 4×4 beyond": [
        "attention.variant=b",
        "attention.radius=1",
        "attention.far=[{beyond: 1, block: [4, 4]}]",
    ],
    "b, radius 1 + 2×2 to 3 + 4×4 beyond": [
        "attention.variant=b",
        "attention.radius=1",
        "attention.far=[{beyond: 1, block: [2, 2]}, {beyond: 3, block: [4, 4]}]",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the prompts")
    parser.add_argument("--steps", type=int, default=DEMO_FLUX.steps)
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON and a contact sheet as PNG")
    options = parser.parse_args()
    prompts = PROMPTS[: options.prompts]
    pipe = load_demo()

    def pictures(settings: list[str], backend: str) -> tuple[list[np.ndarray], float, float]:
        """Pictures of all prompts, the density of image pairs and text together, and seconds a picture."""
        preset = resolve_preset(load_preset("demo-full"), set_items=settings)
        made = []
        start = time.perf_counter()
        for seed, prompt in enumerate(track(prompts, description=" ".join(settings) or "full", transient=True)):
            with grat_cli.install(pipe, preset, height=SIDE, width=SIDE, backend=backend) as installation:
                made.append(picture(pipe, prompt, seed, options.steps))
        return made, installation.last_schedule.density, (time.perf_counter() - start) / len(prompts)

    reference, _, _ = pictures([], "sdpa")
    rows = []
    sheet = {"full": reference}
    for name, (settings, backend) in {
        "noise floor: full by flex": ([], "flex"),
        **{name: (settings, "sdpa") for name, settings in PATTERNS.items()},
    }.items():
        made, density, seconds = pictures(settings, backend)
        scores = [
            np.asarray(structural_similarity(a, b, channel_axis=2)).item() for a, b in zip(reference, made, strict=True)
        ]
        with np.errstate(divide="ignore"):  # identical pictures: infinite
            noise = [float(peak_signal_noise_ratio(a, b)) for a, b in zip(reference, made, strict=True)]
        margin = 1.96 * statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan
        rows.append(
            {
                "pattern": name,
                "density": density,
                "ssim": statistics.mean(scores),
                "margin": margin,
                "psnr_db": statistics.mean(noise),
                "seconds": seconds,
            }
        )
        sheet[name] = made
    table = Table(
        title=f"demo Flux, {SIDE}×{SIDE}, {options.steps} steps, {len(prompts)} prompts, against full attention"
    )
    for column in ("pattern", "density", "SSIM", "± (95 %)", "PSNR dB", "s a picture"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    for row in sorted(rows, key=lambda row: row["density"]):
        table.add_row(
            row["pattern"],
            f"{row['density']:.3f}",
            f"{row['ssim']:.3f}",
            f"{row['margin']:.3f}",
            f"{row['psnr_db']:.1f}",
            f"{row['seconds']:.1f}",
        )
    Console().print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "far-field.json").write_text(json.dumps(rows, indent=1) + "\n")
        contact_sheet(sheet).save(options.out / "far-field.png")


def load_demo() -> object:
    """The demo pipeline, in fp32 on the CPU."""
    pipe = load_pipeline(DEMO_FLUX.path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: object, prompt: str, seed: int, steps: int) -> np.ndarray:
    """One picture, `[height, width, 3]` uint8."""
    result = pipe(  # type: ignore[operator]
        prompt,
        negative_prompt="",
        true_cfg_scale=DEMO_FLUX.guidance,
        height=SIDE,
        width=SIDE,
        num_inference_steps=steps,
        max_sequence_length=DEMO_FLUX.text_tokens,
        generator=torch.Generator().manual_seed(seed),
    )
    return np.asarray(result.images[0])


def contact_sheet(pictures: dict[str, list[np.ndarray]]) -> Image.Image:
    """A row a pattern, a column a prompt, at half size."""
    rows = [np.concatenate(row, axis=1) for row in pictures.values()]
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    return sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
