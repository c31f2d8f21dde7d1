"""Ways in which a call may differ from what `install` saw: each is followed, as stock diffusers has it, or refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import tiny_flux
import tiny_hunyuan
import tiny_wan
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from flux_runs import HEIGHT, RELATIVE_OF_PIPELINES, WIDTH, call, preset, relative_difference, snapshot
from small_transformers import MODELS, FullRun, Run

import grat_cli
from grat_cli.errors import BadInput
from grat_cli.presets import Attention, Preset, load_preset
from grat_kernels import Backend

SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}


@pytest.fixture
def pipe() -> Any:
    return tiny_flux.pipeline()


def refused(pipe: Any, change: Callable[[Any], Any], match: str) -> None:
    """A change inside `install` is refused at the next call, and leaving restores what was not changed."""
    with grat_cli.install(pipe, preset("b"), **SIZE), pytest.raises(BadInput, match=match):
        called_around(pipe, change)


def called_around(pipe: Any, change: Callable[[Any], Any]) -> None:
    call(pipe)
    change(pipe)
    call(pipe)


# ---- Transformers and their parts


def test_a_transformer_that_takes_the_place_of_the_installed_one_is_refused(pipe: Any) -> None:
    def replace(pipe: Any) -> None:
        pipe.transformer = tiny_flux.transformer()

    match = "the pipeline's transformer was replaced inside"
    with pytest.raises(BadInput, match=match):  # said once more where the block is left
        refused(pipe, replace, match)


def test_it_is_refused_at_the_end_where_no_call_was_seen(pipe: Any) -> None:
    def replace(pipe: Any, step: int, *arguments: Any) -> dict[str, Any]:
        pipe.transformer = tiny_flux.transformer()
        return {}

    with pytest.raises(BadInput, match="transformer was replaced inside"), grat_cli.install(pipe, preset("b"), **SIZE):
        call(pipe, callback_on_step_end=replace)
    assert "check_inputs" not in vars(pipe)


def test_the_second_of_two_transformers_is_not_replaced_either() -> None:
    pipe = tiny_wan.pipeline("turns" if "turns" in tiny_wan.KINDS else "two")
    size: dict[str, Any] = {"height": 48, "width": 80, "num_frames": 13}
    with (
        pytest.raises(BadInput, match="transformer_2 was replaced inside"),
        grat_cli.install(pipe, load_preset("wan-full"), **size),
    ):
        pipe.transformer_2 = copy.deepcopy(pipe.transformer_2)


def test_a_transformer_that_is_let_go_of_is_no_mistake(pipe: Any) -> None:
    with grat_cli.install(pipe, preset("b"), **SIZE):
        call(pipe)
        pipe.transformer = None


def test_blocks_and_attentions_that_are_replaced_are_refused(pipe: Any) -> None:
    def block(pipe: Any) -> None:
        pipe.transformer.single_transformer_blocks[0] = tiny_flux.transformer().single_transformer_blocks[0]

    def fewer(pipe: Any) -> None:
        del pipe.transformer.single_transformer_blocks[1]

    def attention(pipe: Any) -> None:
        pipe.transformer.transformer_blocks[0].attn = tiny_flux.transformer().transformer_blocks[0].attn

    def processors(pipe: Any) -> None:
        pipe.transformer.set_attn_processor(stock)

    stock = pipe.transformer.transformer_blocks[0].attn.processor
    for change in (block, fewer, attention, processors):
        refused(tiny_flux.pipeline(), change, "replaced inside `with grat_cli")


@pytest.mark.parametrize("part", ["rope", "patch_embedding", "proj_out"])
def test_modules_that_put_tokens_in_order_are_not_replaced(part: str) -> None:
    """Their hooks would be gone, and tokens in one order attended in another."""
    model, adapter_class = tiny_wan.transformer(), MODELS["wan"].adapter
    grid = MODELS["wan"].grids[0]

    adapter = adapter_class(model, grid)
    with torch.no_grad(), adapter.attached(Run(adapter), Backend.SDPA):
        setattr(model, part, copy.deepcopy(getattr(model, part)))
        with pytest.raises(BadInput, match="parts of the transformer were replaced"):
            model(**MODELS["wan"].inputs(grid))


def test_another_attention_backend_inside_is_refused() -> None:
    """Stock processors of most families would follow it, and attend all tokens without a word."""

    for name in ("flux2", "qwen", "wan"):
        model = MODELS[name]
        transformer = model.make()
        adapter = model.adapter(transformer, model.grids[0])
        with torch.no_grad(), adapter.attached(Run(adapter), Backend.SDPA):
            transformer(**model.inputs(model.grids[0]))
            transformer.set_attention_backend("native")
            with pytest.raises(BadInput, match="or what they name was"):
                transformer(**model.inputs(model.grids[0]))


def test_projections_that_are_fused_inside_are_followed(pipe: Any) -> None:
    with grat_cli.install(pipe, preset("b"), **SIZE):
        expected = call(pipe)
        pipe.transformer.fuse_qkv_projections()
        assert relative_difference(call(pipe), expected) < RELATIVE_OF_PIPELINES
    with grat_cli.install(pipe, preset("b"), **SIZE):
        assert relative_difference(call(pipe), expected) < RELATIVE_OF_PIPELINES


def test_parts_of_a_transformer_are_not_called_past_it(pipe: Any) -> None:
    """Only a call of the transformer says which step it is, and puts tokens in order."""
    attention = pipe.transformer.transformer_blocks[0].attn
    given = torch.zeros(1, 468, 32), torch.zeros(1, tiny_flux.TEXT_TOKENS, 32)
    with torch.no_grad(), grat_cli.install(pipe, preset("b"), **SIZE):
        for _ in range(2):
            with pytest.raises(BadInput, match="called past the transformer itself"):
                attention(*given)
            call(pipe)

            def fail(*arguments: Any) -> None:
                raise RuntimeError("in a hook")

            handle = pipe.transformer.proj_out.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="in a hook"):
                call(pipe)
            handle.remove()


# ---- Copies, and other pipelines


def test_copies_that_are_made_inside_are_refused(pipe: Any) -> None:
    with grat_cli.install(pipe, preset("b"), **SIZE):
        inside = copy.deepcopy(pipe)
        with pytest.raises(BadInput, match="is a copy of one that GRAT is installed on"):
            call(inside)
        expected = call(pipe)
    with pytest.raises(BadInput, match="is a copy of one that GRAT is installed on"):
        call(inside)
    outside = copy.deepcopy(pipe)
    assert snapshot(outside.transformer)[1:] == snapshot(pipe.transformer)[1:]
    with grat_cli.install(outside, preset("b"), **SIZE):
        assert torch.equal(call(outside), expected)


def test_another_pipeline_with_the_same_transformer_and_scheduler_is_followed(pipe: Any) -> None:
    other = tiny_flux.FluxPipeline(**pipe.components)
    with grat_cli.install(pipe, preset("b", {"dense_steps": 1}), **SIZE):
        assert torch.equal(call(other), call(pipe))


@pytest.mark.parametrize(
    ("state", "match"),
    [("new", "has no steps"), ("done", "has done all its steps"), ("broken off", "stands still")],
)
def test_another_pipeline_with_a_scheduler_of_its_own_is_refused(pipe: Any, state: str, match: str) -> None:
    """The installed one's says nothing of the steps of such a call."""

    def stop(pipe: Any, step: int, *arguments: Any) -> dict[str, Any]:
        raise RuntimeError("broken off")

    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    other = tiny_flux.FluxPipeline(**{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler()})
    with grat_cli.install(pipe, preset("b", {"dense_steps": 1}), **SIZE):
        if state != "new":
            stopped = state == "broken off"
            with pytest.raises(RuntimeError, match="broken off") if stopped else nullcontext():
                call(pipe, num_inference_steps=8, callback_on_step_end=stop if stopped else None)
        with pytest.raises(BadInput, match=match):
            call(other, num_inference_steps=8)


def test_a_scheduler_in_the_place_of_another_is_followed(pipe: Any) -> None:
    with grat_cli.install(pipe, preset("b", {"dense_steps": 1}), **SIZE) as installation:
        expected = call(pipe)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        assert torch.equal(call(pipe), expected)
        call(pipe, num_inference_steps=5)
        assert installation.last_schedule.steps == 5
        pipe.scheduler = Uncounted()
        with pytest.raises(BadInput, match="Uncounted, which does not count its steps"):
            call(pipe)


class Uncounted(FlowMatchEulerDiscreteScheduler):
    """One that keeps no step index."""

    step_index = property()  # type: ignore[assignment]


def test_a_loop_of_ones_own_over_the_transformer_is_followed(pipe: Any) -> None:
    """As a pipeline does it: the scheduler is given steps, and goes on after each."""
    inputs = tiny_flux.inputs(HEIGHT // 8, WIDTH // 8)
    with torch.no_grad(), grat_cli.install(pipe, preset("b", {"dense_steps": 1}), **SIZE) as installation:
        with pytest.raises(BadInput, match="has no steps"):
            pipe.transformer(**inputs)
        pipe.scheduler.set_timesteps(3, mu=1.0)
        made = []
        for timestep in pipe.scheduler.timesteps:
            made.append(pipe.transformer(**inputs)[0])
            pipe.scheduler.step(made[-1], timestep, inputs["hidden_states"])
        assert installation.last_schedule.steps == 3
        assert not torch.equal(made[0], made[1])
        assert torch.equal(made[1], made[2])
        with pytest.raises(BadInput, match="has done all its steps"):
            pipe.transformer(**inputs)


def test_two_threads_take_turns_or_are_refused(pipe: Any) -> None:
    inside, go_on, failures = threading.Event(), threading.Event(), []

    def wait(*arguments: Any) -> None:
        inside.set()
        go_on.wait(10)

    handle = pipe.transformer.proj_out.register_forward_pre_hook(wait)
    with grat_cli.install(pipe, preset("b"), **SIZE):
        thread = threading.Thread(target=lambda: call(pipe))
        thread.start()
        inside.wait(10)
        try:
            call(pipe)
        except BadInput as error:
            failures.append(str(error))
        go_on.set()
        thread.join()
        handle.remove()
        assert len(failures) == 1
        assert "two threads call a transformer" in failures[0]
        expected = call(pipe)
        made: list[Any] = []
        after = threading.Thread(target=lambda: made.append(call(pipe)))
        after.start()
        after.join()
        assert torch.equal(made[0], expected)


# ---- Gradients, dtypes and devices


def test_calls_that_would_record_gradients_are_refused(pipe: Any) -> None:
    inputs = tiny_flux.inputs(HEIGHT // 8, WIDTH // 8)
    pipe.scheduler.set_timesteps(3, mu=1.0)
    with grat_cli.install(pipe, preset("b"), **SIZE):
        with pytest.raises(BadInput, match=r"computes no gradients, .* call under torch\.no_grad\(\)"):
            pipe.transformer(**inputs)
        pipe.transformer.requires_grad_(False)
        made = pipe.transformer(**inputs)[0]
        with torch.no_grad():
            assert torch.equal(pipe.transformer(**inputs)[0], made)
        with pytest.raises(BadInput, match="computes no gradients"):
            pipe.transformer(**inputs | {"hidden_states": inputs["hidden_states"].clone().requires_grad_()})


@pytest.mark.parametrize("name", MODELS)
def test_under_autocast_full_attention_is_as_near_to_fp32_as_stock_is(name: str) -> None:
    """An fp32 model, whose products autocast computes in bf16, attention among them."""

    model = MODELS[name]
    transformer, grid = model.make(), model.grids[0]
    adapter, inputs = model.adapter(transformer, grid), model.inputs(grid)
    with torch.no_grad():
        exact = transformer(**inputs)[0]
        with torch.autocast("cpu", torch.bfloat16):
            stock = transformer(**inputs)[0]
            for backend in (Backend.SDPA, Backend.REFERENCE):
                with adapter.attached(FullRun(adapter), backend):
                    made = transformer(**inputs)[0]
                error = relative_difference(stock.float(), exact)
                assert relative_difference(made.float(), exact) < 2 * error + torch.finfo(torch.bfloat16).eps
                assert made.dtype == stock.dtype


def test_a_pipeline_that_is_moved_to_another_dtype_inside_is_followed(pipe: Any) -> None:
    halves: dict[str, Any] = {name: tensor.bfloat16() for name, tensor in tiny_flux.prompt().items()}
    with grat_cli.install(pipe, preset("b"), **SIZE):
        pipe.to(torch.bfloat16)
        inside = call(pipe, **halves)
    with grat_cli.install(pipe, preset("b"), **SIZE):
        assert torch.equal(call(pipe, **halves), inside)


def test_a_pipeline_that_is_moved_to_where_its_backend_cannot_run_is_refused(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grat_kernels import sdpa_backend

    halves: dict[str, Any] = {name: tensor.bfloat16() for name, tensor in tiny_flux.prompt().items()}
    with grat_cli.install(pipe, preset("b"), **SIZE):
        monkeypatch.setattr(sdpa_backend, "obstacle", lambda device, dtype, *_: f"not in {dtype}")
        pipe.to(torch.bfloat16)
        with pytest.raises(BadInput, match=r"the sdpa backend, .*, cannot run this call: not in torch.bfloat16; move"):
            call(pipe, **halves)


# ---- Compiling before and after


@pytest.mark.parametrize("when", ["before", "after", "in place", "blocks after"])
def test_flux_may_be_compiled_whole_before_and_after(pipe: Any, when: str) -> None:
    torch._dynamo.reset()
    with grat_cli.install(pipe, preset("b"), **SIZE):
        expected = call(pipe)
    if when == "before":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with grat_cli.install(pipe, preset("b"), **SIZE):
        if when == "after":
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        elif when == "in place":
            pipe.transformer.compile(backend="eager")
        elif when == "blocks after":
            pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert relative_difference(call(pipe), expected) < RELATIVE_OF_PIPELINES
    torch._dynamo.reset()


@pytest.mark.parametrize("when", ["before", "after", "in place", "in place after"])
def test_transformers_that_put_tokens_in_order_inside_are_not_compiled_whole(when: str) -> None:
    torch._dynamo.reset()
    pipe: Any = tiny_hunyuan.pipeline()
    size: dict[str, Any] = {"height": 80, "width": 112, "num_frames": 13}
    if when == "before":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    elif when == "in place":
        pipe.transformer.compile(backend="eager")

    def run() -> None:
        with grat_cli.install(pipe, load_preset("hunyuan-full"), **size):
            if when == "after":
                pipe.transformer = torch.compile(pipe.transformer, backend="eager")
            else:
                pipe.transformer.compile(backend="eager")
            pipe(prompt="snow", **size, num_inference_steps=1, max_sequence_length=16, output_type="latent")

    with pytest.raises(BadInput, match=r"compiled as a whole is not supported: .*compile_repeated_blocks\(\)"):
        run()
    torch._dynamo.reset()


# ---- Presets


def test_what_follows_from_a_preset_follows_anew_from_its_copy() -> None:
    chosen = preset("b", {"rules": [{"layers": "0", "variant": "full"}]}, group=[4, 4])
    assert chosen.cells == ((4, 4),)
    assert len(chosen.attentions) == 2
    other = chosen.model_copy(update={"attention": Attention(variant="b", group=(3, 3))})
    assert other.cells == ((3, 3),)
    assert {attention.group for attention in other.attentions} == {(3, 3)}
    assert other == Preset.model_validate({**chosen.model_dump(), "attention": other.attention.model_dump()})
    rule = chosen.schedule.rules[0]
    assert rule.changes == {"variant": "full"}
    assert rule.model_copy(update={"variant": "x"}).changes == {"variant": "x"}
    assert chosen.model_copy() == chosen
    assert chosen.model_copy(deep=True) == chosen


def test_a_copy_of_a_preset_is_held_to_what_a_file_may_say() -> None:
    chosen = preset("b", {"rules": [{"layers": "0", "group": [2, 2]}]})
    with pytest.raises(ValueError, match="all groups and blocks must nest"):
        chosen.model_copy(update={"attention": Attention(variant="b", group=(3, 3))})
    with pytest.raises(ValueError, match="expected auto, null or a whole number"):
        chosen.memory.model_copy(update={"chunk_tokens": 3})


def test_full_attention_of_a_copied_preset_equals_stock(pipe: Any) -> None:
    stock = call(pipe)
    chosen = preset("b")
    assert chosen.cells
    copied = chosen.model_copy(update={"attention": Attention(variant="full", group=(6, 6))})
    with grat_cli.install(pipe, copied, **SIZE) as installation:
        assert relative_difference(call(pipe), stock) < RELATIVE_OF_PIPELINES
        assert installation.last_schedule.plans[0].grouping.cells == ((6, 6),)


# ---- What is given


@pytest.mark.parametrize("name", ["height", "width", "steps", "first_step", "chunk_tokens"])
@pytest.mark.parametrize("value", [0, -8, 1.5, "64", True, 10**40])
def test_numbers_that_cannot_be_are_refused_in_words(pipe: Any, name: str, value: Any) -> None:
    if (name, value) == ("first_step", 0):
        return
    with (
        pytest.raises(BadInput, match=name),
        grat_cli.install(pipe, preset(), **{**SIZE, name: value}),  # pyright: ignore[reportArgumentType]
    ):
        pass


def test_other_things_that_cannot_be_are_refused_in_words(pipe: Any) -> None:
    given: list[dict[str, Any]] = [{"preset": 3}, {"guard": "much"}, {"guard": True}, {"tokens": (18, 26), "height": 8}]
    for wrong in given:
        with (
            pytest.raises(BadInput, match=r"expected|GRAT knows Flux"),
            grat_cli.install(pipe, **{"preset": preset(), **SIZE, **wrong}),
        ):
            pass
