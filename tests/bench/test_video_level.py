"""Whole runs of a tiny random HunyuanVideo: what is made, compared, skipped and recorded."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_hunyuan
import torch
from command_line import grat
from PIL import Image

from grat_cli.bench import whole_runs
from grat_cli.bench.measure import Unwatched
from grat_cli.bench.results import BenchResult, Row
from grat_cli.bench.whole_runs import FRAMES_SHOWN, NOISE_FLOOR, VIDEOS_SHOWN, Pictures, RunSettings, compare_runs
from grat_cli.demo import unknown_words, video_vocabulary
from grat_cli.errors import BadInput
from grat_cli.families import family_of
from grat_cli.fidelity import quality
from grat_cli.fidelity.prompts import built_in_prompts
from grat_cli.fidelity.quality import Likeness
from grat_cli.fidelity.variants import parse_variants
from grat_cli.models.catalogue import choose_model
from grat_kernels import Grid

WIDTH, HEIGHT, FRAMES, STEPS = 48, 32, 9, 2
PROMPTS = built_in_prompts("video")
GRID = Grid((3, HEIGHT // 16, WIDTH // 16))
PATTERNS = ("planes", "lines", "b:radius=0", "bx:radius=0", "sta:window=1")
EVERYTHING = ("b:radius=2", "na:window=9")  # so wide that they are full attention
NAMES = (*PATTERNS, *EVERYTHING)
TEXTS = ("waves", "a red boat sailing at sunset", "snow")


class Notes(Unwatched):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Guided by true classifier-free guidance, as the demo is: two texts of different length in every step."""
    return tiny_hunyuan.save(tmp_path_factory.mktemp("models") / "tiny", guidance_embeds=False)


def settings(folder: Path, **changes: Any) -> RunSettings:
    given: dict[str, Any] = {
        "model": choose_model(str(folder), "video"),
        "compare": parse_variants(",".join(("full", *NAMES, "clear"))),
        "prompts": TEXTS,
        "width": WIDTH,
        "height": HEIGHT,
        "frames": FRAMES,
        "steps": STEPS,
        "device": "cpu",
        "dtype": "float32",
    }
    return RunSettings(**(given | changes))


def rows(result: BenchResult) -> dict[str, Row]:
    return {row.name: row for row in result.cases[0].rows}


@pytest.fixture(scope="module")
def compared() -> list[tuple[Any, Any, Likeness]]:
    """Every pair of videos that was compared in `run`, and what was found."""
    return []


@pytest.fixture(scope="module")
def run(folder: Path, compared: Any) -> Any:
    stock = quality.likeness

    def kept(reference: Any, video: Any) -> Likeness:
        compared.append((reference, video, stock(reference, video)))
        return compared[-1][2]

    progress = Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_runs, "likeness", kept)
        result, pictures = compare_runs(settings(folder), progress)
    return result, pictures, progress


def test_every_row_has_a_time_for_every_video(run: tuple[BenchResult, Pictures, Notes]) -> None:
    result, _, progress = run
    names = ["full", *NAMES, "clear", NOISE_FLOOR]
    found = rows(result)
    assert list(found) == names
    assert "two axes" in str(found.pop("clear").skipped)
    for row in found.values():
        assert row.skipped is None
        assert len(row.times_ms) == len(TEXTS)
        assert len(row.step_times_ms) == STEPS
        assert row.attention_share is not None
        assert 0 < row.attention_share < 1
    assert (len(names) * len(TEXTS),) * 2 in progress.steps
    assert BenchResult.from_json(json.dumps(result.as_dict(), allow_nan=False)).cases == result.cases


def test_videos_of_full_attention_are_those_of_stock_diffusers(run: Any, compared: Any, folder: Path) -> None:
    model = choose_model(str(folder), "video")
    pipe: Any = tiny_hunyuan.HunyuanVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(family_of(model).dtypes(("vae",), torch.device("cpu"), torch.float32)["vae"])
    references = [reference for reference, _, _ in compared[:: len(NAMES) + 1]]
    assert len(references) == len(TEXTS)
    for seed, (text, made) in enumerate(zip(TEXTS, references, strict=True)):
        stock: Any = pipe(
            text,
            negative_prompt="",
            true_cfg_scale=model.default_guidance,
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            max_sequence_length=model.text_tokens,
            generator=torch.Generator().manual_seed(seed),
            output_type="pil",
        )
        assert len(made) == FRAMES
        for frame, expected in zip(made, stock.frames[0], strict=True):
            assert np.abs(np.asarray(expected).astype(int) - frame.astype(int)).max() <= 1


def test_quality_is_the_mean_over_the_videos(run: Any, compared: Any) -> None:
    result, _, _ = run
    found = rows(result)
    assert found["full"].quality is None
    assert len(compared) == len(TEXTS) * (len(NAMES) + 1)
    compared_names = (*NAMES, NOISE_FLOOR)
    for number, name in enumerate(compared_names):
        of_row = found[name].quality
        assert of_row is not None
        likenesses = [likeness for _, _, likeness in compared[number :: len(compared_names)]]
        assert of_row.ssim == pytest.approx(np.mean([likeness.ssim for likeness in likenesses]))
        assert of_row.motion == pytest.approx(np.mean([likeness.motion for likeness in likenesses]))
        assert of_row.ssim_interval is not None
        same = name in (*EVERYTHING, NOISE_FLOOR)
        assert (of_row.ssim > 0.999) == same, (name, of_row)
        if same:
            assert of_row.motion == pytest.approx(1, abs=0.01)
    assert (found[NOISE_FLOOR].role, found[NOISE_FLOOR].kernel) == ("noise floor", "flex")


def test_recall_is_measured_with_texts_of_different_length(run: Any) -> None:
    result, _, _ = run
    found = rows(result)
    recalls = {name: row.fidelity.recall for name, row in found.items() if row.fidelity is not None}
    assert set(recalls) == set(NAMES)
    for name in EVERYTHING:
        assert recalls[name] == pytest.approx(1, abs=1e-5)
    assert recalls["b:radius=0"] < recalls["lines"] < recalls["planes"] < 1
    assert recalls["lines"] <= recalls["bx:radius=0"]
    assert result.settings["recall"]["steps"] == [0, 1]


def test_density_is_that_of_the_longest_text(run: Any) -> None:
    result, _, _ = run
    [case] = result.cases
    pipe: Any = tiny_hunyuan.pipeline()
    texts = [int(pipe.encode_prompt(prompt=text, max_sequence_length=32)[2].sum()) for text in TEXTS]
    assert (case.grid, case.text_len) == (GRID.shape, max(texts))
    assert len(set(texts)) > 1
    found = rows(result)
    assert found["full"].density == found[NOISE_FLOOR].density == found["b:radius=2"].density == 1
    text, tokens = case.text_len, GRID.tokens
    # Groups are single tokens here: with radius 0 each attends itself and the text.
    assert found["b:radius=0"].density == pytest.approx(
        (tokens * (1 + text) + text * (tokens + text)) / (tokens + text) ** 2
    )
    sparse = [found[name].density or 0 for name in ("b:radius=0", "lines", "planes")]
    assert sparse[0] < sparse[1] < sparse[2] < 1


def test_the_sheet_has_frames_of_the_first_videos(run: Any, compared: Any) -> None:
    _, pictures, _ = run
    names = ["full", *NAMES, NOISE_FLOOR]
    assert [name for name, _ in pictures.rows] == names
    frames = [round(place * (FRAMES - 1) / (FRAMES_SHOWN - 1)) for place in range(FRAMES_SHOWN)]
    assert pictures.column_titles[0] == "waves, seed 0, frame 1"
    assert pictures.column_titles[FRAMES_SHOWN : FRAMES_SHOWN + 2] == [f"{TEXTS[1]}, seed 1, frame 1", "frame 4"]
    assert len(pictures.column_titles) == VIDEOS_SHOWN * FRAMES_SHOWN
    for _, shown in pictures.rows:
        assert [picture.size for picture in shown] == [(WIDTH, HEIGHT)] * (VIDEOS_SHOWN * FRAMES_SHOWN)
    first, _, _ = compared[0]
    for frame, picture in zip(frames, pictures.rows[0][1], strict=False):
        assert np.array_equal(first[frame], np.asarray(picture))


def test_the_record_says_what_was_made(run: Any) -> None:
    result, _, _ = run
    assert (result.level, result.cases[0].title) == ("video", f"{WIDTH}x{HEIGHT} pixels, {FRAMES} frames")
    recorded = result.settings
    assert (recorded["width"], recorded["height"], recorded["frames"]) == (WIDTH, HEIGHT, FRAMES)
    assert (recorded["steps"], recorded["prompts"], recorded["seeds"]) == (STEPS, list(TEXTS), [0, 1, 2])
    assert recorded["layers"] == tiny_hunyuan.LAYERS
    assert any("attends the padding of the text, to 32 tokens" in note for note in result.notes)


def test_a_row_without_time_is_skipped(folder: Path) -> None:
    progress = Notes()
    result, pictures = compare_runs(settings(folder, compare=(), prompts=TEXTS[:1], max_seconds=1e-3), progress)
    assert "1 video would take about" in str(rows(result)["full"].skipped)
    assert pictures.rows == []
    assert progress.notes[0].startswith("full is skipped")


def test_settings_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="no video to compare"):
        compare_runs(settings(folder, prompts=()))
    with pytest.raises(BadInput, match="multiples of 16"):
        compare_runs(settings(folder, width=100))
    with pytest.raises(BadInput, match="a multiple of 4 and one more, not 8: use 5 or 9"):
        compare_runs(settings(folder, frames=8))
    with pytest.raises(BadInput, match="demo makes images"):
        compare_runs(settings(folder, model=choose_model("demo")))


def test_the_prompts_are_different_and_begin_with_different_subjects() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) == 16
    assert all(not unknown_words(prompt, video_vocabulary()) for prompt in PROMPTS)
    assert not set(PROMPTS[0].split()) & set(PROMPTS[1].split()) - {"at"}


def test_the_command_makes_a_contact_sheet_of_frames(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("waves at night\n")
    done = grat(
        *("bench", "--level", "video", "--model", folder, "--res", f"{WIDTH}x{HEIGHT}", "--frames", FRAMES - 1),
        *("--steps", STEPS, "--prompts", prompts, "--compare", "full,planes,lines", "--device", "cpu"),
        *("--out", tmp_path / "made", "--json"),
    )
    assert done.code == 0, done.err
    assert "8 frames are rounded up to 9" in done.err
    assert sorted(path.suffix for path in tmp_path.glob("made.*")) == [".html", ".json", ".md", ".png"]
    assert done.data["schema"] == "grat.bench/1"
    assert done.data == json.loads((tmp_path / "made.json").read_text())
    assert [row["name"] for row in done.data["cases"][0]["rows"]] == ["full", "planes", "lines", NOISE_FLOOR]
    assert (done.data["level"], done.data["contact_sheet"]) == ("video", "made.png")
    assert done.data["settings"]["steps"] == STEPS
    with Image.open(tmp_path / "made.png") as sheet:
        assert sheet.width > FRAMES_SHOWN * WIDTH
        assert sheet.height > 4 * HEIGHT
    page = (tmp_path / "made.html").read_text()
    [embedded] = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(embedded) == (tmp_path / "made.png").read_bytes()
    for words in ("Videos on", "Similarity against speed-up", "attention share", "motion", "frames"):
        assert words.replace(" ", "") in re.sub(r"<[^>]+>|\s", "", page)
    assert "![The same seeds by every variant](made.png)" in (tmp_path / "made.md").read_text()
