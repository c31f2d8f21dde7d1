"""The cache of texts: the same pixels with it and without, and no text encoder where all is known."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import tiny_flux2
import tiny_hunyuan
import tiny_hunyuan15
import tiny_qwen
import tiny_wan
import torch
from command_line import grat
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import Progress, Small, broken_off, generate

from grat_cli.errors import CannotWrite
from grat_cli.files.cache_folder import cache_folder
from grat_cli.generation import run
from grat_cli.generation.checkpoint import read_run
from grat_cli.models import loading, text_cache
from grat_cli.models.catalogue import choose_model, medium_of_name
from grat_cli.models.text_cache import Embedded, TextCache, encoders_identity, text_key
from grat_cli.models.weights import AS_THEY_ARE, Weights

KEY, NOTES = "0" * 64, ("the prompt is cut",)


@pytest.fixture
def loaded_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of parts with weights that are loaded, in their order."""
    parts: list[str] = []
    load_part = loading._load_part

    def spy(loader: Any, folder: Path, *more: Any, **options: Any) -> Any:
        parts.append(folder.name)
        return load_part(loader, folder, *more, **options)

    monkeypatch.setattr(loading, "_load_part", spy)
    return parts


def entries() -> list[Path]:
    return list(text_cache.text_cache().entries())


def pixels(path: object) -> np.ndarray:
    return np.asarray(Image.open(str(path)))


def test_a_known_prompt_loads_no_encoder_and_gives_the_same_pixels(
    loaded_parts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kind = small_runs.picture()
    (first,) = generate(kind.of(tmp_path / "first"))
    assert loaded_parts.count("text_encoder") == loaded_parts.count("text_encoder_2") == 1
    assert len(entries()) == 1
    loaded_parts.clear()

    (again,) = generate(kind.of(tmp_path / "again"))
    assert sorted(loaded_parts) == ["transformer", "vae"]
    assert (first.report["text"], again.report["text"]) == ({"from": "encoders"}, {"from": "cache"})
    np.testing.assert_array_equal(pixels(first.path), pixels(again.path))
    (without,) = generate(kind.of(tmp_path / "without", text_cache=False))
    np.testing.assert_array_equal(pixels(first.path), pixels(without.path))
    assert without.report["text"] == {"from": "encoders"}


def test_other_texts_are_encoded(loaded_parts: list[str], tmp_path: Path) -> None:
    kind = small_runs.picture()
    for number, changes in enumerate(({}, {"prompt": "a blue boat"}, {"negative_prompt": "a fox"})):
        loaded_parts.clear()
        generate(kind.of(tmp_path / f"{number}", **changes))
        assert "text_encoder" in loaded_parts
        assert len(entries()) == number + 1
    without_guidance = kind.preset(sampling={"steps": 2, "guidance": 1.0})
    generate(kind.of(tmp_path / "without", preset=without_guidance))
    assert len(entries()) == 4


def test_nothing_is_kept_without_the_cache(tmp_path: Path) -> None:
    generate(small_runs.picture().of(tmp_path / "a", text_cache=False))
    assert not cache_folder().exists()


def _changed_weight(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    held = load_file(path)
    name = sorted(held)[-1]
    save_file({**held, name: held[name] + 0.5}, path, {"format": "pt"})


def _changed_tokenizer(folder: Path) -> None:
    path = next((folder / "tokenizer").glob("*.json"))
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize("change", [_changed_weight, _changed_tokenizer])
def test_other_encoders_have_other_entries(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(choose_model("demo", medium="image").source, tmp_path / "model"))
    model = choose_model(str(folder), medium="image")

    def key() -> str:
        dtypes = {"text_encoder": torch.float32}
        return text_key(encoders_identity(folder, model, dtypes, AS_THEY_ARE, torch.device("cpu")), "a fox", None)

    before = key()
    assert key() == before
    change(folder)
    assert key() != before


def test_all_that_decides_embeddings_is_in_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cpu = choose_model("demo", medium="image"), torch.device("cpu")
    folder = Path(model.source)

    def key(prompt: str = "a fox", negative: str | None = None, **changes: Any) -> str:
        given = {"model": model, "dtypes": {"text_encoder": torch.float32}, "weights": AS_THEY_ARE, "device": cpu}
        return text_key(encoders_identity(folder, **{**given, **changes}), prompt, negative)

    keys = [
        key(),
        key("a fox "),
        key(negative=""),
        key(model=replace(model, text_tokens=12)),
        key(dtypes={"text_encoder": torch.bfloat16}),
        key(weights=Weights(quantize="int8")),
    ]
    monkeypatch.setattr(text_cache, "cpu_threads", lambda device: 3)
    keys.append(key())
    monkeypatch.setattr(text_cache, "versions", lambda: dict.fromkeys(text_cache._PACKAGES, "9"))
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def test_a_resumed_run_takes_its_text_from_the_cache_to_the_same_pixels(
    loaded_parts: list[str], tmp_path: Path
) -> None:
    kind = small_runs.picture()
    (whole,) = generate(kind.of(tmp_path / "whole"))
    kept = broken_off(kind.of(tmp_path / "broken"))
    loaded_parts.clear()
    begun, request = read_run(kept)
    (made,) = generate(request, begun=begun)
    assert "text_encoder" not in loaded_parts
    np.testing.assert_array_equal(pixels(whole.path), pixels(made.path))


def test_a_run_without_the_cache_is_gone_on_with_without_it(tmp_path: Path) -> None:
    kept = broken_off(small_runs.picture().of(tmp_path / "broken", text_cache=False))
    begun, request = read_run(kept)
    assert not request.text_cache
    generate(request, begun=begun)
    assert not cache_folder().exists()


def test_a_batch_encodes_what_is_new_alone(
    loaded_parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encoded: list[str] = []
    family = type(small_runs.picture().request.family)
    encode = family.encode_prompt

    def spy(self: Any, pipe: Any, prompt: str, tokens: int) -> Any:
        encoded.append(prompt)
        return encode(self, pipe, prompt, tokens)

    monkeypatch.setattr(family, "encode_prompt", spy)
    small = ("--model", "demo", "--res", "64", "--steps", "1", "--guidance", "1")
    Path("a.txt").write_text("a red fox\na blue boat\n")
    Path("b.txt").write_text("a red fox\na green bird\n")
    assert grat("batch", "a.txt", *small, "--out", "a").code == 0
    assert encoded == ["a red fox", "a blue boat"]
    assert grat("batch", "b.txt", *small, "--out", "b").code == 0
    assert encoded == ["a red fox", "a blue boat", "a green bird"]
    loaded_parts.clear()
    assert grat("batch", "b.txt", *small, "--out", "c").code == 0
    assert len(encoded) == 3
    assert "text_encoder" not in loaded_parts
    assert grat("batch", "b.txt", *small, "--out", "d", "--no-text-cache").code == 0
    for one, other in zip(*(sorted(Path(folder).glob("*.png")) for folder in "cd"), strict=True):
        np.testing.assert_array_equal(pixels(one), pixels(other))


def test_a_text_that_nobody_told_of_is_encoded_by_encoders_that_are_loaded_for_it(
    loaded_parts: list[str], tmp_path: Path
) -> None:
    asked = small_runs.picture().of(tmp_path / "a")
    generate(asked)
    loaded_parts.clear()
    generator = run.Generator(asked, Progress())
    assert "text_encoder" not in loaded_parts
    assert not generator.encode(replace(asked, prompt="a green bird")).known
    assert "text_encoder" in loaded_parts
    assert generator.encode(asked).known


# ---- Entries


@pytest.fixture
def cache(tmp_path: Path) -> TextCache:
    return TextCache(tmp_path / "texts")


def embeddings(seed: int = 0) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, 7, 12, generator=drawn).bfloat16(),
        "negative_prompt_embeds_mask_2": torch.ones(1, 7, dtype=torch.bool),
        "pooled_prompt_embeds": torch.randn(1, 12, generator=drawn),
        "prompt_attention_mask": torch.arange(7)[None],
    }


def test_entries_come_back_bit_for_bit(cache: TextCache) -> None:
    assert cache.read(KEY) is None
    cache.write(KEY, Embedded(embeddings(), NOTES))
    held = cache.read(KEY)
    assert held is not None
    assert held.notes == NOTES
    assert list(held.tensors) == list(embeddings())
    for name, tensor in embeddings().items():
        assert held.tensors[name].dtype == tensor.dtype
        assert torch.equal(held.tensors[name], tensor)
    assert cache.read("1" * 64) is None


def _flipped(content: bytes) -> Iterator[bytes]:
    for place in range(0, len(content), max(1, len(content) // 40)):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_tensors_lie_in_memory_as_if_they_had_just_been_encoded(loaded_parts: list[str], tmp_path: Path) -> None:
    """Products of others round differently."""
    folder = tiny_hunyuan.save(tmp_path / "model", guidance_embeds=False)
    asked = _asked(folder).of(tmp_path / "a", negative_prompt="a fox")
    texts = [run.Generator(asked, Progress()).encode(asked) for _ in range(2)]
    assert [text.known for text in texts] == [False, True]
    assert texts[0].lengths == texts[1].lengths
    assert list(texts[0].tensors) == list(texts[1].tensors)
    for name, tensor in texts[0].tensors.items():
        known = texts[1].tensors[name]
        assert torch.equal(tensor, known)
        assert tensor.stride() == known.stride()
        assert (tensor.storage_offset(), tensor.data_ptr() % 64) == (known.storage_offset(), known.data_ptr() % 64)


def test_damaged_entries_are_as_good_as_none_and_written_anew(cache: TextCache) -> None:
    cache.write(KEY, Embedded(embeddings(), NOTES))
    (path,) = cache.entries()
    content = path.read_bytes()
    for damaged in (b"", b"x", content[:-1], content[: len(content) // 2], *_flipped(content)):
        path.write_bytes(damaged)
        held = cache.read(KEY)
        if held is not None:  # a flipped bit may be one of padding
            assert {name: tensor.tolist() for name, tensor in held.tensors.items()} == {
                name: tensor.tolist() for name, tensor in embeddings().items()
            }
    cache.write(KEY, Embedded(embeddings(1)))
    held = cache.read(KEY)
    assert held is not None
    assert torch.equal(held.tensors["prompt_embeds"], embeddings(1)["prompt_embeds"])


def test_an_entry_of_another_name_or_with_other_tensors_is_none(cache: TextCache) -> None:
    cache.write(KEY, Embedded(embeddings(), NOTES))
    (path,) = cache.entries()
    path.rename(path.with_name("1" * 64 + ".safetensors"))
    assert cache.read("1" * 64) is None
    for strange in ({"output_type": torch.zeros(1)}, {"latents": torch.zeros(1, 3)}):
        with pytest.raises(ValueError, match="tensors"):
            cache.write(KEY, Embedded(strange))


def test_what_is_not_finite_is_not_kept(cache: TextCache) -> None:
    cache.write(KEY, Embedded({"prompt_embeds": torch.full((1, 2, 3), torch.nan)}))
    assert not cache.entries()


def test_those_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    cache = TextCache(tmp_path / "texts")
    for number in range(3):
        cache.write(str(number) * 64, Embedded(embeddings(number)))
        os.utime(cache.folder / f"{str(number) * 64}.safetensors", (number, number))
    size = sum(found.st_size for found in cache.entries().values())
    assert cache.read("0" * 64) is not None
    smaller = TextCache(cache.folder, most_bytes=size)
    smaller.write("3" * 64, Embedded(embeddings(3)))
    assert {path.name[0] for path in smaller.entries()} == {"0", "2", "3"}
    TextCache(cache.folder, most_bytes=1).write("4" * 64, Embedded(embeddings(4)))
    assert "4" * 64 + ".safetensors" not in {path.name for path in smaller.entries()}


def test_clearing_removes_entries_and_nothing_else(cache: TextCache) -> None:
    assert cache.clear() == 0
    cache.write(KEY, Embedded(embeddings(), NOTES))
    mine = cache.folder / "mine.safetensors"
    mine.write_bytes(b"mine")
    (cache.folder / ("2" * 64 + ".safetensors")).symlink_to(mine)
    (cache.folder / f".{KEY}.safetensors.{'a' * 16}.part").write_bytes(b"left by a killed process")
    assert cache.clear() == 1
    assert sorted(path.name for path in cache.folder.iterdir()) == ["2" * 64 + ".safetensors", "mine.safetensors"]
    assert mine.read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_leave_to_write_is_told(cache: TextCache) -> None:
    cache.folder.parent.chmod(0o500)
    with pytest.raises(CannotWrite):
        cache.write(KEY, Embedded(embeddings(), NOTES))


def test_a_run_goes_on_without_room_for_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("GRAT_CACHE", str(tmp_path / "a file"))
    progress = Progress()
    generate(small_runs.picture().of(tmp_path / "a"), progress)
    (note,) = [note for note in progress.notes if "cannot write" in note]
    assert note.endswith("the prompt is encoded again the next time; --no-text-cache does without")


# ---- Where it is, and what of it is shown


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GRAT_CACHE": "/a"}, "/a"),
        ({"GRAT_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/grat"),
        ({"GRAT_CACHE": "", "XDG_CACHE_HOME": "not absolute", "HOME": "/c"}, "/c/.cache/grat"),
    ],
)
def test_the_folder_is_the_platforms_or_what_is_set(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_env_shows_the_cache_and_clears_it(cache_of_a_test: Path) -> None:
    text_cache.text_cache().write(KEY, Embedded(embeddings()))
    told = grat("env", "--json").data["text_cache"]
    assert (told["folder"], told["entries"]) == (str(cache_of_a_test / "texts"), 1)
    assert told["bytes"] > 500
    assert "text cache" in grat("env").out
    assert "1 prompts removed" in grat("env", "--clear-text-cache").out
    assert json.loads(grat("env", "--clear-text-cache", "--json").out)["text_cache"]["removed"] == 0
    assert not cache_of_a_test.joinpath("texts").exists()


# ---- Every family


SAVERS: dict[str, Callable[[Path], Path]] = {
    "flux2": tiny_flux2.save,
    "qwen": tiny_qwen.save,
    "hunyuan": lambda folder: tiny_hunyuan.save(folder, guidance_embeds=False),
    "hunyuan15": tiny_hunyuan15.save,
    "wan": tiny_wan.save,
}


@pytest.mark.parametrize("name", SAVERS)
def test_every_family_goes_without_its_encoders(
    name: str, written: dict[str, np.ndarray], loaded_parts: list[str], tmp_path: Path
) -> None:
    folder = SAVERS[name](tmp_path / "model")
    asked = _asked(folder)
    made = generate(asked.of(tmp_path / "first"))
    assert "text_encoder" in loaded_parts
    loaded_parts.clear()
    made += generate(asked.of(tmp_path / "again"))
    assert not [part for part in loaded_parts if part.startswith("text_encoder")]
    assert [one.report["text"]["from"] for one in made] == ["encoders", "cache"]
    np.testing.assert_array_equal(written["first"], written["again"])


def _asked(folder: Path, **changes: Any) -> Small:
    medium = medium_of_name(str(folder)) or "image"
    model = choose_model(str(folder), medium=medium)
    of_video = {"frames": 5, "fps": 8} if model.video else {}
    group, ending = ([2, 2, 2], ".mp4") if model.video else ([2, 2], ".png")
    size = {"width": 64, "height": 64, **of_video}
    sampling = {"steps": 2, "guidance": 2.0}
    request = small_runs.request_of(model.presets, group, ending[1:], model=model, sampling=sampling, **size, **changes)
    return Small(request, ending)


def test_what_encoders_see_of_pictures_is_not_kept(written: dict[str, np.ndarray], tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    folder = tiny_qwen.save(tmp_path / "model", edits="QwenImageEditPipeline")
    (made,) = generate(_asked(folder, references=(tmp_path / "red.png",)).of(tmp_path / "a"))
    assert made.report["text"] == {"from": "encoders"}
    assert not entries()
