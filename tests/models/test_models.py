"""Which model a name means, loading of every form of checkpoint, and what a damaged or missing one ends as."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.configuration_utils as diffusers_configuration
import diffusers.pipelines.pipeline_utils as diffusers_pipelines
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from grat_cli.commands.options import ModelOptions, SizeOptions
from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput, ModelUnavailable
from grat_cli.families import families_of
from grat_cli.models.catalogue import choose_model, models_for
from grat_cli.models.devices import choose_device, choose_dtype, device_name, is_out_of_memory, peak_memory
from grat_cli.models.loading import LoadedModel, load_model
from grat_cli.models.weights import Weights

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def load(name: str, base: str | None = None, **options: Any) -> LoadedModel:
    weights = Weights(base=base)
    return load_model(choose_model(name), device=CPU, dtype=torch.float32, weights=weights, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled pipeline, to be damaged."""
    return Path(shutil.copytree(DEMO_FLUX.path, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_known_names() -> None:
    demo, dev, schnell = (choose_model(name) for name in ("demo", "flux-dev", "flux-schnell"))
    assert (demo.presets, demo.native_side, demo.token_side, demo.text_tokens) == ("demo", 256, 8, 24)
    assert (dev.source, dev.kind, dev.default_steps, dev.default_guidance) == (
        "black-forest-labs/FLUX.1-dev",
        "hub",
        28,
        3.5,
    )
    assert (schnell.default_steps, schnell.text_tokens, schnell.default_guidance) == (4, 256, None)
    assert choose_model("someone/FLUX.1-schnell-tuned").default_steps == 4
    assert choose_model("someone/tuned").source == "someone/tuned"


def test_default_model_depends_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_model(None).name == "flux-dev"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = choose_model(None)
    assert (chosen.name, chosen.reason) == ("demo", "no CUDA device is present")


def test_naming_a_model_imports_no_torch() -> None:
    code = (
        "import sys; from grat_cli.models.catalogue import choose_model; choose_model('demo'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_tells_what_it_is(folder: Path) -> None:
    chosen = choose_model(str(folder))
    assert (chosen.presets, chosen.kind, chosen.token_side, chosen.text_tokens) == ("demo", "folder", 8, 24)
    edit(folder / "vae" / "config.json", block_out_channels=[8, 8, 8, 8])
    assert (choose_model(str(folder)).presets, choose_model(str(folder)).default_steps) == ("flux", 4)
    edit(folder / "transformer" / "config.json", guidance_embeds=True)
    assert (choose_model(str(folder)).token_side, choose_model(str(folder)).default_steps) == (16, 28)


def test_a_folder_tells_which_pictures_it_takes(folder: Path) -> None:
    transformer, index = folder / "transformer" / "config.json", folder / "model_index.json"
    assert (choose_model(str(folder)).takes, choose_model(str(folder)).needs) == ({"start", "mask"}, set())
    edit(transformer, in_channels=96, out_channels=16)
    fill = choose_model(str(folder))
    assert (fill.needs, fill.default_guidance, fill.default_steps) == ({"start", "mask"}, 30, 50)
    edit(transformer, in_channels=32)
    assert (choose_model(str(folder)).needs, choose_model(str(folder)).default_guidance) == ({"control"}, 30)
    depth = folder.rename(folder.with_name("my-Depth"))
    assert (choose_model(str(depth)).default_guidance, choose_model(str(depth)).default_steps) == (10, 30)
    edit(depth / "transformer" / "config.json", in_channels=16)
    assert choose_model(str(depth)).needs == set()
    edit(depth / index.name, _class_name="FluxKontextPipeline")
    kontext = choose_model(str(depth))
    assert (kontext.takes, kontext.needs, kontext.default_guidance) == ({"reference"}, set(), 2.5)


@pytest.mark.parametrize(
    ("name", "kin"),
    [("me/FLUX.1-Fill-tuned", "fill"), ("me/flux-depth", "depth"), ("me/canny_x", "canny"), ("me/landfill", "dev")],
)
def test_names_tell_kin_by_whole_words(name: str, kin: str) -> None:
    assert replace(choose_model(name), name="", source="", reason="") == replace(
        choose_model(f"flux-{kin}"), name="", source="", reason=""
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flux-def", "did you mean flux-dev"),
        ("xyzzy", "known are demo, flux-dev, flux2-dev, qwen-image, and 13 of their kin; folders"),
        ("weights.safetensors", "there is no file weights.safetensors"),
        (__file__, "not a .safetensors or .gguf file"),
        (str(Path(__file__).parent), "model_index.json is missing"),
    ],
)
def test_unknown_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(ModelUnavailable, match=says):
        choose_model(name)


def test_the_bundled_model_loads_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    filters = list(logging.getLogger("diffusers.pipelines.pipeline_utils").filters)
    pipe = load("demo").pipe
    assert (type(pipe).__name__, pipe.transformer.dtype) == ("FluxPipeline", torch.float32)
    assert pipe.vae_scale_factor * 2 == choose_model("demo").token_side
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("diffusers.pipelines.pipeline_utils").filters == filters


def test_dtype_and_image_to_image() -> None:
    loaded = load_model(choose_model("demo"), device=CPU, dtype=torch.bfloat16, pictures=frozenset({"start"}))
    assert type(loaded.pipe).__name__ == "FluxImg2ImgPipeline"
    assert {part.dtype for part in (loaded.pipe.transformer, loaded.pipe.vae, loaded.pipe.text_encoder_2)} == {
        torch.bfloat16
    }


def test_a_file_takes_its_other_parts_from_a_base(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    weights = load_file(folder / WEIGHTS)
    weights["proj_out.bias"] = torch.full_like(weights["proj_out.bias"], 0.25)
    save_file(weights, file)
    with pytest.raises(ModelUnavailable, match="give the other parts of the pipeline with --base"):
        load(str(file))
    pipe = load(str(file), base=str(folder)).pipe
    assert torch.equal(pipe.transformer.proj_out.bias, torch.full_like(pipe.transformer.proj_out.bias, 0.25))
    assert pipe.text_encoder is not None

    edit(folder / "transformer" / "config.json", guidance_embeds=True)
    with pytest.raises(ModelUnavailable, match=r"do not fit: only one of them embeds guidance.*schnell"):
        load(str(file), base=str(folder))
    edit(folder / "transformer" / "config.json", guidance_embeds=False)
    del weights["proj_out.bias"]
    save_file(weights, file)
    with pytest.raises(ModelUnavailable, match=r"tuned\.safetensors is damaged, incomplete"):
        load(str(file), base=str(folder))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelUnavailable, match=r"tuned\.safetensors is damaged, incomplete"):
        load(str(file), base=str(folder))


def cut_off(part: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / part
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def remove(part: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def forget_a_weight(part: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / part)
        del weights[max(weights)]
        save_file(weights, folder / part, metadata={"format": "pt"})

    return damage


def change(part: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / part, **changes)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_off(WEIGHTS), "transformer of .* incomplete metadata"),
        (cut_off("text_encoder/model.safetensors"), "text_encoder of .* incomplete metadata"),
        (remove(WEIGHTS), "no file named diffusion_pytorch_model.safetensors"),
        (remove("text_encoder_2/config.json"), "config.json is missing"),
        (remove("transformer/config.json"), "config.json is missing"),
        (remove("tokenizer"), "tokenizer is missing"),
        (forget_a_weight(WEIGHTS), "transformer of .* lacks 1 weights, such as"),
        (forget_a_weight("text_encoder/model.safetensors"), "text_encoder of .* lacks 1 weights, such as"),
        (forget_a_weight("vae/diffusion_pytorch_model.safetensors"), "vae of .* lacks 1 weights, such as"),
        (change("transformer/config.json", num_single_layers=1), "has no place for .* single_transformer_blocks"),
        (change("transformer/config.json", joint_attention_dim=64), "transformer of .* is damaged"),
        (
            change("model_index.json", _class_name="FluxControlNetPipeline"),
            "is a FluxControlNetPipeline, which is not supported",
        ),
        (change("model_index.json", vae=["diffusers", "NoSuchVae"]), "NoSuchVae"),
        (cut_off("model_index.json"), "model_index.json cannot be read"),
    ],
)
def test_damaged_folders_end_in_words(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    """Some of these the libraries would go on with, with random weights or an empty tokenizer."""
    damage(folder)
    with pytest.raises(ModelUnavailable, match=says) as caught:
        load(str(folder))
    assert "--model demo" in str(caught.value) or "FluxPipeline" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def hub_error(kind: type[Any], status: int) -> Exception:
    url = "https://hub.example/owner/name"
    request = SimpleNamespace(url=url, method="GET")
    response = SimpleNamespace(status_code=status, headers={}, request=request)
    return kind(f"{status} for {url}", response=response)


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub_error(hub_errors.GatedRepoError, 403), "gated: accept its licence at .*owner/name.*hf auth login"),
        (hub_error(hub_errors.GatedRepoError, 401), "gated"),
        (hub_error(hub_errors.HfHubHTTPError, 403), "gated"),
        (hub_error(hub_errors.RepositoryNotFoundError, 404), "no model owner/name, or it is private"),
        (hub_error(hub_errors.HfHubHTTPError, 401), "no model owner/name, or it is private.*hf auth login"),
        (hub_error(hub_errors.RemoteEntryNotFoundError, 404), "not a diffusers pipeline"),
        (hub_errors.LocalEntryNotFoundError("not in the cache"), "not in the local cache and cannot be downloaded"),
        (hub_error(hub_errors.HfHubHTTPError, 500), "cannot be downloaded"),
        (hub_errors.OfflineModeIsEnabled("offline mode"), "cannot be downloaded .*offline mode.*go online"),
        (ConnectionError("no route"), "cannot be downloaded .*no route"),
        (OSError(28, "No space left on device"), "cannot be stored .*HF_HOME"),
    ],
)
def test_hub_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, says: str) -> None:
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raises(error))
    with pytest.raises(ModelUnavailable, match=says) as caught:
        load("owner/name")
    assert "--model" in str(caught.value)


def test_out_of_reach_of_the_hub_only_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_in_the_cache(hub_id: str, file: str, local_files_only: bool) -> Any:
        assert local_files_only
        raise hub_errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "model_info", raises(ConnectionError("no route to the hub")))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", not_in_the_cache)
    with pytest.raises(ModelUnavailable, match=r"cannot be downloaded .*no route to the hub.*go online"):
        load("owner/name")


def hub_with_index(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A hub that has `model_index.json` of a folder."""
    index = str(folder / "model_index.json")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments, **options: index)


def test_a_wrapped_hub_failure_is_recognised(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """diffusers falls back to its cache first, and raises an OSError from the hub's own error."""
    hub_with_index(monkeypatch, folder)
    gated = hub_error(hub_errors.GatedRepoError, 403)
    missing = hub_errors.LocalEntryNotFoundError("not in the cache")
    monkeypatch.setattr(diffusers_pipelines, "_resolve_revision", lambda *arguments, **options: None, raising=False)
    monkeypatch.setattr(diffusers_pipelines, "model_info", raises(gated))
    monkeypatch.setattr(diffusers_pipelines, "hf_hub_download", raises(missing))
    monkeypatch.setattr(diffusers_pipelines, "snapshot_download", raises(missing))
    with pytest.raises(ModelUnavailable, match="gated") as caught:
        load("owner/name")
    assert isinstance(caught.value.__cause__, OSError)


def test_another_pipeline_is_refused_before_its_weights_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    hub_with_index(monkeypatch, folder)
    with pytest.raises(ModelUnavailable, match="owner/name is a StableDiffusionXLPipeline"):
        load("owner/name")


def test_the_commit_of_a_hub_model_is_recorded(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    hub_with_index(monkeypatch, snapshot)
    monkeypatch.setattr(diffusers_pipelines.DiffusionPipeline, "download", lambda *arguments, **options: str(snapshot))
    assert load("owner/name").revision == COMMIT
    assert load(str(folder)).revision is None


def test_the_base_of_a_file_may_be_on_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """Its transformer is not downloaded, only the configuration of it."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("transformer"))
    hub_with_index(monkeypatch, folder)
    asked = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options))
        return str(snapshot)

    monkeypatch.setattr(diffusers_pipelines.DiffusionPipeline, "download", download)
    monkeypatch.setattr(
        diffusers_configuration,
        "hf_hub_download",
        lambda hub_id, *, subfolder, filename, **options: str(folder / subfolder / filename),
    )
    loaded = load(str(folder / WEIGHTS), base="owner/name")
    assert asked == [("owner/name", {"transformer": None})]
    assert loaded.pipe.transformer.config.num_single_layers == 4
    assert loaded.revision is None


def test_offload_needs_a_gpu() -> None:
    with pytest.raises(BadInput, match="the run is on the CPU"):
        load("demo", offload="model")
    with pytest.raises(BadInput, match="unknown offload 'layers'"):
        load("demo", offload="layers")


@pytest.mark.parametrize(("offload", "method"), [("model", "enable_model"), ("sequential", "enable_sequential")])
def test_offload_goes_through_diffusers(monkeypatch: pytest.MonkeyPatch, offload: str, method: str) -> None:
    called = []
    monkeypatch.setattr(
        diffusers_pipelines.DiffusionPipeline,
        f"{method}_cpu_offload",
        lambda self, device: called.append(device),
    )
    device = SimpleNamespace(type="cuda")
    load_model(choose_model("demo"), device=device, dtype=torch.float32, offload=offload)  # type: ignore[arg-type]
    assert called == [device]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    for name, says in [("cuda", "no CUDA device"), ("mps", "no MPS device"), ("gpu", "unknown device 'gpu'")]:
        with pytest.raises(BadInput, match=says):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(BadInput, match="this machine has 2"):
        choose_device("cuda:2")


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    for supported, dtype in [(True, torch.bfloat16), (False, torch.float16)]:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **options: supported)
        assert choose_dtype("auto", torch.device("cuda")) == dtype
    with pytest.raises(BadInput, match="unknown dtype 'float8'"):
        choose_dtype("float8", CPU)


def test_memory_and_name_of_the_cpu() -> None:
    size_bytes, kind = peak_memory(CPU)
    # A process with torch loaded holds some hundred megabytes.
    assert 50e6 < size_bytes < 1e12
    assert "process" in kind
    assert device_name(CPU)


def test_running_out_of_memory_is_recognised() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


FLUX = ["flux-dev", "flux-schnell", "flux-fill", "flux-canny", "flux-depth", "flux-kontext"]


@pytest.mark.parametrize(
    ("presets", "medium", "expected"),
    [
        ("flux", "image", FLUX),
        ("demo", "image", ["demo"]),
        ("hunyuan", "video", ["hunyuan", "hunyuan-i2v", "demo"]),
        (None, "image", None),
        ("demo", "video", None),
    ],
)
def test_presets_are_made_for_models(presets: str | None, medium: Any, expected: list[str] | None) -> None:
    everything = [model.name for family in families_of(medium) for model in family.models]
    assert [model.name for model in models_for(presets, medium)] == (expected or everything)


@pytest.mark.parametrize("present", [False, True])
def test_a_preset_for_the_demo_alone_takes_it_on_any_machine(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    chosen = [ModelOptions().choice_for(name, SizeOptions()).name for name in ("demo-far", "flux-far", "hunyuan-far")]
    assert chosen == (["demo", "flux-dev", "hunyuan"] if present else ["demo"] * 3)
    assert ModelOptions(model="flux-schnell").choice_for("demo-far", SizeOptions()).name == "flux-schnell"
