"""Attention carried over steps, against stock diffusers whose attentions follow the same formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import combinations
import pytest
import tiny_flux
import tiny_flux2
import tiny_hunyuan
import tiny_qwen
import tiny_wan
import torch
from carried_attention import stock_carried
from flux_runs import GUIDED, HEIGHT, WIDTH, NoHostReads, call, preset, relative_difference, snapshot

import grat_cli
from grat_cli.attention.keeping import Keeper
from grat_cli.errors import BadInput
from grat_cli.models.compiling import compile_blocks
from grat_cli.presets import Preset
from grat_kernels import Grid

STEPS = 7
# Two computations of an fp32 pass, and the differences of some of them, through seven steps.
RELATIVE = 5e-5
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}
REFERENCES = [0, 2, 5]
SLOPES = [{"steps": "0-3", "slope": 0.4}, {"steps": "4-6", "slope": 0.9}]
EXTRAPOLATED: dict[str, Any] = {"reference": REFERENCES, "slope": SLOPES}
RESIDUAL: dict[str, Any] = {**EXTRAPOLATED, "between": "residual", "base": {"variant": "b", "radius": 0}}


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_flux.pipeline()


def slope(step: int) -> float:
    return 0.4 if step < 4 else 0.9


def run(pipe: Any, **arguments: Any) -> torch.Tensor:
    return call(pipe, **{"num_inference_steps": STEPS, **arguments})


def full(over_steps: Any, **schedule: Any) -> Preset:
    return preset(schedule={"over_steps": over_steps, **schedule})


class Model(NamedTuple):
    """Of a family: a pipeline, what presets are made for, groups, size and other arguments, and where stock attention
    is carried in the same way."""

    make: Callable[[], Any]
    presets: str
    group: list[int]
    size: dict[str, Any]
    arguments: dict[str, Any]
    where: Literal["module", "attention"] = "module"

    def chosen(self, over_steps: Any, **attention: Any) -> Preset:
        return Preset.model_validate(
            {
                "name": "test",
                "model": self.presets,
                "attention": {"variant": "full", "group": self.group, **attention},
                "schedule": {"over_steps": over_steps},
                "kernel": {"backend": "sdpa"},
            }
        )

    def run(self, pipe: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        steps: dict[str, Any] = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}
        made = pipe(**self.size, **self.arguments, **steps)
        return made.images if hasattr(made, "images") else made.frames


PICTURE = {"height": 144, "width": 208}
VIDEO = {"height": 48, "width": 80, "num_frames": 13}
WAVES = {"prompt": "waves at night under a red boat", "max_sequence_length": 16}
MODELS = {
    "flux, two calls": Model(tiny_flux.pipeline, "flux", [4, 4], PICTURE, {**tiny_flux.prompt(), **GUIDED}),
    "flux2": Model(
        tiny_flux2.pipeline, "flux2", [4, 4], PICTURE, {**tiny_flux2.prompt(), "guidance_scale": 1.0}, "attention"
    ),
    "qwen, two calls": Model(
        tiny_qwen.pipeline,
        "qwen",
        [4, 4],
        PICTURE,
        {**tiny_qwen.prompt(7), **tiny_qwen.negative_prompt(5), "true_cfg_scale": 2.0},
    ),
    "hunyuan": Model(tiny_hunyuan.pipeline, "hunyuan", [2, 3, 3], VIDEO, WAVES),
    "wan, two transformers and calls": Model(
        lambda: tiny_wan.pipeline("two"), "wan", [2, 3, 3], VIDEO, {**WAVES, "guidance_scale": 3.0}
    ),
}


# ---- The formula


@pytest.mark.parametrize("name", MODELS)
def test_full_attention_carried_over_steps_equals_stock_carried_likewise(name: str) -> None:
    model = MODELS[name]
    pipe = model.make()
    with grat_cli.install(pipe, model.chosen(EXTRAPOLATED), **model.size) as installation:
        made = model.run(pipe)
        works = [installation.work and installation.work.of_step(step) for step in range(STEPS)]
        assert torch.equal(model.run(pipe), made)
    with stock_carried(pipe, model.where, REFERENCES, slope):
        expected = model.run(pipe)
    assert relative_difference(made, expected) < RELATIVE
    assert relative_difference(made, model.run(pipe)) > 100 * RELATIVE, "nothing was carried"
    assert all(work and work.density in (0, 1) for work in works)
    computed = [step for step, work in enumerate(works) if work and work.density]
    # Wan's second transformer takes over at a step to which nothing of its own can be carried.
    assert computed == ([0, 2, 4, 5] if "transformers" in name else REFERENCES)


@pytest.mark.parametrize("between", ["reuse", "extrapolate"])
@pytest.mark.parametrize("reference", [3, {"spaced": 3}, [0, 0.5]])
def test_references_by_number_share_and_sigma_and_outputs_reused(pipe: Any, between: str, reference: Any) -> None:
    section = {"reference": reference, "between": between, **({"slope": 0.5} if between == "extrapolate" else {})}
    with grat_cli.install(pipe, full(section), **SIZE) as installation:
        made = run(pipe)
        work = installation.work
        assert work is not None
        steps = [step for step in range(STEPS) if (done := work.of_step(step)) and done.density]
    if isinstance(reference, dict):
        # The sigmas that the run had.
        sigmas = pipe.scheduler.sigmas.tolist()
        wanted = [sigmas[0] * (1 - number / 3) for number in range(3)]
        nearest = [min(range(STEPS), key=lambda step: abs(sigmas[step] - one)) for one in wanted]
        assert steps == nearest != [0, 2, 5]
    else:
        assert steps == ([0, 3, 6] if reference == 3 else [0, 4])
    with stock_carried(pipe, "module", steps, lambda step: 0.0 if between == "reuse" else 0.5):
        assert relative_difference(made, run(pipe)) < RELATIVE


def test_sparse_attention_some_layers_and_dense_steps(pipe: Any) -> None:
    """Layers in no section are computed at every step, and dense steps are references."""
    schedule = {"dense_steps": 2, "over_steps": {"reference": [4], "layers": "1-2"}}
    sparse = preset("b", radius=0, schedule=schedule)
    with grat_cli.install(pipe, sparse, **SIZE) as installation:
        run(pipe)
        laid_out, work = installation.last_schedule, installation.work
        assert work is not None
        found = [work.of_step(step) for step in range(STEPS)]
    density = laid_out.plan(6, 0).density
    assert [done and done.density for done in found] == [laid_out.density_of_step(step) for step in range(STEPS)]
    assert laid_out.density_of_step(3) == pytest.approx(density / 3)
    assert [done and done.computed for done in found] == [(), (), ("0",), ("0",), (), ("0",), ("0",)]


def test_image_to_image_counts_from_the_first_step_that_is_run() -> None:
    pipe = tiny_flux.image_to_image()
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    arguments = {"image": image, "strength": 0.7, "num_inference_steps": 10}
    with grat_cli.install(pipe, full(EXTRAPOLATED), **SIZE):
        made = run(pipe, **arguments)
    with stock_carried(pipe, "module", [3 + step for step in REFERENCES], lambda step: slope(step - 3)):
        assert relative_difference(made, run(pipe, **arguments)) < RELATIVE


@pytest.mark.parametrize("apply", ["LoRA", "offload model", "offload group", "offload sequential", "cast to fp8"])
def test_with_what_changes_how_weights_are_held(apply: str) -> None:
    """Modules that are skipped leave the next ones' weights to be brought all the same."""
    feature = combinations.FEATURES[apply]
    pipe = tiny_flux.pipeline()
    feature.apply(pipe)
    with grat_cli.install(pipe, full(EXTRAPOLATED), **SIZE):
        made = run(pipe)
    if feature.changes:
        with stock_carried(pipe, "module", REFERENCES, slope):
            expected = run(pipe)
    else:
        with grat_cli.install(plain := tiny_flux.pipeline(), full(EXTRAPOLATED), **SIZE):
            expected = run(plain)
    assert relative_difference(made, expected) < RELATIVE


# ---- The difference to a base


@pytest.mark.parametrize("name", ["flux, two calls", "flux2", "hunyuan"])
def test_with_a_base_of_the_same_attention_nothing_is_lost(name: str) -> None:
    model = MODELS[name]
    pipe = model.make()
    plain = model.chosen(None, variant="b", radius=1)
    with grat_cli.install(pipe, plain, **model.size):
        expected = model.run(pipe)
    over_steps = {**RESIDUAL, "base": {"variant": "b", "radius": 1}}
    with grat_cli.install(pipe, model.chosen(over_steps, variant="b", radius=1), **model.size):
        assert torch.equal(model.run(pipe), expected)


def test_the_difference_to_a_base_is_carried(pipe: Any) -> None:
    """Written once more, in place of what layers compute, with the same plans."""
    far = {"variant": "b", "radius": 0, "far": [{"beyond": 0, "block": [2, 2]}]}
    chosen = preset("b", radius=1, schedule={"over_steps": {**RESIDUAL, "base": far}})
    with grat_cli.install(pipe, chosen, **SIZE) as installation:
        made = run(pipe)
        laid_out, work = installation.last_schedule, installation.work
        assert work is not None
        found = [work.of_step(step) for step in range(STEPS)]
        base, reference = laid_out.plan(3, 0), laid_out.plan(2, 0)
    assert [done and done.density for done in found] == [laid_out.density_of_step(step) for step in range(STEPS)]
    assert laid_out.density_of_step(2) == pytest.approx(base.density + reference.density)
    assert laid_out.density_of_step(3) == pytest.approx(base.density)

    from grat_cli.attention.layer import AttentionInputs, LayerAttention, over_spans
    from grat_kernels import Backend

    attend = over_spans(Backend.SDPA)
    kept: dict[int, list[tuple[int, torch.Tensor]]] = {}

    def oracle(
        self: LayerAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        def of(plan: Any) -> torch.Tensor:
            return attend(AttentionInputs(self._layer, query, key, value, plan, query.shape[-1] ** -0.5))

        step, of_base = pipe.scheduler.step_index or 0, of(base)
        residuals = kept.setdefault(self._layer, [])
        if step in REFERENCES:
            whole = of(reference)
            residuals.append((step, whole - of_base))
            return whole
        (last, residual), (before, earlier) = residuals[-1], residuals[-2] if len(residuals) > 1 else residuals[-1]
        factor = slope(step) * (step - last) / max(last - before, 1)
        return of_base + residual + factor * (residual - earlier)

    with pytest.MonkeyPatch.context() as patch, grat_cli.install(pipe, chosen, **SIZE):
        patch.setattr(LayerAttention, "compute", oracle)
        assert relative_difference(made, run(pipe)) < RELATIVE


# ---- Nothing leaks


@pytest.mark.parametrize(("section", "keep"), [(EXTRAPOLATED, "device"), (EXTRAPOLATED, "fp8"), (RESIDUAL, "host")])
def test_runs_do_not_see_each_other(pipe: Any, section: dict[str, Any], keep: str) -> None:
    chosen, stock = full({**section, "keep": keep}), run(pipe)
    before = snapshot(pipe.transformer)

    def alone(**arguments: Any) -> torch.Tensor:
        with grat_cli.install(pipe, chosen, **SIZE):
            return run(pipe, **arguments)

    expected, guided = alone(), alone(**GUIDED)
    seed = {"generator": torch.Generator().manual_seed(6)}
    of_seed = alone(**seed)
    seed["generator"].manual_seed(6)
    fewer = alone(num_inference_steps=6)

    calls = 0

    def fail(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("broken off")

    def fail_between(*_: Any) -> dict[str, Any]:
        fail()
        return {}

    with grat_cli.install(pipe, chosen, **SIZE) as installation:
        assert torch.equal(run(pipe), expected)
        assert torch.equal(run(pipe, **seed), of_seed)
        for inside in (True, False):
            calls = 0
            handle = pipe.transformer.norm_out.register_forward_hook(fail if inside else lambda *_: None)
            with pytest.raises(RuntimeError, match="broken off"):
                run(pipe, **({} if inside else {"callback_on_step_end": fail_between}))
            handle.remove()
            assert torch.equal(run(pipe, **GUIDED), guided)
        with pytest.raises(BadInput, match="GRAT was installed for 18x26"):
            run(pipe, height=160)
        assert torch.equal(run(pipe, num_inference_steps=6), fewer)
        batch = run(pipe, **tiny_flux.prompt(2), generator=[torch.Generator().manual_seed(5) for _ in range(2)])
        assert batch.shape[0] == 2
        assert torch.equal(run(pipe), expected)
        carrying = installation.carrying
        assert carrying is not None
        assert carrying.most_kept_bytes
        assert not carrying.kept_bytes, "something is kept when nothing is carried on"
    assert snapshot(pipe.transformer) == before
    assert torch.equal(run(pipe), stock)


def test_after_a_call_that_was_broken_off_nothing_is_carried_on(pipe: Any) -> None:
    with grat_cli.install(pipe, full(EXTRAPOLATED), **SIZE) as installation:
        run(pipe)
        carrying = installation.carrying
        assert carrying is not None
        pipe.scheduler.set_timesteps(STEPS, mu=1.0)
        inputs = tiny_flux.inputs(18, 26)
        pipe.transformer(**inputs)
        pipe.scheduler.set_begin_index(0)
        assert carrying.kept_bytes
        handle = pipe.transformer.norm_out.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("off")))
        with pytest.raises(RuntimeError, match="off"):
            pipe.transformer(**inputs)
        handle.remove()
        assert not carrying.kept_bytes


def test_inputs_of_another_form_are_computed(pipe: Any) -> None:
    """A batch that changes at a step to which attention is carried has nothing that would fit it."""
    with grat_cli.install(pipe, full({"reference": [0]}), **SIZE) as installation:
        run(pipe)
        pipe.scheduler.set_timesteps(STEPS, mu=1.0)
        one, two = tiny_flux.inputs(18, 26), tiny_flux.inputs(18, 26, batch=2)
        pipe.transformer(**one)
        assert installation.work is not None
        sigma = pipe.scheduler.step(torch.zeros(1), pipe.scheduler.timesteps[0], torch.zeros(1))
        assert sigma is not None
        made = pipe.transformer(**two)[0]
        assert installation.work.of_step(1) == grat_cli.attention.work.StepWork(1.0)
    with grat_cli.install(pipe, preset(), **SIZE):
        assert torch.equal(pipe.transformer(**two)[0], made)


# ---- Where what is kept lies


def test_what_is_kept_in_8_bits_is_near_and_a_quarter(pipe: Any) -> None:
    made, kept = {}, {}
    for keep in ("device", "fp8", "host"):
        with grat_cli.install(pipe, full({**EXTRAPOLATED, "keep": keep}), **SIZE) as installation:
            made[keep] = run(pipe)
            assert installation.carrying is not None
            kept[keep] = installation.carrying.most_kept_bytes
    assert torch.equal(made["host"], made["device"])  # one and the same where there is no other device
    # Output and slope of every layer's image and text tokens, fp32; a scale a row besides for 32 channels in 8 bits.
    tokens = Grid((18, 26)).tokens + tiny_flux.TEXT_TOKENS
    assert kept["device"] == kept["host"] == 2 * tiny_flux.LAYERS * tokens * 32 * 4
    assert kept["fp8"] == 2 * tiny_flux.LAYERS * tokens * (32 + 4)
    stock = run(pipe)
    assert relative_difference(made["fp8"], made["device"]) < relative_difference(made["device"], stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["device", "fp8", "host"])
def test_tensors_are_kept_within_the_rounding_of_their_kind(where: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor, change = (torch.randn(3, 5, 2, 16, generator=generator).to(dtype) * 10 for _ in range(2))
    tensor[0, 0] = 0
    keeper = Keeper()
    one, other = keeper.keep(where, tensor), keeper.keep(where, change)
    # e4m3 has three bits behind the leading one, and loses its smallest numbers: 2^-9 of 448, in the row's scale.
    lost = 0.0 if where != "fp8" else 2.0**-4
    bound = lost * tensor.abs().float() + (lost and 2.0**-9 / 448) * tensor.abs().float().amax(-1, keepdim=True)
    bound += torch.finfo(dtype).eps * tensor.abs().float()
    assert ((one.get().float() - tensor.float()).abs() <= bound).all()
    parts = one.get().float(), 1.5 * other.get().float()
    rounding = 2 * torch.finfo(dtype).eps * (parts[0].abs() + parts[1].abs())
    assert ((one.plus(other, 1.5).float() - sum(parts)).abs() <= rounding).all()
    assert torch.equal(one.plus(None, 1.5), one.get())


# ---- Together with others


@pytest.mark.parametrize("section", [EXTRAPOLATED, RESIDUAL])
def test_nothing_waits_for_the_device(pipe: Any, section: dict[str, Any]) -> None:
    inputs = tiny_flux.inputs(18, 26)
    for keep in ("device", "fp8"):
        with grat_cli.install(pipe, full({**section, "keep": keep}), **SIZE):
            run(pipe)
            pipe.scheduler.set_timesteps(STEPS, mu=1.0)
            pipe.transformer(**inputs)
            with NoHostReads():
                for step in range(1, STEPS):
                    pipe.scheduler.set_begin_index(0)
                    pipe.scheduler._step_index = step
                    pipe.transformer(**inputs)


@pytest.mark.parametrize("name", ["flux, two calls", "flux2", "qwen, two calls"])
def test_blocks_in_chunks_of_tokens(name: str) -> None:
    model = MODELS[name]
    pipe = model.make()
    with grat_cli.install(pipe, model.chosen(EXTRAPOLATED), **model.size):
        expected = model.run(pipe)
    with grat_cli.install(pipe, model.chosen(EXTRAPOLATED), **model.size, chunk_tokens=256):
        assert relative_difference(model.run(pipe), expected) < RELATIVE


@pytest.mark.parametrize("kind", ["first-block", "mag"])
def test_with_a_cache_of_blocks_references_that_it_skips_are_not_computed(pipe: Any, kind: str) -> None:
    ratios = [1.0, 1.01, 0.99, 1.01, 1.01, 0.99, 1.01]
    cache = {"kind": kind} | ({"threshold": 0.05, "ratios": ratios} if kind == "mag" else {"threshold": 1.0})
    data = full({"reference": [0, 1, 3, 4, 6]}).model_dump()
    with grat_cli.install(pipe, preset(), **SIZE, cache=Preset.model_validate({**data, "cache": cache}).cache) as alone:
        run(pipe)
        assert alone.work is not None
        skipped = {step: done.computed for step in range(STEPS) if (done := alone.work.of_step(step))}
    assert any(skipped.values())
    with grat_cli.install(pipe, Preset.model_validate({**data, "cache": cache}), **SIZE) as installation:
        made = run(pipe)
        assert torch.equal(run(pipe), made)
        assert installation.work is not None
    # Stock diffusers with the same cache around attentions that are carried likewise: whatever the cache leaves out,
    # the last two that were computed count.
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
    from diffusers.hooks.mag_cache import MagCacheConfig

    config: Any = FirstBlockCacheConfig(threshold=1.0)
    if kind == "mag":
        config = MagCacheConfig(mag_ratios=ratios, num_inference_steps=STEPS, threshold=0.05)
    with stock_carried(pipe, "module", [0, 1, 3, 4, 6], lambda step: 0.9):
        pipe.transformer.enable_cache(config)
        try:
            assert relative_difference(made, run(pipe)) < RELATIVE
        finally:
            pipe.transformer.disable_cache()


@pytest.mark.parametrize("kind", ["taylor", "pab", "faster"])
def test_caches_that_take_the_place_of_attention_are_refused(pipe: Any, kind: str) -> None:
    with (
        pytest.raises(BadInput, match=rf"^cache: {kind} and schedule.over_steps take the same place: leave out one"),
        grat_cli.install(pipe, full(EXTRAPOLATED), **SIZE, cache=kind),
    ):
        pass


def test_a_cache_of_attentions_that_the_caller_enabled_is_refused() -> None:
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

    pipe = tiny_flux.pipeline()
    with grat_cli.install(pipe, full(EXTRAPOLATED), **SIZE):
        pipe.transformer.enable_cache(TaylorSeerCacheConfig())
        with pytest.raises(BadInput, match=r"TaylorSeerCacheConfig, and schedule.over_steps take the same place"):
            run(pipe)
        pipe.transformer.disable_cache()


def test_compiled_blocks_carry_with_one_graph_of_each_kind(pipe: Any) -> None:
    """Outputs of the first block, and of the others the difference to a base."""
    from torch._dynamo.utils import counters

    chosen = full([{**EXTRAPOLATED, "layers": 0}, {**RESIDUAL, "layers": "1-2"}])
    with grat_cli.install(pipe, chosen, **SIZE):
        expected = run(pipe)
    pipe = tiny_flux.pipeline()
    torch._dynamo.reset()
    counters.clear()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=True)
    with grat_cli.install(pipe, chosen, **SIZE) as installation:
        made = run(pipe)
        graphs = counters["stats"]["unique_graphs"]
        assert torch.equal(run(pipe), made)
        assert installation.work is not None
        done = [installation.work.of_step(step) for step in range(STEPS)]
    # As uncompiled: two of single blocks, because the first is given parts of other tensors.
    assert counters["stats"]["unique_graphs"] == graphs <= 3
    assert [one.computed for one in done if one] == [() if step in REFERENCES else ("1-2",) for step in range(STEPS)]
    torch._dynamo.reset()
    assert relative_difference(made, expected) < RELATIVE


def test_blocks_that_are_compiled_inside_are_refused() -> None:
    pipe = tiny_flux.pipeline()
    with grat_cli.install(pipe, full(EXTRAPOLATED), **SIZE):
        compile_blocks([pipe.transformer])
        with pytest.raises(BadInput, match=r"carried over steps, .* compiled inside .*: compile it before"):
            run(pipe)


def test_a_transformer_that_is_not_known_is_refused() -> None:
    other: Any = SimpleNamespace(transformer=torch.nn.Linear(2, 2), scheduler=None)
    with (
        pytest.raises(BadInput, match=r"schedule.over_steps needs a transformer that GRAT knows: leave it out"),
        grat_cli.install(other, full(EXTRAPOLATED), tokens=Grid((18, 26))),
    ):
        pass
