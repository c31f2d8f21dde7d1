"""`grat attend`: its figures and their intervals, what it understands, and the command with the demo models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from command_line import Result, grat, refusal
from PIL import Image
from scipy.stats import binom

from grat_cli.attention.adapter import AttentionInputs
from grat_cli.attention.recall import BINS
from grat_cli.attention.record import AttentionRecorder
from grat_cli.errors import BadInput
from grat_cli.fidelity.attend import Attended, Candidate, candidates_for, queries_for, recorded_steps, watched_preset
from grat_cli.fidelity.figures import Estimate, density_hint, half_distance, pattern_figures, ranked_heads
from grat_cli.fidelity.overlays import evenly, frames_of, overlay
from grat_cli.files.outputs import read_provenance
from grat_cli.files.videos import read_frames
from grat_cli.pages.plots import WIDTH, text_width
from grat_cli.presets import Attention, Preset, load_preset
from grat_kernels import Full, Grid, Grouping, build_plan

GRID, TEXT, HEADS, HEAD_DIM = Grid((8, 10)), 5, 2, 8
LAYERS, STEPS = 2, 2
FAR = {"variant": "b", "radius": 0, "far": [{"beyond": 0, "block": [2, 2]}]}
CANDIDATES = tuple(
    Candidate(name, Attention.model_validate({"group": [4, 4], **given}))
    for name, given in {"b": {"variant": "b", "radius": 0}, "x": {"variant": "x"}, "far": FAR}.items()
)


def inputs(step: int, layer: int, sharpness: float = 2.0) -> AttentionInputs:
    """Attention of one layer, as peaked as learned ones."""
    plan = build_plan(Grouping(GRID, (4, 4), ((4, 4), (2, 2))), Full(), TEXT)
    generator = torch.Generator().manual_seed(10 * step + layer)
    query, key, value = (torch.randn(1, plan.tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    return AttentionInputs(layer, sharpness * query, key, value, plan, HEAD_DIM**-0.5)


def attended(rows: int, seed: int, watched: dict[tuple[int, int], AttentionInputs]) -> Attended:
    """What a run of these attentions gives."""
    attentions = [one.attention for one in CANDIDATES]
    recorder = AttentionRecorder(attentions, STEPS, LAYERS, HEADS, rows=rows, seed=seed)
    for step in range(STEPS):
        recorder.begin_call(step, 1.0)
        for layer in range(LAYERS):
            with recorder.attention(watched[step, layer]):
                pass
        recorder.end_call()
    return Attended(
        candidates=CANDIDATES,
        steps=tuple(range(STEPS)),
        rows=rows,
        record=recorder.record(),
        seen=(),
        text_tokens=TEXT,
        calls_per_step=1,
        device="cpu",
        dtype="float32",
        backend="sdpa",
        revision=None,
        phases_ms={},
    )


@pytest.fixture(scope="module")
def watched() -> dict[tuple[int, int], AttentionInputs]:
    return {(step, layer): inputs(step, layer) for step in range(STEPS) for layer in range(LAYERS)}


def test_intervals_hold_the_exact_figure_as_often_as_they_say(
    watched: dict[tuple[int, int], AttentionInputs],
) -> None:
    """Two queries in three are drawn: intervals without the correction for that would hold it nearly always."""
    exact = pattern_figures(attended(10**6, 0, watched))
    assert all(one.recall.half_interval == one.error.half_interval == 0 for one in exact)  # nothing was left out
    draws, misses = 200, {}
    for seed in range(draws):
        for one, truth in zip(pattern_figures(attended(GRID.tokens * 2 // 3, seed, watched)), exact, strict=True):
            pairs = {
                "text": (one.text, truth.text),
                "image": (one.image, truth.image),
                "recall": (one.recall, truth.recall),
                "error": (one.error, truth.error),
                "step": (one.recall_of_steps[1], truth.recall_of_steps[1]),
                "layer": (one.recall_of_layers[0], truth.recall_of_layers[0]),
                "error of a layer": (one.error_of_layers[1], truth.error_of_layers[1]),
            }
            for name, (estimate, true) in pairs.items():
                missed = abs(estimate.value - true.value) > estimate.half_interval
                misses[one.name, name] = misses.get((one.name, name), 0) + missed
    # Of 21 counts none may lie where a count of 95 % intervals lies once in 10^4, above or below.
    low, high = binom.ppf(1e-4, draws, 0.05), binom.isf(1e-4, draws, 0.05)
    assert low > 0
    assert all(low <= count <= high for count in misses.values()), misses


def test_the_standard_error_of_a_head_is_that_of_a_sample_without_repetition(
    watched: dict[tuple[int, int], AttentionInputs],
) -> None:
    rows = 30
    record = attended(rows, 3, watched).record
    deviation = record.image_deviation * np.sqrt(rows / (rows - 1))  # recorded as that of the queries themselves
    expected = deviation * np.sqrt((1 - rows / GRID.tokens) / rows)
    np.testing.assert_allclose(record.of_heads.image, expected, rtol=1e-6)
    # Layers of a call see the same queries: their mean is no surer than if they were one.
    assert record.of_steps.recall.shape == (STEPS, len(CANDIDATES))
    np.testing.assert_array_less(record.of_steps.recall, record.of_layers.recall.mean(1) + 1e-12)


def test_one_query_has_no_interval(watched: dict[tuple[int, int], AttentionInputs]) -> None:
    assert np.isnan(attended(1, 0, watched).record.of_steps.recall).all()


def test_figures_of_patterns_add_up(watched: dict[tuple[int, int], AttentionInputs]) -> None:
    figures = pattern_figures(attended(30, 1, watched))
    for one in figures:
        assert one.recall.value == pytest.approx(one.text.value + one.image.value)
        assert one.recall.value == pytest.approx(np.mean([step.value for step in one.recall_of_steps]))
        squares = [layer.value**2 for layer in one.error_of_layers]
        assert one.error.value == pytest.approx(np.sqrt(np.mean(squares)))
    by_name = {one.name: one for one in figures}
    assert by_name["far"].recall == by_name["b"].recall  # means are no tokens
    assert by_name["far"].error.value < by_name["b"].error.value  # but what they give back counts


def test_heads_are_ranked_by_how_far_they_look() -> None:
    """A head whose keys are the places of the tokens looks at itself, one of equal keys at all."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, GRID.shape), indexing="ij"), -1).reshape(-1, 2).float()
    given = inputs(0, 0)
    order = torch.from_numpy(given.plan.order)
    query, key = torch.zeros_like(given.query), torch.zeros_like(given.key)
    # -|a - b|² = 2ab - |a|² - |b|², of which the softmax needs no |a|²; times a number that makes it sharp.
    query[0, TEXT:, 1, :3] = 20 * torch.cat([2 * places, -torch.ones(len(places), 1)], 1)[order]
    key[0, TEXT:, 1, :3] = torch.cat([places, places.square().sum(1, keepdim=True)], 1)[order]
    local: Any = {at: given._replace(layer=at[1], query=query, key=key) for at in np.ndindex(STEPS, LAYERS)}
    found = ranked_heads(attended(10**6, 0, local))
    assert [head.head for head in found] == [1] * LAYERS + [0] * LAYERS
    assert found[0].distance < 2 / BINS < 0.25 < found[-1].distance


def test_half_of_the_mass() -> None:
    assert half_distance(np.eye(BINS)[4]) == pytest.approx(4.5 / BINS)
    assert half_distance(np.full(BINS, 1 / BINS)) == pytest.approx(0.5)


# What is understood


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        (None, 20, (2, 6, 10, 14, 18)),
        (None, 3, (0, 1, 2)),
        ("2", 20, (5, 15)),
        ("1", 20, (10,)),
        ("all", 4, (0, 1, 2, 3)),
        ("0-2,19", 20, (0, 1, 2, 19)),
        ("0.5-1.0", 6, (3, 4, 5)),
        ("3-3", 20, (3,)),
        ("5,3-4", 20, (3, 4, 5)),
    ],
)
def test_steps_to_record(text: str | None, steps: int, expected: tuple[int, ...]) -> None:
    assert recorded_steps(text, steps) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "expected 1 step"),
        ("21", "the run has 20 steps"),
        ("20-30", "counted from 0 to 19"),
        ("0,20", "counted from 0 to 19"),
        ("first", "such as --at 5"),
        ("5-2", "write 2-5"),
        ("", "such as --at 5"),
        ("-1", "such as --at 5"),
        ("0.5", "such as --at 5"),
    ],
)
def test_steps_beyond_the_run_are_refused(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=r"^--at .*" + re.escape(says)):
        recorded_steps(text, 20)


def test_queries_are_tokens_or_fractions() -> None:
    grid = Grid((10, 20))
    assert queries_for(["0.5,0.25", "9,19", "0.0,3"], grid) == ((5, 5), (9, 19), (0, 3))
    assert queries_for(["1.0,1."], grid) == ((9, 19),)
    assert queries_for(["0.5,2,.5"], Grid((3, 4, 8))) == ((1, 2, 4),)
    assert len(queries_for([], grid)) == len(queries_for([], Grid((3, 4, 8)))) == 3
    assert queries_for([], Grid((1, 1))) == ((0, 0),)


@pytest.mark.parametrize("text", ["5", "1,2,3", "a,b", "10,0", "0,20", "1.5,0", "-1,0", "0.5,", ".,.", ""])
def test_queries_off_the_grid_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--query"):
        queries_for([text], Grid((10, 20)))
    with pytest.raises(BadInput, match="named twice"):
        queries_for(["0,0", "0.0,0.01"], Grid((10, 20)))


def test_patterns_are_those_of_grat_bench_or_presets(tmp_path: Path) -> None:
    grid, preset = Grid((32, 32)), load_preset("demo-far")
    names = [one.name for one in candidates_for(None, preset, "demo", grid)]
    assert names == ["demo-b", "demo-b-wide", "demo-x", "demo-bx", "demo-far", "demo-sta"]
    wider = preset.model_copy(update={"attention": preset.attention.model_copy(update={"radius": 2})})
    assert candidates_for(None, wider, "demo", grid)[0] == Candidate("demo-far, as set", wider.attention)

    found = candidates_for("b, grat-b:radius=2:group=8, flux-x, far", preset, "demo", Grid((64, 64)))
    assert [one.name for one in found] == ["b", "grat-b:radius=2:group=8", "flux-x", "far"]
    assert found[1].attention == Attention.model_validate({"variant": "b", "radius": 2, "group": [8, 8]})
    assert found[2].attention == load_preset("flux-x").attention
    # Sizes have to nest among the patterns, not in groups of the preset that gives the sampling.
    assert candidates_for("b:group=6", preset, "demo", grid)[0].attention.group == (6, 6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("grat-b:group=16,grat-x:group=6", "use 4x4 or 8x8, or judge them in two runs"),
        ("b:group=8,far:group=8:block=3", "do not nest in groups of (8, 8)"),
        ("na", "no pattern of groups"),
        ("full", "leave it out"),
        ("demo-full", "leave it out"),
        ("b,b", "names b twice"),
        ("demo-bb", "did you mean 'demo-b'?"),
        ("", "a name is empty"),
        ("b,", "a name is empty"),
        ("b:radius=x", "expected radius=2"),
        ("planes", "for videos"),
        ("hunyuan-b", "other axes"),
        ("sta:window=4", "odd"),
        ("missing.yaml", "missing.yaml"),
    ],
)
def test_patterns_that_cannot_be_judged_are_refused(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=re.escape(says)) as refused:
        candidates_for(text, load_preset("demo-far"), "demo", Grid((32, 32)))
    assert len(str(refused.value).splitlines()) <= 2


# Pictures


def test_patterns_are_judged_whatever_the_preset_itself_attends() -> None:
    """Its schedule need not go with their groups: all of the run is full attention."""
    rules = {"rules": [{"layers": "0", "group": [2, 2], "far": None}]}
    preset = Preset.model_validate({**load_preset("demo-far").model_dump(), "schedule": rules, "highres": None})
    candidate = Candidate("odd", Attention.model_validate({"variant": "b", "group": [3, 3], "radius": 1}))
    watched = watched_preset(preset, [candidate])
    assert watched.cells[0] == (3, 3)
    assert (2, 2) not in watched.cells


def test_an_overlay_is_dark_where_attention_is_even_and_bright_where_it_peaks() -> None:
    picture = Image.new("RGB", (80, 40), (200, 200, 200))
    even = np.full((4, 8), 1 / 32)
    mass = even.copy()
    mass[1, 6] = 20 / 32
    shown = np.asarray(overlay(picture, mass, even, (1, 1), (4, 8), top=20.0, longest_side=80)).astype(int)
    assert shown.shape == (40, 80, 3)
    peak, rest = shown[10:20, 60:70], shown[0:10, 0:10]
    assert (peak == peak[0, 0]).all()
    assert (rest == 89).all()  # the picture, dimmed to a third
    assert peak[0, 0].sum() > rest[0, 0].sum()
    # Half as bright on the logarithmic scale, and what lies beyond the last token is cut off.
    ragged = np.array([[1.0, 20.0**0.5], [20.0, 1.0]])
    shown = np.asarray(overlay(picture, ragged, np.ones((2, 2)), (3, 5), (4, 8), top=20.0, longest_side=80)).astype(int)
    colours = [shown[5, 5], shown[5, 60], shown[35, 5]]
    assert (colours[0] == 89).all()
    assert 89 * 3 < colours[1].sum() < colours[2].sum()
    assert (shown[29, 49] == 89).all()
    assert (shown[30, 49] == colours[2]).all()
    assert (shown[29, 50] == colours[1]).all()


def test_rows_and_columns_of_large_sheets_are_evenly_chosen() -> None:
    assert evenly(5, 8) == [0, 1, 2, 3, 4]
    assert evenly(57, 8)[0] == 0
    assert evenly(57, 8)[-1] == 56
    assert len(evenly(57, 8)) == 8
    assert evenly(9, None) == list(range(9))
    assert evenly(9, 1) == [0]


def test_frames_are_those_that_tokens_stand_for() -> None:
    frames = [np.full((2, 2, 3), number, np.uint8) for number in range(9)]
    seen: Any = type("Seen", (), {"output": frames})()
    shown = frames_of(seen, Grid((3, 1, 1)), 4)
    assert [picture.getpixel((0, 0))[0] for picture in shown] == [0, 3, 7]  # type: ignore[index]


# The command, with the demo models

FOX = ("attend", "a red fox in the snow", "--model", "demo", "--res", "128", "--steps", "3", "--rows", "6")
SHEETS = {f"query-{number}-{kind}.png" for number in (1, 2) for kind in ("layers", "heads")}
PLOTS = {
    f"{name}.svg"
    for name in ("distance", "recall-by-step", "error-by-step", "recall-by-layer", "error-by-layer", "heads")
}


@pytest.fixture(scope="module")
def fox(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("attend") / "fox"
    queries = ("--query", "8,8", "--query", "0.1,0.9")
    return grat(*FOX, "--seed", "5", "--at", "0,2", *queries, "--out", folder), folder


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    folder = tmp_path_factory.mktemp("attend") / "waves"
    options = ("--res", "64x64", "--frames", "9", "--steps", "1", "--rows", "6", "--patterns", "b,lines,far")
    options += ("--seed", "1,2")
    queries = ("--query", "0,1,2", "--query", "0.9,.5,.5")
    return grat("attend", "waves at night", "--model", "demo", *options, *queries, "--out", folder, "--json"), folder


def test_a_picture_is_watched(fox: tuple[Result, Path]) -> None:
    result, folder = fox
    assert result.code == 0, result.err
    files = {path.name for path in folder.iterdir()}
    assert files == {"attend.json", "index.html", "picture.png", "queries.png", "maps.npz"} | SHEETS | PLOTS
    data = json.loads((folder / "attend.json").read_text())
    assert data["schema"] == "grat.attend/1"
    assert (data["prompt"], data["seeds"], data["grid"]) == ("a red fox in the snow", [5], [16, 16])
    assert (data["recorded_steps"], data["calls_per_step"], data["rows"]) == ([0, 2], 2, 6)
    assert [one["token"] for one in data["queries"]] == [[8, 8], [1, 14]]
    for one in data["patterns"]:
        assert one["name"] in result.out
        assert f"{one['recall']['mean']:.3f}" in result.out
        assert one["recall"]["mean"] == pytest.approx(one["text"]["mean"] + one["image"]["mean"], abs=2e-6)
        low, high = one["recall"]["interval_95"]
        assert low < one["recall"]["mean"] < high
        by_head = np.array(one["image_by_head"])
        assert by_head.shape == (2, data["layers"], data["heads"])
        assert by_head.mean() == pytest.approx(one["image"]["mean"], abs=2e-6)
    mass = np.array(data["distances"]["mass_by_head"]).sum(-1) + np.array(data["text_by_head"])
    np.testing.assert_allclose(mass, 1, atol=1e-4)
    assert len(data["heads_from_local_to_global"]) == data["layers"] * data["heads"]
    for sentence in data["findings"]:
        assert sentence in " ".join(result.out.split())
    assert result.out.splitlines()[-1] == str(folder / "index.html")


def test_the_maps_are_whole(fox: tuple[Result, Path]) -> None:
    with np.load(fox[1] / "maps.npz") as maps:
        assert maps["maps"].shape == (2, 2, 5, 16, 16)
        np.testing.assert_allclose(maps["maps"].sum((-1, -2)) + maps["text"], 1, atol=1e-4)
        np.testing.assert_allclose(maps["head_maps"].sum((-1, -2)) + maps["head_text"], 1, atol=1e-4)
        np.testing.assert_allclose(maps["head_maps"].mean(2), maps["maps"].mean(1), atol=1e-6)


def test_the_page_shows_all_and_needs_nothing_from_elsewhere(fox: tuple[Result, Path]) -> None:
    page = (fox[1] / "index.html").read_text()
    assert page.count("<svg") >= len(PLOTS)
    assert page.count("data:image/jpeg") == 1 + 2 * 2
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "<script" not in page
    for name in ("demo-b", "demo-far", "± ", "a red fox in the snow"):
        assert name in page
    for name in PLOTS:
        plot = (fox[1] / name).read_text()
        assert plot.startswith("<svg xmlns=")
        assert Image.open(fox[1] / "query-1-heads.png").width > 3 * 112


def test_plots_open_by_themselves_and_cut_no_name_off(fox: tuple[Result, Path]) -> None:
    for name in PLOTS:
        plot = ElementTree.parse(fox[1] / name).getroot()
        assert plot.tag == "{http://www.w3.org/2000/svg}svg"
        texts = [node for node in plot.iter("{http://www.w3.org/2000/svg}text") if node.text]
        assert len(texts) > 8
        for node in texts:
            width = text_width(node.text or "")
            assert float(node.attrib["x"]) + width * ("start" in node.attrib["style"]) <= WIDTH + 3


def test_what_was_made_says_how(fox: tuple[Result, Path]) -> None:
    for name in ("picture.png", "attend.json"):
        assert read_provenance(fox[1] / name)["prompt"] == "a red fox in the snow"
    assert Image.open(fox[1] / "picture.png").size == (128, 128)


def test_a_video_is_watched(waves: tuple[Result, Path]) -> None:
    result, folder = waves
    assert result.code == 0, result.err
    files = {path.name for path in folder.iterdir()}
    of_seeds = [name.rsplit(".") for name in (*SHEETS, "queries.png", "video.mp4", "maps.npz")]
    plots = {name for name in PLOTS if "step" not in name}  # one step makes no line
    assert files == {"attend.json", "index.html"} | plots | {
        f"{stem}-s{seed}.{suffix}" for stem, suffix in of_seeds for seed in (1, 2)
    }
    data = result.data
    assert data["folder"] == str(folder)
    assert (data["grid"], data["frames"], data["recorded_steps"]) == ([3, 4, 4], 9, [0])
    assert [one["token"] for one in data["queries"]] == [[0, 1, 2], [2, 2, 2]]
    assert [one["name"] for one in data["patterns"]] == ["b", "lines", "far"]
    assert data["seeds"] == [1, 2]
    first, second = (np.stack(list(read_frames(folder / f"video-s{seed}.mp4"))) for seed in (1, 2))
    assert len(first) == len(second) == 9
    assert (first != second).any()
    with np.load(folder / "maps-s2.npz") as maps:
        assert maps["maps"].shape[3:] == (3, 4, 4)
        np.testing.assert_allclose(maps["maps"].sum((-1, -2, -3)) + maps["text"], 1, atol=1e-4)
        own = [maps["maps"][0, 0, :, 0], maps["maps"][1, 0, :, 2]]
        np.testing.assert_allclose(maps["head_maps"].mean(2), own, atol=1e-6)


def test_nothing_is_overwritten_unasked(fox: tuple[Result, Path]) -> None:
    folder = fox[1]
    assert "exists: use --overwrite" in refusal(*FOX, "--out", folder)
    assert "does not exist" in refusal(*FOX, "--out", folder / "a" / "b")
    assert "exists" in refusal(*FOX, "--out", folder / "picture.png")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--at", "3-9"), "--at 3-9: the run has 3 steps"),
        (("--rows", "1"), "expected 2 to 1,000,000"),
        (("--rows", "many"), "expected a whole number"),
        (("--query", "16,0"), "the grid has 16x16 tokens"),
        (("--patterns", "grat-b:group=8,x:group=3"), "in two runs"),
        (("--preset", "demo-fra"), "did you mean demo-far?"),
        (("--preset", "hunyuan-b", "--model", "flux-dev"), "flux-dev makes images"),
        (("--seed", "1,1"), "same seed twice"),
        (("--device", "tpu"), "--device tpu"),
        (("--offload", "disk"), "--offload disk"),
        (("--steps", "0"), "--steps 0"),
        (("--res", "100"), "--res 100"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    assert says in refusal(*FOX, *options, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_empty_prompt_is_refused() -> None:
    assert "grat attend" in refusal("attend", " ")


def test_few_groups_are_pointed_out(watched: dict[tuple[int, int], AttentionInputs]) -> None:
    found = attended(8, 0, watched)
    assert density_hint(found) is None
    found.record.densities[:] = 0.9
    assert "--patterns b,x,bx,far" in (density_hint(found) or "")


def test_estimates_are_plain_numbers(watched: dict[tuple[int, int], AttentionInputs]) -> None:
    (first, *_) = pattern_figures(attended(8, 0, watched))
    assert isinstance(first.recall, Estimate)
    assert {type(value) for value in vars(first.recall).values()} == {float}
