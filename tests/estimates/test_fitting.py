"""Devices to plan for, whether runs fit them, and what is advised where they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from command_line import grat, refusal

from grat_cli.errors import BadInput, OutOfMemory
from grat_cli.estimates import hardware
from grat_cli.estimates.components import components_of
from grat_cli.estimates.fitting import Verdict, judge, offload_for, refuse_unfit
from grat_cli.estimates.hardware import GPUS, Device, cuda_device, device_named, free_main_memory
from grat_cli.estimates.planning import Forecast, run_forecasts
from grat_cli.estimates.time import estimate_for
from grat_cli.families.autoencoders import Pixels
from grat_cli.families.base import ModelChoice
from grat_cli.generation.selection import select_preset
from grat_cli.models.catalogue import KNOWN_MODELS, choose_model
from grat_cli.models.resolution import Resolution

FLUX = KNOWN_MODELS["image"]["flux-dev"]
COMPONENTS = components_of(FLUX)


def forecasts(size: Resolution, variant: str = "x") -> list[Forecast]:
    return run_forecasts(select_preset(FLUX, variant=variant), FLUX, size)


def verdict_of(side: int, device: Device, **flags: Any) -> Verdict:
    size = Resolution(side, side)
    return judge(forecasts(size), COMPONENTS, FLUX, device, at_size=forecasts, **flags)


def test_a_slip_is_answered_with_the_nearest_gpu() -> None:
    assert device_named("RTX-4090") is GPUS["4090"]
    with pytest.raises(BadInput, match="did you mean 'h100'"):
        device_named("h10")


def test_devices_have_what_their_makers_state() -> None:
    h200 = GPUS["h200"]
    assert (h200.bandwidth, h200.tensor_rate, h200.link) == (4.8e12, 989.4e12, 64e9)
    assert all(gpu.memory and gpu.bandwidth and gpu.tensor_rate and gpu.link for gpu in GPUS.values())


def test_a_present_gpu_is_known_by_its_name() -> None:
    found = cuda_device("NVIDIA A100-SXM4-40GB", 30 * 2**30)
    assert (found.name, found.memory, found.present) == ("a100-40", 30 * 2**30, True)
    assert cuda_device("NVIDIA H200", 2**30).bandwidth == 4.8e12
    unknown = cuda_device("Imaginary 1", 2**30)
    assert (unknown.title, unknown.tensor_rate) == ("Imaginary 1", None)
    assert (
        estimate_for(forecasts(Resolution(1024, 1024))[0], COMPONENTS, verdict_of(1024, unknown).execution, unknown)
        is None
    )


def test_main_memory_is_that_of_the_machine() -> None:
    assert 2**26 < free_main_memory() < 2**50


def test_8k_fits_an_h200_and_not_a_4090() -> None:
    assert verdict_of(8192, GPUS["h200"]).fits
    verdict = verdict_of(8192, GPUS["4090"])
    assert not verdict.fits
    assert verdict.advice is not None
    assert verdict.advice.startswith("try --")
    with pytest.raises(OutOfMemory, match="does not fit GeForce RTX 4090: denoise needs"):
        refuse_unfit(verdict)


@pytest.mark.parametrize(
    ("side", "name"), [(1024, "4090"), (1024, "a100-40"), (4096, "4090"), (8192, "a100-40"), (8192, "l40s")]
)
def test_what_is_advised_fits(side: int, name: str) -> None:
    """The flags of an advice, typed, give a run that fits; without them it does not."""
    advice = verdict_of(side, GPUS[name]).advice
    command = ["plan", "flux-x", "--model", "flux-dev", "--gpu", name, "--json"]
    size = ["--res", str(side)]
    if advice is None:
        assert grat(*command, *size).code == 0
        return
    assert grat(*command, *size).code == OutOfMemory.exit_code
    flags = advice.removeprefix("try ").split()
    result = grat(*command, *([] if "--res" in flags else size), *flags)
    assert (result.code, result.data["verdict"]["fits"]) == (0, True)


def test_a_smaller_picture_is_advised_where_nothing_else_helps() -> None:
    tiny = replace(GPUS["4090"], memory=3 * 2**30)
    advice = verdict_of(8192, tiny).advice
    assert advice is not None
    assert "--res" in advice
    assert verdict_of(8192, replace(tiny, memory=2**20)).advice is None


def test_offload_auto_is_the_first_that_fits() -> None:
    assert verdict_of(1024, GPUS["h200"], offload="auto").execution.offload == "none"
    assert verdict_of(1024, GPUS["4090"], offload="auto").execution.offload == "model"
    smaller = replace(GPUS["4090"], memory=16 * 2**30)
    assert verdict_of(1024, smaller, offload="auto").execution.offload == "group"


def test_plan_refuses_with_json_on_stdout() -> None:
    result = grat("plan", "flux-x", "--res", "8192", "--gpu", "4090", "--json")
    assert result.code == 4
    data = result.data
    assert data["verdict"]["fits"] is False
    assert data["verdict"]["needed_bytes"] > data["verdict"]["device_memory_bytes"] == 24 * 2**30
    assert [phase["phase"] for phase in data["phases"]] == ["text", "encode", "denoise", "decode"]
    assert data["phases"][2]["seconds"] > 0
    assert result.err.splitlines()[-1].startswith("try --")


def test_plan_tells_which_gpus_fit_where_none_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "present_gpu", lambda: None)
    shown = " ".join(grat("plan", "flux-x", "--res", "8192").out.split())
    assert "fits b200, h200, h100" in shown
    assert "4090" not in shown.partition("fits ")[2].partition("Q query")[0]
    assert grat("plan", "flux-x", "--gpu", "cpu", "--offload", "model").code == 2


def test_plan_on_a_gpu_says_that_times_are_estimates() -> None:
    shown = grat("plan", "flux-x", "--res", "2048", "--gpu", "h100").out
    assert "estimates from data sheets" in shown
    assert "fits H100" in shown


def test_the_table_reads_at_60_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = grat("plan", "flux-x", "--res", "8192", "--gpu", "h200").out.splitlines()
    (denoise,) = [line for line in lines if line.startswith("denoise ")]
    assert "GiB" in denoise
    assert max(map(len, lines)) <= 60


def test_a_picture_that_cannot_fit_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(hardware, "free_main_memory", lambda: 900 * 2**20)
    message = refusal(
        "image", "a fox", "--model", "demo", "--device", "cpu", "--res", "2048", "--out", tmp_path, code=4
    )
    assert message.startswith("does not fit this CPU: ")
    assert "try --res" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["demo", "flux-dev"])
def test_operations_of_coding_a_picture_are_those_that_torch_counts(model: str) -> None:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        if model == "demo":
            shape = components_of(choose_model("demo")).autoencoder
            levels: Any = {"encoder_block_out_channels": (32, 32, 32), "decoder_block_out_channels": (32, 32, 32)}
            blocks: Any = {"num_encoder_blocks": (1, 2, 2), "num_decoder_blocks": (2, 2, 1)}
            autoencoder: Any = AutoencoderTiny(**levels, **blocks, latent_channels=4)
            latents = torch.empty(1, 4, 32, 32)
        else:
            shape = COMPONENTS.autoencoder
            levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
            autoencoder = AutoencoderKL(
                **levels,
                block_out_channels=cast(Any, shape.channels),
                layers_per_block=2,
                latent_channels=16,
                use_post_quant_conv=False,
            )
            latents = torch.empty(1, 16, 32, 32)
    side = 32 * shape.scale
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        autoencoder.decode(latents)
    assert shape.decode_flop(Pixels(side, side)) == pytest.approx(counter.get_total_flops(), rel=0.1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        autoencoder.encode(torch.empty(1, 3, side, side))
    assert shape.encode_flop(Pixels(side, side)) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_auto_offload_is_the_fastest_kind_that_the_estimate_says_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from grat_cli.models.loading import load_model

    device: Any = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")

    def chosen(free: int, choice: ModelChoice, pipe: Any = None) -> tuple[str, str]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
        return offload_for(pipe, choice, forecasts(Resolution(1024, 1024)), device)

    assert [chosen(free * 10**9, FLUX)[0] for free in (80, 30, 20, 1)] == ["none", "model", "group", "sequential"]
    assert chosen(10**9, FLUX)[1].startswith("needs least, about ")
    # What its name does not tell, the pipeline does: it is far smaller than what its kin are.
    small = load_model(choose_model("demo"), device=torch.device("cpu"), dtype=torch.float32).pipe
    assert chosen(20 * 10**9, replace(FLUX, name="someone/tuned"), small)[0] == "none"
    # Where texts are known their encoders are not loaded, and need no room.
    small.text_encoder = small.text_encoder_2 = None
    assert [chosen(free * 10**9, FLUX, small)[0] for free in (30, 20, 1)] == ["none", "group", "sequential"]
    assert chosen(20 * 10**9, replace(FLUX, name="someone/tuned"), small)[0] == "none"
