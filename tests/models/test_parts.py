"""Model folders that attack: none runs code, reads a file from elsewhere, or steers the terminal."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import grat, refusal
from safetensors.torch import load_file, save_file

from grat_cli.demo import DEMO_FLUX, DEMO_HUNYUAN
from grat_cli.errors import ModelUnavailable
from grat_cli.estimates.components import components_of
from grat_cli.families import FAMILIES
from grat_cli.models.catalogue import Medium, choose_model
from grat_cli.models.loading import load_autoencoder, load_model

CPU = torch.device("cpu")
DEMOS = {"image": DEMO_FLUX, "video": DEMO_HUNYUAN}
EVIL = "from pathlib import Path\nPath(__file__).with_name('OWNED').touch()\nclass X: pass\n"
BUNDLED = [family for family in FAMILIES.values() if any(model.is_demo for model in family.models)]
EVERY_PART = [(family.medium, part) for family in BUNDLED for part in family.classes]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A copy of a demo in the working folder, with evil.py in both and beside every part, as importable as can be."""
    medium = getattr(request, "param", "image")
    folder = Path(shutil.copytree(DEMOS[medium].path, tmp_path / "model"))
    for place in (tmp_path, folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in ("evil", "pipeline"):
            (place / f"{name}.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    assert not list(tmp_path.rglob("OWNED")), "evil.py was run"
    assert "evil" not in sys.modules


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def refused(medium: str = "image", folder: str = "model", *options: str) -> str:
    """What the command line says of a model that it must refuse."""
    return refusal(medium, "a red fox", "--model", folder, "--steps", "1", *options, code=3)


@pytest.mark.parametrize(("model", "part"), EVERY_PART, indirect=["model"])
@pytest.mark.parametrize(
    "entry",
    [
        ["evil", "X"],
        ["evil", "FluxTransformer2DModel"],
        ["diffusers", "DiffusionPipeline"],
        ["transformers", "AutoModel"],
        ["onnxruntime.training", "ORTModule"],
    ],
)
def test_a_class_that_is_not_in_the_table_is_not_made(model: Path, part: str, entry: list[str]) -> None:
    medium: Medium = "video" if "Hunyuan" in (model / "model_index.json").read_text() else "image"
    good = choose_model("model", medium)
    edit(model / "model_index.json", **{part: entry})
    said = refused(medium)
    assert part in said
    assert "." in entry[0] or f"{part} of model is a {entry[1]} of {entry[0]}, which is not supported: only" in said
    # Even where nothing has looked at the index before.
    with pytest.raises(ModelUnavailable, match=part):
        load_model(good, device=CPU, dtype=torch.float32)
    with pytest.raises(ModelUnavailable, match=part):
        load_autoencoder(good, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("class_name", ["evil", ["evil", "X"], ["pipeline", "FluxPipeline"], "evil.py", {"a": 1}, 7])
def test_a_pipeline_of_another_class_is_not_made(model: Path, class_name: Any) -> None:
    edit(model / "model_index.json", _class_name=class_name, custom_pipeline="pipeline", _module="evil")
    assert "class_name" in refused() or "is a evil, which is not supported" in refused()


def test_an_unknown_part_is_refused_and_a_part_for_image_prompts_is_left_out(model: Path) -> None:
    edit(model / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    assert load_model(choose_model("model"), device=CPU, dtype=torch.float32).pipe.image_encoder is None
    edit(model / "model_index.json", helper=["evil", "X"])
    assert "helper of model is a X of evil, which is not supported: there is no part of that name" in refused()


CODE = {"AutoModel": "evil.X", "AutoConfig": "evil.X", "AutoTokenizer": ["evil.X", "evil.X"]}


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("text_encoder/config.json", {"auto_map": CODE}),
        ("text_encoder/config.json", {"model_type": "clip", "text_config": {"auto_map": CODE}}),
        ("text_encoder_2/config.json", {"attn_implementation": "evil/kernel"}),
        ("text_encoder_2/config.json", {"_attn_implementation": {"": "evil/kernel"}}),
        ("text_encoder_2/config.json", {"transformers_weights": "pickle.bin"}),
        ("text_encoder/config.json", {"configuration_files": ["../../config.5.0.0.json"]}),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "mxfp4"}}),
        ("text_encoder/adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "evil/model"}),
        ("transformer/config.json", {"auto_map": CODE}),
        ("transformer/config.json", {"quantization_config": {"quant_method": "evil"}}),
        ("vae/config.json", {"auto_map": CODE}),
        ("scheduler/scheduler_config.json", {"auto_map": CODE}),
        ("tokenizer/tokenizer_config.json", {"auto_map": CODE, "trust_remote_code": True}),
        ("tokenizer/tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}),
        ("tokenizer_2/tokenizer_config.json", {"fast_tokenizer_files": ["../../tokenizer.4.0.json"]}),
    ],
)
def test_configurations_that_reach_out_are_refused(model: Path, file: str, changes: dict[str, Any]) -> None:
    edit(model / file, **changes)
    said = refused()
    assert said.startswith(f"{Path(file).parts[0]} of model is not loaded: its {Path(file).name} asks for")
    assert "get the model from its makers" in said


def test_a_tokenizer_does_not_read_files_that_its_configuration_names(model: Path) -> None:
    for part in ("tokenizer", "tokenizer_2"):
        edit(model / part / "tokenizer_config.json", vocab="/etc/passwd", gguf_file="evil.py", vocab_file="/etc/passwd")
    pipe = load_model(choose_model("model"), device=CPU, dtype=torch.float32).pipe
    stock = load_model(choose_model("demo"), device=CPU, dtype=torch.float32).pipe
    for part in ("tokenizer", "tokenizer_2"):
        assert getattr(pipe, part)("a red fox").input_ids == getattr(stock, part)("a red fox").input_ids
        assert "/etc/passwd" not in str(vars(getattr(pipe, part)))


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("OWNED").resolve(),))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "transformer", "vae"])
def test_pickles_are_not_loaded(model: Path, part: str) -> None:
    [stored] = (model / part).glob("*.safetensors")
    for name in (stored.with_suffix(".bin"), model / part / "pytorch_model.bin"):
        name.write_bytes(pickle.dumps(Bomb()))
    stored.unlink()
    assert f"{part} of model, a .bin file, is a pickle, which can run code" in refused()
    assert f"{part} of model is damaged" in refused("image", "model", "--allow-pickle")
    stored.write_bytes(pickle.dumps(Bomb()))
    assert f"{part} of model is damaged" in refused()


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
@pytest.mark.parametrize("shard", ["../../outside.safetensors", "/tmp/a.safetensors", "pickle.bin", "\x1b[2J.bin"])
def test_shards_lie_beside_their_index(model: Path, part: str, shard: str) -> None:
    [stored] = (model / part).glob("*.safetensors")
    weights = load_file(stored)
    if "\x1b" not in shard and not shard.startswith("/"):
        save_file(weights, model / part / shard, metadata={"format": "pt"})
    stored.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (model / part / f"{stored.name}.index.json").write_text(json.dumps(index))
    said = refused()
    assert f"{part} of model is not loaded: its {stored.name}.index.json asks for " in said
    assert "\x1b" not in said
    # The same weights in shards beside the index are read.
    save_file(weights, model / part / "one.safetensors", metadata={"format": "pt"})
    index["weight_map"] = dict.fromkeys(weights, "one.safetensors")
    (model / part / f"{stored.name}.index.json").write_text(json.dumps(index))
    assert grat("image", "a red fox", "--model", "model", "--res", "64", "--steps", "1", "--out", "a.png").code == 0


def test_a_file_of_a_transformer_is_never_taken_for_a_pickle(model: Path) -> None:
    good = Path(shutil.copy(next((model / "transformer").glob("*.safetensors")), "tuned.sft"))
    arguments = ("image", "a red fox", "--base", "model", "--res", "64", "--steps", "1", "--out", "a.png")
    assert grat(*arguments, "--model", good).code == 0
    Path("bomb.sft").write_bytes(pickle.dumps(Bomb()))
    assert "bomb.sft is a pickle" in refusal(*arguments, "--overwrite", "--model", "bomb.sft", code=3)
    said = refusal(*arguments, "--overwrite", "--model", "bomb.sft", "--allow-pickle", code=3)
    assert "bomb.sft is damaged, incomplete or not Flux's (it is damaged, or holds more than tensors)" in said
    edit(model / "transformer" / "config.json", auto_map=CODE)
    assert "asks for auto_map" in refusal(*arguments, "--overwrite", "--model", good, code=3)


DEEP, LONG = "[" * 200_000, json.dumps({"a": "b" * (1 << 23)})
ESCAPE = "\x1b]0;owned\x07[bold red]"


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json", "vae/x.index.json"])
@pytest.mark.parametrize("text", [DEEP, LONG, "[]", "7", "{", '{"a": NaN', "\xff\xfe"], ids=str.__len__)
def test_json_that_is_too_much_ends_in_words(model: Path, file: str, text: str) -> None:
    (model / file).write_bytes(text.encode("latin-1"))
    assert "or use --model demo" in refused()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"vae": ["diffusers", ESCAPE]}),
        ("model_index.json", {"vae": [ESCAPE, "AutoencoderTiny"]}),
        ("model_index.json", {ESCAPE: ["diffusers", "AutoencoderTiny"]}),
        ("model_index.json", {"_class_name": ESCAPE}),
        ("model_index.json", {f"part_{number}": ["evil", "X"] for number in range(100)}),
        ("model_index.json", {"vae": ["diffusers"]}),
        ("model_index.json", {"vae": None}),
        ("model_index.json", {"vae": ["diffusers", "A" * 500]}),
        ("transformer/config.json", {ESCAPE: 1}),
        ("transformer/config.json", {"num_layers": ESCAPE}),
        ("text_encoder/config.json", {"model_type": ESCAPE}),
        ("vae/config.json", {"block_out_channels": [8] * 100_000}),
        ("vae/config.json", {"block_out_channels": ESCAPE}),
        ("vae/config.json", {"latent_channels": ESCAPE}),
    ],
)
def test_what_stands_in_files_cannot_steer_the_terminal(model: Path, file: str, changes: dict[str, Any]) -> None:
    edit(model / file, **changes)
    result = grat("image", "a red fox", "--model", "model", "--steps", "1")
    assert result.code == 3, result
    said = result.err + refused()
    assert not {"\x1b", "\x07"} & set(said)
    assert len(said) < 1000


def test_weights_with_names_that_steer_the_terminal_are_refused_in_plain_text(model: Path) -> None:
    [stored] = (model / "transformer").glob("*.safetensors")
    save_file(load_file(stored) | {ESCAPE: torch.zeros(1)}, stored, metadata={"format": "pt"})
    said = refused()
    assert "has no place for 1 weights, such as \\x1b]0;owned\\x07" in said


def test_planning_reads_no_more_than_there_is(model: Path) -> None:
    choice = choose_model("model")
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")
    with pytest.raises(ModelUnavailable, match="cut off"):
        components_of(choice)
    (model / "transformer" / "config.json").write_text(DEEP)
    for command in (("plan", "--model", "model"), ("plan", "--model", "model", "--json")):
        assert "nested too deeply" in refusal(*command, code=3)
    with pytest.raises(ModelUnavailable, match="nested too deeply"):
        components_of(choice)
