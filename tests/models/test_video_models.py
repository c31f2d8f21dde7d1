"""Which model of videos a name means, and loading of HunyuanVideo in every form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.configuration_utils as diffusers_configuration
import diffusers.pipelines.pipeline_utils as diffusers_pipelines
import huggingface_hub
import pytest
import tiny_hunyuan
import torch
from safetensors.torch import load_file, save_file

from grat_cli.demo import DEMO_FLUX
from grat_cli.errors import BadInput, ModelUnavailable
from grat_cli.families import FAMILIES, Medium
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import LoadedModel, load_autoencoder, load_model
from grat_cli.models.weights import Weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def load(name: str, dtype: torch.dtype = torch.float32, base: str | None = None) -> LoadedModel:
    return load_model(choose_model(name, "video"), device=CPU, dtype=dtype, weights=Weights(base=base))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline in a folder, to be left as it is."""
    return tiny_hunyuan.save(tmp_path_factory.mktemp("hunyuan") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_known_names() -> None:
    hunyuan, demo = choose_model("hunyuan", "video"), choose_model("demo", "video")
    assert (hunyuan.source, hunyuan.kind, hunyuan.family) == ("hunyuanvideo-community/HunyuanVideo", "hub", "hunyuan")
    assert (hunyuan.default_steps, hunyuan.default_guidance, hunyuan.default_shift) == (50, 6.0, 7.0)
    assert (hunyuan.text_tokens, hunyuan.true_guidance) == (256, False)
    assert hunyuan.video is not None
    assert (hunyuan.video.width, hunyuan.video.height, hunyuan.video.frames, hunyuan.video.fps) == (1280, 720, 129, 24)
    assert (demo.family, demo.kind, demo.is_demo, demo.true_guidance) == ("hunyuan", "folder", True, True)
    assert (demo.medium, choose_model("demo").medium) == ("video", "image")
    assert choose_model("someone/tuned", "video").default_steps == 50


def test_default_model_depends_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = choose_model(None, "video")
    assert (chosen.name, chosen.reason) == ("hunyuan", "a CUDA device is present")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = choose_model(None, "video")
    assert (chosen.name, chosen.medium, chosen.reason) == ("demo", "video", "no CUDA device is present")


def test_models_of_the_other_medium_are_refused_with_what_to_type(saved: Path) -> None:
    for name in ("hunyuan", str(saved)):
        with pytest.raises(BadInput, match=r"makes videos: use it with grat video; for images give .* demo,"):
            choose_model(name, "image")
    for name in ("flux-dev", "flux-schnell", str(DEMO_FLUX.path)):
        with pytest.raises(BadInput, match=r"makes images: use it with grat image; for videos .* demo, hunyuan"):
            choose_model(name, "video")
    with pytest.raises(ModelUnavailable, match="did you mean hunyuan"):
        choose_model("hunyaun", "video")


def test_a_folder_tells_what_it_is(folder: Path) -> None:
    chosen = choose_model(str(folder), "video")
    assert (chosen.family, chosen.kind, chosen.token_side, chosen.size_multiple) == ("hunyuan", "folder", 16, 16)
    assert (chosen.true_guidance, chosen.video and chosen.video.frames_per_latent) == (False, 4)
    edit(folder / "transformer" / "config.json", guidance_embeds=False, patch_size=4)
    edit(folder / "vae" / "config.json", temporal_compression_ratio=8)
    chosen = choose_model(str(folder), "video")
    assert (chosen.token_side, chosen.size_multiple, chosen.true_guidance) == (32, 32, True)
    assert chosen.video is not None
    assert chosen.video.frames_per_latent == 8
    # The text encoder of HunyuanVideo makes it one of HunyuanVideo's own size.
    assert chosen.video.width == 256
    edit(folder / "transformer" / "config.json", text_embed_dim=4096)
    chosen = choose_model(str(folder), "video")
    assert (chosen.video and chosen.video.width, chosen.default_steps, chosen.default_shift) == (1280, 50, None)


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("HunyuanSkyreelsImageToVideoPipeline", "starts from a picture"),
        ("HunyuanVideoFramepackPipeline", "tokens of earlier frames"),
        ("WanVACEPipeline", "further blocks, which see tokens of a control"),
        ("CogVideoXPipeline", "give a folder or hub id of HunyuanVideoPipeline"),
    ],
)
def test_other_pipelines_are_refused_with_the_reason(
    folder: Path, pipeline: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(folder / "model_index.json", _class_name=pipeline)
    with pytest.raises(ModelUnavailable, match=rf"is a {pipeline}, which is not supported: .*{reason}"):
        choose_model(str(folder), "video")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id: None)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *arguments, **options: str(folder / "model_index.json")
    )
    with pytest.raises(ModelUnavailable, match=rf"owner/name is a {pipeline}, .*{reason}"):
        load("owner/name")


def test_a_flux_on_the_hub_is_no_model_of_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    index = str(DEMO_FLUX.path / "model_index.json")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments, **options: index)
    with pytest.raises(BadInput, match="owner/flux makes images: use it with grat image"):
        load("owner/flux")


def test_a_folder_loads_without_a_word(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = load(str(saved)).pipe
    assert type(pipe).__name__ == "HunyuanVideoPipeline"
    assert {part.dtype for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)} == {torch.float32}
    assert capfd.readouterr() == ("", "")
    expected = tiny_hunyuan.transformer().state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in pipe.transformer.state_dict().items())


def test_parts_have_the_dtypes_of_the_model_card() -> None:
    parts = ("text_encoder", "text_encoder_2", "transformer", "vae")
    hunyuan, flux = FAMILIES["hunyuan"], FAMILIES["flux"]
    half = dict.fromkeys(parts, torch.float16)
    assert hunyuan.dtypes(parts, CUDA, torch.bfloat16) == {**half, "transformer": torch.bfloat16}
    assert hunyuan.dtypes(parts, CUDA, torch.float16) == half
    for device, dtype in ((CUDA, torch.float32), (CPU, torch.bfloat16)):
        assert set(hunyuan.dtypes(parts, device, dtype).values()) == {dtype}
    on_cpu = hunyuan.dtypes(parts, CPU, torch.float32)
    assert on_cpu.pop("vae") in (torch.float32, torch.bfloat16)  # as the CPU can
    assert set(on_cpu.values()) == {torch.float32}
    assert set(flux.dtypes(parts, CUDA, torch.bfloat16).values()) == {torch.bfloat16}


def test_an_autoencoder_alone_is_a_pipeline_that_decodes() -> None:
    of_medium: dict[Medium, torch.Tensor] = {"image": torch.randn(1, 4, 8, 8), "video": torch.randn(1, 16, 2, 4, 4)}
    for medium, latents in of_medium.items():
        choice = choose_model("demo", medium)
        whole = load_model(choice, device=CPU, dtype=torch.float32).pipe
        alone = load_autoencoder(choice, device=CPU, dtype=torch.float32)
        assert {name for name, part in alone.components.items() if part is not None} == {"vae"}
        latents = latents[:, : whole.vae.config.latent_channels]
        decoded = [FAMILIES[choice.family].decode(pipe, latents) for pipe in (whole, alone)]
        assert torch.equal(*decoded)


def test_mixed_dtypes_reach_the_parts(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device, which diffusers' offloading is not asked for here."""
    moved = []
    monkeypatch.setattr(
        diffusers_pipelines.DiffusionPipeline, "enable_model_cpu_offload", lambda self, device: moved.append(device)
    )
    device: Any = SimpleNamespace(type="cuda")
    choice = choose_model(str(saved), "video")
    pipe = load_model(choice, device=device, dtype=torch.bfloat16, offload="model").pipe
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float16)
    assert (pipe.text_encoder.dtype, pipe.text_encoder_2.dtype) == (torch.float16, torch.float16)
    assert moved == [device]


def test_a_missing_demo_is_said_plainly(tmp_path: Path) -> None:
    choice = replace(choose_model("demo", "video"), source=str(tmp_path / "hunyuan"))
    with pytest.raises(ModelUnavailable, match=r"demo of videos is not part of this installation.*\n.*another --model"):
        load_model(choice, device=CPU, dtype=torch.float32)


def test_a_file_takes_its_other_parts_from_a_base(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    weights = load_file(folder / WEIGHTS)
    weights["proj_out.bias"] = torch.full_like(weights["proj_out.bias"], 0.25)
    save_file(weights, file)
    with pytest.raises(ModelUnavailable, match=r"with --base, .* --base hunyuanvideo-community/HunyuanVideo"):
        load(str(file))
    pipe = load(str(file), base=str(folder)).pipe
    assert pipe.text_encoder is not None
    state = pipe.transformer.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())


def test_files_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    weights = load_file(folder / WEIGHTS)
    save_file(weights, file)
    with pytest.raises(BadInput, match="is of no model of videos: try --base hunyuanvideo-community/HunyuanVideo"):
        load(str(file), base=str(DEMO_FLUX.path))
    with pytest.raises(BadInput, match=r"flux\.safetensors makes images: use it with grat image"):
        load(str(shutil.copy(DEMO_FLUX.path / WEIGHTS, tmp_path / "flux.safetensors")), base=guided_false(folder))
    with pytest.raises(ModelUnavailable, match=r"do not fit: only one of them embeds guidance; try --base hunyuan"):
        load(str(file), base=str(folder))
    edit(folder / "transformer" / "config.json", guidance_embeds=True)
    del weights["proj_out.bias"]
    save_file(weights, file)
    with pytest.raises(ModelUnavailable, match=r"tuned\.safetensors is damaged, incomplete or not HunyuanVideo's"):
        load(str(file), base=str(folder))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelUnavailable, match=r"tuned\.safetensors is damaged"):
        load(str(file), base=str(folder))


def guided_false(folder: Path) -> str:
    edit(folder / "transformer" / "config.json", guidance_embeds=False)
    return str(folder)


def test_the_base_of_a_file_may_be_on_the_hub(monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123"
    shutil.copytree(saved, snapshot, ignore=shutil.ignore_patterns("transformer"))
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id: None)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *arguments, **options: str(saved / "model_index.json")
    )
    monkeypatch.setattr(diffusers_pipelines.DiffusionPipeline, "download", lambda *arguments, **options: str(snapshot))
    monkeypatch.setattr(
        diffusers_configuration,
        "hf_hub_download",
        lambda hub_id, *, subfolder, filename, **options: str(saved / subfolder / filename),
    )
    pipe = load(str(saved / WEIGHTS), base="owner/name").pipe
    assert pipe.transformer.config.num_single_layers == tiny_hunyuan.SINGLE_BLOCKS


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


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_off(WEIGHTS), "transformer of .* incomplete metadata"),
        (cut_off("text_encoder/model.safetensors"), "text_encoder of .* incomplete metadata"),
        (remove(WEIGHTS), "no file named diffusion_pytorch_model.safetensors"),
        (remove("text_encoder_2/config.json"), "config.json is missing"),
        (remove("tokenizer"), "tokenizer is missing"),
        (remove("model_index.json"), "model_index.json is missing\ngive a folder that a HunyuanVideoPipeline"),
        (forget_a_weight(WEIGHTS), "transformer of .* lacks 1 weights, such as"),
        (forget_a_weight("text_encoder/model.safetensors"), "text_encoder of .* lacks 1 weights, such as"),
        (forget_a_weight("vae/diffusion_pytorch_model.safetensors"), "vae of .* lacks 1 weights, such as"),
        (lambda folder: edit(folder / "transformer/config.json", num_single_layers=1), "has no place for"),
    ],
)
def test_damaged_folders_end_in_words(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    with pytest.raises(ModelUnavailable, match=says) as caught:
        load(str(folder))
    assert len(str(caught.value).splitlines()) <= 2
