"""GRAT inside transformers of no known family."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_flux
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_longcat_image import LongCatImageTransformer2DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from flux_runs import relative_difference

import grat_cli
from grat_cli.errors import BadInput, NumericalFailure
from grat_cli.presets import Preset, load_preset, resolve_preset
from grat_kernels import Grid, Grouping, build_plan

# fp32 sums in another order, in every layer.
RELATIVE = 2e-6
STEPS = 4


class Case:
    """A transformer, what it is called with, and where its tokens are."""

    def __init__(self, model: Any, grid: Grid, text: str | None, call: Callable[[Any], torch.Tensor]) -> None:
        self.model, self.grid, self.text, self._call = model.eval(), grid, text, call
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(0)
        self.pipe = SimpleNamespace(transformer=model, scheduler=scheduler, _execution_device=torch.device("cpu"))

    def __call__(self) -> torch.Tensor:
        with torch.no_grad():
            return self._call(self.model)

    def install(self, preset: Preset | None = None, **options: Any) -> Any:
        wanted: dict[str, Any] = {"tokens": self.grid, "text": self.text} | options
        return grat_cli.install(self.pipe, preset or self.preset("full"), **wanted)

    def preset(self, variant: str) -> Preset:
        items = [f"attention.group={[4, 4] if self.grid.axes == 2 else [2, 4, 4]}"]
        if variant == "b":
            items += ["attention.variant=b", "attention.radius=0"]
        name = "flux-full" if self.grid.axes == 2 else "hunyuan-full"
        return resolve_preset(load_preset(name), set_items=[*items, f"sampling.steps={STEPS}"])


def video_without_text() -> Case:
    """Text is attended apart; the grid is ragged, the batch two."""
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    grid = Grid((3, 6, 5))
    tokens, text = torch.randn(2, grid.tokens, 8), torch.randn(2, 7, 16)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])

    def call(model: Any) -> torch.Tensor:
        timestep = torch.tensor([500, 500])
        return model(tokens, text, timestep, mask, num_frames=3, height=6, width=5).sample

    return Case(model, grid, None, call)


def picture_with_text_first() -> Case:
    torch.manual_seed(1)
    model = LongCatImageTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 6, 6],
    )
    grid = Grid((9, 6))
    row, column = torch.meshgrid(torch.arange(9), torch.arange(6), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).float()
    tokens, text = torch.randn(2, grid.tokens, 8), torch.randn(2, 5, 16)

    def call(model: Any) -> torch.Tensor:
        return model(tokens, text, torch.tensor([0.5, 0.5]), ids, torch.zeros(5, 3)).sample

    return Case(model, grid, "first", call)


def picture_with_text_last() -> Case:
    """Refiners see the picture alone, or text alone; the others see both. Inputs are lists."""
    torch.manual_seed(2)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )
    grid = Grid((8, 8))
    latents, text = [torch.randn(4, 1, 16, 16)], [torch.randn(32, 16)]

    def call(model: Any) -> torch.Tensor:
        return model(latents, torch.tensor([0.5]), text, return_dict=False)[0][0]

    return Case(model, grid, "last", call)


CASES = {"video": video_without_text, "text first": picture_with_text_first, "text last": picture_with_text_last}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def test_full_attention_equals_stock_and_leaving_restores_exactly(case: Case) -> None:
    stock, backends = case(), list(_AttentionBackendRegistry._backends)
    processors = [getattr(module, "processor", None) for module in case.model.modules()]
    with case.install() as installation:
        assert relative_difference(case(), stock) < RELATIVE
        assert installation.last_schedule.density == 1
    assert [getattr(module, "processor", None) for module in case.model.modules()] == processors
    assert list(_AttentionBackendRegistry._backends) == backends
    assert not case.model._forward_hooks
    assert not case.model._forward_pre_hooks
    assert torch.equal(case(), stock)


def test_a_pattern_is_its_mask_in_raster_order(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = case.preset("b")
    with case.install(preset) as installation:
        found = case()
        assert installation.last_schedule.density < 1
    grouping = Grouping(case.grid, preset.attention.group)
    native = _AttentionBackendRegistry._active_backend
    stock = _AttentionBackendRegistry._backends[native]

    def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **others: Any) -> torch.Tensor:
        text = query.shape[1] - case.grid.tokens
        if query.shape[1] == key.shape[1] and text >= 0:
            plan = build_plan(grouping, preset.attention.pattern(), text, case.text != "last")
            others["attn_mask"] = _raster_mask(plan)
        return stock(query, key, value, **others)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, native, masked)
    assert relative_difference(found, case()) < RELATIVE


def _raster_mask(plan: Any) -> torch.Tensor:
    """What attends what, `[N, N]` with image tokens in raster order."""
    mask = torch.zeros(plan.tokens, plan.tokens, dtype=torch.bool)
    for run in plan.query_runs:
        for span in plan.span_lists[run.span_list]:
            mask[run.start : run.start + run.length, span.start : span.stop] = True
    order = torch.arange(plan.tokens)
    order[plan.image_start : plan.image_stop] = plan.image_start + torch.from_numpy(plan.inverse)
    return mask[order][:, order]


def test_a_grid_of_other_tokens_is_refused_by_the_first_call() -> None:
    case = picture_with_text_first()
    with case.install(tokens=Grid((9, 7))), pytest.raises(BadInput, match="runs over 63 tokens: give the grid"):
        case()
    with case.install(text=None), pytest.raises(BadInput, match="59 tokens, 5 more than the grid 9x6: say where text"):
        case()
    assert case().isfinite().all()


def test_the_check_finds_attention_that_is_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    case = video_without_text()
    native = _AttentionBackendRegistry._active_backend
    stock = _AttentionBackendRegistry._backends[native]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends,
        native,
        lambda query, key, value, **others: stock(query, key, value, **others) * 1.5,
    )
    with case.install(), pytest.raises(NumericalFailure, match=r"differs from the transformer's own by 0\.\d"):
        case()
    with case.install(check=False):
        assert case().isfinite().all()


def test_masks_that_hide_more_than_padding_are_refused() -> None:
    case = picture_with_text_first()
    attention = case.model.transformer_blocks[0].attn
    forward = attention.forward

    def with_mask(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs, attention_mask=torch.ones(1, 1, 59, 59, dtype=torch.bool).tril())

    attention.forward = with_mask
    with case.install(), pytest.raises(BadInput, match="masks attention by query and key"):
        case()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guard": 0.9}, "a guard needs a transformer that GRAT knows"),
        ({"tokens": Grid((2, 4, 4))}, "is for tokens on 2 axes, not on 3: use another, such as hunyuan-far"),
        ({"text": "middle"}, "text 'middle': expected 'first', 'last' or None"),
    ],
)
def test_what_it_cannot_do_is_said(options: dict[str, Any], words: str) -> None:
    case = picture_with_text_first()
    with pytest.raises(BadInput, match=words), case.install(**options):
        pass


def test_a_known_family_takes_a_size() -> None:
    with (
        pytest.raises(BadInput, match="GRAT knows Flux: give height and width in place of tokens"),
        grat_cli.install(tiny_flux.pipeline(), "flux-b", tokens=Grid((4, 4))),
    ):
        pass
    with pytest.raises(BadInput, match="give height and width"), grat_cli.install(tiny_flux.pipeline(), "flux-b"):
        pass


def test_a_second_install_inside_is_refused() -> None:
    case = video_without_text()
    with case.install(), pytest.raises(BadInput, match="already installed"), case.install():
        pass
