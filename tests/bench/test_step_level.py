"""One denoising step, measured: what runs inside the transformer, and what the rows say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_flux
import tiny_hunyuan
import torch
from command_line import grat, refusal

from grat_cli.bench import baselines, inside_models, random_weights, step_level
from grat_cli.bench.inside_models import Host, stock_attention
from grat_cli.bench.measure import CannotRun
from grat_cli.bench.results import BenchResult, Row
from grat_cli.bench.step_level import StepSettings, run_step_level
from grat_cli.errors import BadInput, OutOfMemory
from grat_cli.estimates.planning import architecture_for
from grat_cli.families import FAMILIES
from grat_cli.fidelity.variants import parse_variants, variant_for
from grat_cli.generation.timing import StepRecorder
from grat_kernels import Backend, Grid

CPU = torch.device("cpu")
# Two computations of one fp32 forward pass, as in the adapters' tests.
RELATIVE = 1e-5
SMALL = {"demo": ((12, 16),), "flux-dev": ((6, 8),), "hunyuan": ((3, 4, 6),)}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _small_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The real ones with fewer and narrower blocks: of the demo it is the real one."""
    narrow = {"attention_head_dim": 16, "num_attention_heads": 2}
    text = {"joint_attention_dim": 32, "text_embed_dim": 32, "pooled_projection_dim": 24}
    rope = {"axes_dims_rope": [4, 6, 6], "rope_axes_dim": [4, 6, 6]}
    for name in ("flux-dev", "hunyuan"):
        model = random_weights.STEP_MODELS[name]
        config = random_weights.transformer_config(model)
        config |= {key: value for key, value in (narrow | text | rope).items() if key in config}
        path = tmp_path / name / "transformer" / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(config | {"num_layers": 2, "num_single_layers": 3}))
        monkeypatch.setitem(
            random_weights.STEP_MODELS,  # type: ignore[arg-type]
            name,
            replace(model, kind="folder", source=str(tmp_path / name), text_tokens=7),
        )


def settings(model: str = "demo", compare: str = "full,grat-b:group=4", **changes: Any) -> StepSettings:
    given: dict[str, Any] = {"grids": SMALL[model], "device": "cpu", "dtype": "float32", "repetitions": 2}
    return StepSettings(model, parse_variants(compare), **(given | changes))


def rows(result: BenchResult) -> dict[str, Row]:
    return {row.name: row for row in result.cases[0].rows}


@pytest.mark.parametrize("model", SMALL)
def test_every_row_has_its_times_and_its_share_of_attention(model: str) -> None:
    group = "2x2x2" if model == "hunyuan" else "2x2"
    names = ["full", "full-list", "grat-b", "grat-x", f"grat-far:group={group}:block=1", "sta", "na", "clear"]
    names = [
        f"{name}:group={group}" if name.startswith(("full-", "grat-b", "grat-x", "sta")) else name for name in names
    ]
    result = run_step_level(settings(model, ",".join(names)))
    found = rows(result)
    assert list(found) == names
    assert BenchResult.from_json(json.dumps(result.as_dict(), allow_nan=False)).cases == result.cases
    for name, row in found.items():
        if name == "clear" and model == "hunyuan":
            assert row.skipped is not None
            assert "two axes" in row.skipped
            continue
        assert row.skipped is None
        assert len(row.times_ms) == 2
        assert row.attention_ms is not None
        assert row.median_ms is not None
        assert 0 < row.attention_ms < row.median_ms
        assert row.speedup == pytest.approx(found["full"].median_ms / row.median_ms)  # type: ignore[operator]
        assert row.density is not None
        if name == "full":
            assert (row.role, row.density, row.speedup, row.sparse_efficiency) == ("full", 1, 1, None)
            assert row.kernel == "diffusers, torch SDPA"
        else:
            full_ms = found["full"].attention_ms
            assert full_ms is not None
            assert row.sparse_efficiency == pytest.approx(full_ms * row.density / row.attention_ms)
    assert found[f"full-list:group={group}"].density == 1
    assert found[f"grat-b:group={group}"].density < 1  # type: ignore[operator]


def test_full_comes_first_and_once_whatever_is_asked_for() -> None:
    for compare in ("grat-b:group=4", "grat-b:group=4,full"):
        assert list(rows(run_step_level(settings(compare=compare)))) == ["full", "grat-b:group=4"]


def test_the_record_says_what_was_measured() -> None:
    result = run_step_level(settings("hunyuan", layers=(1, 2), command="grat bench"))
    assert result.level == "step"
    assert (result.device, result.dtype, result.command) == ("cpu", "float32", "grat bench")
    recorded = result.settings
    assert (recorded["double_blocks"], recorded["single_blocks"], recorded["weights"]) == (1, 2, "random")
    assert (recorded["heads"], recorded["head_dim"], recorded["backend"]) == (2, 16, "sdpa")
    case = result.cases[0]
    assert (case.grid, case.text_len) == ((3, 4, 6), 7)
    assert case.title == "3x4x6 tokens, 9 frames of 96x64 pixels"
    assert any("padding mask" in note for note in result.notes)
    demo = run_step_level(settings("demo"))
    assert demo.settings["weights"] == "own"
    assert demo.cases[0].title == "12x16 tokens, 128x96 pixels"
    assert any("two such calls" in note for note in demo.notes)


def test_a_step_that_takes_too_long_is_skipped_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full attention alone: without it the others have no speed-up, and still their times."""
    monkeypatch.setattr(step_level, "_RATE_MARGIN", 1.0)
    monkeypatch.setattr(step_level, "dense_rate", lambda *_: 1.0)
    monkeypatch.setattr(step_level._Steps, "_flop", lambda self, grid, pairs: 1e9 if pairs == 216**2 else 0.0)
    found = rows(run_step_level(settings(max_seconds=60)))
    assert found["full"].skipped is not None
    assert "--max-seconds" in found["full"].skipped
    assert found["full"].times_ms == ()
    pattern = found["grat-b:group=4"]
    assert len(pattern.times_ms) == 2
    assert (pattern.speedup, pattern.sparse_efficiency) == (None, None)


def test_weights_that_do_not_fit_are_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_level, "available_memory", lambda device: 4 * 2**30)
    with pytest.raises(
        OutOfMemory, match=r"weights of flux-schnell take 44\.3 GiB .* 4\.0 GiB are free on cpu: .* --layers 2,4"
    ):
        step_level._refuse_large(
            random_weights.STEP_MODELS["flux-schnell"],
            architecture_for(random_weights.STEP_MODELS["flux-schnell"]).transformer,
            torch.float32,
            CPU,
        )


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInput, match=r"demo has tokens on 2 axes, --grid 3x4x6 has 3"):
        run_step_level(settings(grids=((3, 4, 6),)))
    with pytest.raises(BadInput, match="no weights of flux-dev are bundled"):
        run_step_level(settings("flux-dev", weights="own"))
    with pytest.raises(BadInput, match="add --weights random"):
        run_step_level(settings("demo", weights="own", layers=(1, 1)))
    with pytest.raises(BadInput, match="triton backend cannot run here"):
        run_step_level(settings(backend="triton", dtype="bfloat16", compare="grat-b"))
    with pytest.raises(BadInput, match="flex backend cannot run here: it does not attend blocks chosen by content"):
        run_step_level(settings(backend="flex", compare="choose"))


def test_predictions_that_are_not_finite_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Host.inside

    def broken(self: Host, variant: Any, dense: Any = None) -> Any:
        inside = stock(self, variant, dense)
        if variant.kind != "full":
            return inside

        def attach(observer: Any, step: Any) -> Any:
            return stock_attention(self.transformer, observer, step, attend=lambda q, k, v: q * torch.nan)

        return replace(inside, attach=attach)  # type: ignore[attr-defined]

    monkeypatch.setattr(Host, "inside", broken)
    found = rows(run_step_level(settings()))
    assert found["full"].skipped is not None
    assert "not finite" in found["full"].skipped
    assert found["grat-b:group=4"].skipped is None


def flux_mask(grid: Grid, kind: str, window: int, text_len: int) -> np.ndarray:
    """Pairs of a window, `[N, N]` in raster order, text first; without the project's own code."""
    coordinates = np.stack(np.unravel_index(np.arange(grid.tokens), grid.shape), axis=1)
    if kind == "clear":
        allowed = ((coordinates[:, None] - coordinates[None]) ** 2).sum(-1) < window**2
    else:
        first = [
            np.clip(column - window // 2, 0, extent - window)
            for column, extent in zip(coordinates.T, grid.shape, strict=True)
        ]
        allowed = np.ones((grid.tokens,) * 2, bool)
        for start, column in zip(first, coordinates.T, strict=True):
            allowed &= (column[None] >= start[:, None]) & (column[None] < start[:, None] + window)
    mask = np.ones((text_len + grid.tokens,) * 2, bool)
    mask[text_len:, text_len:] = allowed
    return mask


@pytest.mark.parametrize(("name", "window"), [("na:window=5", 5), ("clear:window=4", 4)])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_windows_inside_flux_equal_stock_attention_under_a_mask(
    name: str, window: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in raster order, as the torch baseline runs, and in tiles, as FlexAttention's does on a GPU."""
    if ordered:
        monkeypatch.setattr(
            inside_models, "baseline_for", lambda window, device, *_: baselines.flex_baseline(window, device)
        )
    model: Any = tiny_flux.transformer()
    grid = Grid((18, 26))
    inputs = tiny_flux.inputs(*grid.shape)
    mask = torch.from_numpy(flux_mask(grid, name.partition(":")[0], window, tiny_flux.TEXT_TOKENS))
    expected = model(**inputs, joint_attention_kwargs={"attention_mask": mask})[0]
    host = Host(model, FAMILIES["flux"], tiny_flux.TEXT_TOKENS, Backend.SDPA, CPU, torch.float32)
    inside = host.inside(variant_for(parse_variants(name)[0], grid))
    assert inside.density == pytest.approx(mask.float().mean().item())
    recorder = StepRecorder()
    with inside.attach(recorder, lambda: 0):
        result = model(**inputs)[0]
    assert ((result - expected).abs().max() / expected.abs().max()).item() < RELATIVE
    assert ((result - model(**inputs)[0]).abs().max() / expected.abs().max()).item() > 0.01
    (step,) = recorder.steps([0.0])
    assert 0 < step.attention_ms < step.total_ms
    assert step.density == inside.density


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("valid", [tiny_hunyuan.TEXT_TOKENS, 4])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_neighbourhoods_inside_hunyuan_leave_out_what_is_far(
    valid: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of text with padding, which is shorter than the text that density is told of."""
    if ordered:
        monkeypatch.setattr(
            inside_models, "baseline_for", lambda window, device, *_: baselines.flex_baseline(window, device)
        )
    model: Any = tiny_hunyuan.transformer()
    grid = Grid((3, 6, 8))
    inputs = tiny_hunyuan.inputs(grid.shape, (valid,))
    host = Host(model, FAMILIES["hunyuan"], tiny_hunyuan.TEXT_TOKENS, Backend.SDPA, CPU, torch.float32)
    stock = model(**inputs)[0]
    for name, equal in (("na:window=9", True), ("na:window=3", False), ("b:radius=9", True), ("b:radius=0", False)):
        with host.inside(variant_for(parse_variants(name)[0], grid)).attach(StepRecorder(), lambda: 0):
            result = model(**inputs)[0]
        assert (((result - stock).abs().max() / stock.abs().max()).item() < RELATIVE) == equal


@pytest.mark.parametrize("family", ["flux", "hunyuan"])
def test_watching_stock_attention_changes_nothing(family: str) -> None:
    if family == "flux":
        grid, model, inputs = Grid((6, 8)), tiny_flux.transformer(), tiny_flux.inputs(6, 8)
        text, layers = tiny_flux.TEXT_TOKENS, tiny_flux.LAYERS
    else:
        grid, model, inputs = Grid((2, 4, 6)), tiny_hunyuan.transformer(), tiny_hunyuan.inputs((2, 4, 6))
        text, layers = tiny_hunyuan.TEXT_TOKENS, tiny_hunyuan.LAYERS
    module = sys.modules[type(model).__module__]
    before = module.dispatch_attention_fn  # type: ignore[attr-defined]
    expected = model(**inputs)[0]
    recorder = StepRecorder()
    host = Host(model, FAMILIES[family], text, Backend.SDPA, CPU, torch.float32)
    full = host.inside(variant_for(parse_variants("full")[0], grid))
    with full.attach(recorder, lambda: 4):
        result = model(**inputs)[0]
    with pytest.raises(TypeError), full.attach(StepRecorder(), lambda: 0):
        model(nonsense=1)
    assert torch.equal(result, expected)
    (call,) = recorder._calls
    assert (call.step, call.density, len(call.attentions)) == (4, 1.0, layers)
    assert module.dispatch_attention_fn is before  # type: ignore[attr-defined]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_what_does_not_exist_cannot_run() -> None:
    host = Host(tiny_hunyuan.transformer(), FAMILIES["hunyuan"], 7, Backend.SDPA, CPU, torch.float32)
    with pytest.raises(CannotRun, match="two axes"):
        host.inside(variant_for(parse_variants("clear")[0], Grid((2, 4, 6))))


def test_the_command_measures_a_step(tmp_path: Any) -> None:
    done = grat(
        *(
            "bench",
            "--level",
            "step",
            "--model",
            "hunyuan",
            "--layers",
            "1,2",
            "--grid",
            "3x4x6",
            "--weights",
            "random",
        ),
        *("--compare", "grat-b:group=2", "--reps", "1", "--device", "cpu", "--dtype", "float32"),
        *("--out", str(tmp_path / "step"), "--json"),
    )
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "step.json").read_text())
    assert done.data == result
    assert (result["settings"]["double_blocks"], result["settings"]["single_blocks"]) == (1, 2)
    assert [row["name"] for row in result["cases"][0]["rows"]] == ["full", "grat-b:group=2"]
    assert all(0 < row["attention_share"] < 1 for row in result["cases"][0]["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "2x4"), "expected numbers of blocks of each kind, such as 2,4"),
        (("--layers", "0,0"), "needs one"),
        (("--weights", "real"), "--weights real"),
        (("--weights", "own", "--model", "flux-dev"), "no weights of flux-dev are bundled"),
        (("--weights", "own", "--layers", "1,1"), "add --weights random"),
        (("--model", "hunyuan", "--res", "1024"), "--grid 33x45x80"),
    ],
)
def test_the_command_says_what_does_not_fit(options: tuple[str, ...], message: str) -> None:
    given = options if "--model" in options else ("--model", "demo", *options)
    assert message in refusal("bench", "--level", "step", "--device", "cpu", *given)
