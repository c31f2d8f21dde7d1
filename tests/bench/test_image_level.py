"""Whole runs of the demo with pictures: what is made, compared, skipped and recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import grat, refusal
from PIL import Image

import grat_cli
from grat_cli.bench.inside_models import Host, stock_attention
from grat_cli.bench.measure import Unwatched
from grat_cli.bench.request import BenchRequest
from grat_cli.bench.results import BenchResult, Row
from grat_cli.bench.whole_runs import NOISE_FLOOR, Pictures, RunSettings, compare_runs, noise_floor
from grat_cli.demo import DEMO_FLUX, unknown_words, vocabulary
from grat_cli.demo.architecture import load_pipeline
from grat_cli.errors import BadInput
from grat_cli.families import FAMILIES
from grat_cli.fidelity.prompts import built_in_prompts
from grat_cli.fidelity.quality import compare
from grat_cli.fidelity.variants import Variant, parse_variants
from grat_cli.models.catalogue import choose_model
from grat_kernels import Backend, Block, Grid, Grouping

WIDTH, HEIGHT, STEPS = 96, 80, 2
PROMPTS = built_in_prompts("image")
GRID = Grid((HEIGHT // 8, WIDTH // 8))
NAMES = ("grat-b:group=4:radius=0", "na:window=5", "clear:window=3")


class Progress(Unwatched):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def settings(**changes: Any) -> RunSettings:
    given: dict[str, Any] = {
        "model": choose_model("demo"),
        "compare": parse_variants(",".join(("full", *NAMES))),
        "prompts": PROMPTS[:2],
        "width": WIDTH,
        "height": HEIGHT,
        "steps": STEPS,
        "device": "cpu",
        "dtype": "float32",
    }
    return RunSettings(**(given | changes))


def rows(result: BenchResult) -> dict[str, Row]:
    return {row.name: row for row in result.cases[0].rows}


@pytest.fixture(scope="module")
def run() -> tuple[BenchResult, Pictures, Progress]:
    progress = Progress()
    return *compare_runs(settings(seeds_per_prompt=2), progress), progress


def stock_pipe() -> Any:
    pipe: Any = load_pipeline(DEMO_FLUX.path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, prompt: str = PROMPTS[0], *, seed: int = 0, steps: int = 4) -> Any:
    """A picture by a pipeline of diffusers."""
    return pipe(
        prompt,
        negative_prompt="",
        true_cfg_scale=DEMO_FLUX.guidance,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        max_sequence_length=DEMO_FLUX.text_tokens,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


def largest_difference(one: Any, other: Any) -> int:
    """In grey levels; between processes or buffers of another alignment, sums may differ in their last bit."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def test_every_row_has_a_time_and_a_picture_for_every_prompt_and_seed(run: Any) -> None:
    result, pictures, progress = run
    names = ["full", *NAMES, NOISE_FLOOR]
    assert list(rows(result)) == [name for name, _ in pictures.rows] == names
    assert pictures.column_titles == [f"{PROMPTS[number % 2]}, seed {number}" for number in range(4)]
    assert all(len(made) == 4 and made[0].size == (WIDTH, HEIGHT) for _, made in pictures.rows)
    for row in rows(result).values():
        assert row.skipped is None
        assert len(row.times_ms) == 4
        assert len(row.step_times_ms) == STEPS
        assert row.attention_ms is not None
        assert 0 < row.attention_ms < sum(row.step_times_ms) < 2 * max(row.times_ms)
    assert progress.steps == [(done, 20) for done in range(1, 21)] + [(1, 2), (2, 2)]
    assert progress.phases == ["loading the model", "warming up", "making pictures", "measuring recall"]
    assert BenchResult.from_json(json.dumps(result.as_dict(), allow_nan=False)).cases == result.cases


def test_pictures_of_full_attention_are_those_of_stock_diffusers(run: Any) -> None:
    _, pictures, _ = run
    pipe = stock_pipe()
    for number, made in enumerate(pictures.rows[0][1]):
        assert largest_difference(drawn(pipe, PROMPTS[number % 2], seed=number, steps=STEPS), made) <= 1


def test_quality_is_that_of_the_pictures_beside_those_of_full_attention(run: Any) -> None:
    result, pictures, _ = run
    made = dict(pictures.rows)
    found = rows(result)
    assert found["full"].quality is None
    for name in (*NAMES, NOISE_FLOOR):
        assert found[name].quality == compare(made["full"], made[name])
    floor, pattern = found[NOISE_FLOOR].quality, found[NAMES[0]].quality
    assert floor is not None
    assert pattern is not None
    assert floor.ssim > 0.999 > pattern.ssim
    assert (found[NOISE_FLOOR].role, found[NOISE_FLOOR].kernel) == ("noise floor", "flex")


def test_the_record_says_what_was_made(run: Any) -> None:
    result, _, _ = run
    assert result.level == "image"
    recorded = result.settings
    assert (recorded["model"], recorded["steps"], recorded["guidance"]) == ("demo", STEPS, DEMO_FLUX.guidance)
    assert (recorded["prompts"], recorded["seeds"]) == (list(PROMPTS[:2]), [0, 1, 2, 3])
    assert result.cases[0].title == f"{WIDTH}x{HEIGHT} pixels"
    assert result.cases[0].grid == GRID.shape


def test_windows_are_judged_as_patterns_are(run: Any) -> None:
    result, _, progress = run
    found = rows(result)
    for name in NAMES[:2]:
        fidelity = found[name].fidelity
        assert fidelity is not None
        assert 0 < fidelity.recall < 1
        assert fidelity.output_error > 0
        assert fidelity.recall_interval is not None
    assert found[NAMES[2]].fidelity is None
    assert progress.notes == [f"No recall of {NAMES[2]}: a disc around each token is no pattern of groups."]
    assert result.settings["recall"]["prompts"] == 2


def test_variants_may_be_given_ready_made() -> None:
    own = Variant("own", "grat-b", "pattern", "of my own", GRID, Grouping(GRID, (5, 4)), Block(9))
    result, pictures = compare_runs(settings(compare=(own,), prompts=PROMPTS[:1]))
    row = rows(result)["own"]
    assert (row.density, row.kernel) == (1.0, "sdpa")
    quality = row.quality
    assert quality is not None
    assert quality.ssim > 0.999
    assert quality.ssim_interval is None, "one picture has no interval"
    assert [name for name, _ in pictures.rows] == ["full", "own", NOISE_FLOOR]
    with pytest.raises(BadInput, match="own is for 10x12 tokens, not 4x4"):
        compare_runs(settings(compare=(own,), width=32, height=32))


def test_rows_that_would_take_too_long_are_skipped() -> None:
    progress = Progress()
    result, pictures = compare_runs(settings(compare=(), max_seconds=1e-3), progress)
    assert [row.skipped is not None for row in rows(result).values()] == [True, True]
    assert "2 pictures would take about" in str(rows(result)["full"].skipped)
    assert "--max-seconds" in progress.notes[0]
    assert pictures.rows == []


@pytest.mark.parametrize("what", ["not finite", "out of memory"])
def test_a_row_that_fails_is_skipped_and_the_others_go_on(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Host.inside

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if what == "out of memory":
            raise torch.OutOfMemoryError("no more")
        return query * torch.nan

    def broken(self: Host, variant: Variant, dense: Any = None) -> Any:
        inside = stock(self, variant, dense)
        if variant.name != NAMES[0]:
            return inside
        return replace(
            inside, attach=lambda observer, step, _: stock_attention(self.transformer, observer, step, attend=attend)
        )

    monkeypatch.setattr(Host, "inside", broken)
    progress = Progress()
    result, pictures = compare_runs(settings(compare=parse_variants(NAMES[0]), prompts=PROMPTS[:1]), progress)
    row = rows(result)[NAMES[0]]
    assert row.skipped is not None
    assert {"not finite": "NaN or infinite", "out of memory": "out of memory"}[what] in row.skipped
    assert row.quality is None
    assert [name for name, _ in pictures.rows] == ["full", NOISE_FLOOR]
    assert progress.notes == [f"{NAMES[0]} is skipped: {row.skipped}"]
    assert "recall" not in result.settings


def test_without_a_second_backend_there_is_no_noise_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(None, FAMILIES["flux"], 24, Backend.SDPA, torch.device("cpu"), torch.float32)
    large = Grid((512, 512))
    _, reason = noise_floor(host, large, None, 64, large.tokens)
    assert isinstance(reason, str)
    assert "262144 tokens are more than" in reason
    with pytest.raises(BadInput, match="triton backend cannot make a noise floor here"):
        noise_floor(replace(host, dtype=torch.float64), GRID, "triton", 64, GRID.tokens)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInput, match="at least one prompt"):
        compare_runs(settings(prompts=()))
    with pytest.raises(BadInput, match="multiples of 16"):
        compare_runs(settings(width=100))
    with pytest.raises(BadInput, match="triton backend cannot run here"):
        compare_runs(settings(backend="triton", dtype="bfloat16"))


def test_the_prompts_are_different_pictures() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) == 16
    assert all(not unknown_words(prompt, vocabulary()) for prompt in PROMPTS)


def test_the_command_makes_a_contact_sheet(tmp_path: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox in the snow\n\na blue boat at night\n")
    done = grat(
        *("bench", "--level", "image", "--model", "demo", "--res", f"{WIDTH}x{HEIGHT}", "--prompts", prompts),
        *("--compare", NAMES[0], "--device", "cpu", "--out", tmp_path / "made", "--json"),
    )
    assert done.code == 0, done.err
    assert done.data["settings"]["prompts"] == ["a red fox in the snow", "a blue boat at night"]
    assert done.data["settings"]["steps"] == DEMO_FLUX.steps
    assert [row["name"] for row in done.data["cases"][0]["rows"]] == ["full", NAMES[0], NOISE_FLOOR]
    assert done.data["contact_sheet"] == "made.png"
    with Image.open(tmp_path / "made.png") as sheet:
        assert sheet.width > 2 * WIDTH
        assert sheet.height > 3 * HEIGHT


def test_rows_with_caches_stand_beside_those_without() -> None:
    names = ("full+taylor:cache_interval=2", "b:group=4:radius=0", "b:group=4:radius=0+pab:timesteps=0-1000", "b+mag")
    progress = Progress()
    asked = settings(compare=parse_variants(",".join(names), "image"), steps=4, prompts=PROMPTS[:1], recall=False)
    result, _ = compare_runs(asked, progress)
    found = rows(result)
    assert list(found) == ["full", *names, NOISE_FLOOR]
    taylor, plain, pab, mag = (found[name] for name in names)
    assert (taylor.density, taylor.steps_computed) == (pytest.approx(3 / 4), 3)
    assert plain.density is not None
    assert (pab.density, pab.steps_computed) == (pytest.approx(plain.density / 2), 2)
    assert (plain.steps_computed, found["full"].steps_computed) == (None, None)
    assert taylor.cache is not None
    assert taylor.cache["cache_interval"] == 2
    assert taylor.quality is not None
    assert taylor.quality.ssim < 1
    assert mag.skipped is not None
    assert "mag:calibrate=true" in mag.skipped
    assert [note.partition(":")[0] for note in progress.notes] == ["b+mag is skipped"]
    assert BenchResult.from_json(json.dumps(result.as_dict(), allow_nan=False)).cases == result.cases


def test_a_row_with_a_cache_is_the_picture_that_a_run_with_it_makes() -> None:
    """The same caches, inside `grat_cli.install` and inside a benchmark."""
    asked = settings(
        compare=parse_variants("demo-b+taylor:cache_interval=2", "image"), steps=4, prompts=PROMPTS[:1], recall=False
    )
    _, pictures = compare_runs(asked)
    pipe = stock_pipe()
    with grat_cli.install(pipe, "demo-b", height=HEIGHT, width=WIDTH, cache="taylor:cache_interval=2"):
        made = drawn(pipe)
    (of_bench,) = dict(pictures.rows)["demo-b+taylor:cache_interval=2"]
    assert largest_difference(made, of_bench) <= 1


def test_full_attention_in_fewer_steps_is_a_row_and_stock_diffusers_in_fewer_steps() -> None:
    compare = parse_variants("full:steps=2,full:steps=3+taylor:cache_interval=2:disable_cache_before_step=1", "image")
    result, pictures = compare_runs(settings(compare=compare, steps=4, prompts=PROMPTS[:1]))
    names, found = [request.name for request in compare], rows(result)
    assert list(found) == ["full", *names, NOISE_FLOOR]
    fewer, cached = (found[name] for name in names)
    assert (fewer.density, fewer.steps_computed, len(fewer.step_times_ms)) == (pytest.approx(2 / 4), 2, 2)
    assert cached.steps_computed is not None
    assert cached.steps_computed < len(cached.step_times_ms) == 3
    assert cached.density == pytest.approx(cached.steps_computed / 4)
    assert fewer.fidelity is None
    (of_bench,) = dict(pictures.rows)[names[0]]
    assert largest_difference(drawn(stock_pipe(), steps=2), of_bench) <= 1
    assert largest_difference(drawn(stock_pipe(), steps=4), of_bench) > 1


def test_rows_of_as_many_steps_as_all_others_are_refused() -> None:
    assert "full:steps=4: expected fewer steps than the 4 of all others" in refusal(
        *("bench", "--level", "image", "--model", "demo", "--steps", "4", "--compare", "full:steps=4")
    )
    assert "runs have steps, at --level image and video" in refusal("bench", "--compare", "full:steps=4")


@pytest.mark.parametrize(
    ("compare", "cache", "names"),
    [
        ("full,b", "taylor", ["full", "b", "full+taylor", "b+taylor"]),
        ("b,x+pab", "mag,pab", ["b", "x+pab", "full+mag", "b+mag", "full+pab", "b+pab"]),
    ],
)
def test_caches_are_added_to_every_row(compare: str, cache: str, names: list[str]) -> None:
    given = dict.fromkeys(BenchRequest.__dataclass_fields__)
    fixed = {"level": "image", "backend": "auto", "device": "auto", "dtype": "auto", "command": ""}
    asked = BenchRequest(**{**given, **fixed, "compare": compare, "cache": cache})  # pyright: ignore
    assert [request.name for request in asked.variants] == names
    assert [request.name for request in asked.variants_beside_full] == [name for name in names if name != "full"]


def test_caches_of_a_benchmark_that_cannot_be_are_refused() -> None:
    assert "--cache tailor: did you mean 'taylor'" in refusal("bench", "--level", "image", "--cache", "tailor")
    assert "it is for image and video" in refusal("bench", "--level", "step", "--cache", "taylor")


def test_presets_that_carry_attention_over_steps_are_those_of_runs_and_count_what_ran(tmp_path: Any) -> None:
    path = tmp_path / "carried.yaml"
    choose = "{levels: [{beyond: 0, block: [4, 4]}], choose: {exact: 1, fine: 1, block: [2, 2]}}"
    path.write_text(
        "name: carried\nmodel: demo\n"
        f"attention: {{variant: b, group: [4, 4], radius: 0, far: {choose}}}\n"
        "schedule: {over_steps: {reference: [0, 2], layers: '0-3'}}\n"
    )
    compared = parse_variants(f"grat-b:group=4:radius=0,{path}", "image")
    asked = settings(compare=compared, prompts=PROMPTS[:1], steps=4, noise_backend="sdpa", recall=False)
    result, pictures = compare_runs(asked)
    found = rows(result)
    carried, plain = found[str(path)], found["grat-b:group=4:radius=0"]
    assert carried.skipped is None
    assert carried.steps_computed == 2
    assert carried.work is not None
    assert carried.density == pytest.approx(sum(carried.work[part] for part in ("pairs", "text", "selection")))
    assert carried.work["selection"] > 0 < carried.work["forming"]
    assert plain.work is not None
    assert (plain.steps_computed, plain.work["selection"]) == (None, 0)
    assert plain.density == pytest.approx(plain.work["pairs"] + plain.work["text"])
    pipe = stock_pipe()
    with grat_cli.install(pipe, str(path), height=HEIGHT, width=WIDTH):
        expected = drawn(pipe)
    (made,) = dict(pictures.rows)[str(path)]
    np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))
