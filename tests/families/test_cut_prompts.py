"""Where prompts are cut that are too long: told for each encoder of each family, held to what embeddings depend on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_flux2
import tiny_hunyuan
import tiny_hunyuan15
import tiny_qwen
import tiny_wan
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline

from grat_cli.families import Medium, family_of
from grat_cli.families.cut_prompts import Cut, notes, watched
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import load_model

ROOM = 200
LONG = "a red fox in the snow sees an old house and runs to it over the ice with joy " * 30  # with a space at its end
KINDS: dict[str, tuple[Medium, Callable[[Path], Path] | None]] = {
    "flux": ("image", None),
    "hunyuan": ("video", tiny_hunyuan.save),
    "hunyuan15": ("video", tiny_hunyuan15.save),
    "wan": ("video", tiny_wan.save),
    "qwen": ("image", tiny_qwen.save),
    "flux2 klein": ("image", tiny_flux2.save),
    "flux2 dev": ("image", lambda folder: tiny_flux2.save(folder, Flux2Pipeline)),
}


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Family, model and pipeline; few tokens are taken of a prompt."""
    medium, save = KINDS[request.param]
    name = "demo" if save is None else str(save(tmp_path_factory.mktemp("model") / "tiny"))
    model = replace(choose_model(name, medium=medium), text_tokens=ROOM)
    pipe = load_model(model, device=torch.device("cpu"), dtype=torch.float32).pipe
    family = family_of(model)
    family.prepare(pipe)
    if request.param == "flux2 dev":  # whose small stand-in has the end of a prompt alone
        pipe.tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'][0]['text'] }}{% endfor %}"
    return family, model, pipe


def encoded(loaded: tuple[Any, Any, Any], prompt: str) -> tuple[dict[str, torch.Tensor], list[Cut]]:
    family, model, pipe = loaded
    with watched(pipe, family.longest_text(pipe, model)) as cuts:
        return family.encode_text(pipe, model, prompt, None), list(cuts)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(tensor.shape == other[name].shape and torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_embeddings_depend_on_what_is_before_the_cut_alone(loaded: tuple[Any, Any, Any]) -> None:
    classes = {type(tokenizer) for tokenizer in loaded[2].components.values()}
    text, cuts = encoded(loaded, LONG)
    assert {type(tokenizer) for tokenizer in loaded[2].components.values()} == classes
    ends = [end for cut in cuts if (end := cut.end_in(LONG)) is not None]
    assert ends
    # Of the words around the last cut of all, that before it matters, and that after it does not.
    last = max(ends)
    before, after = LONG.rindex(" ", 0, last - 1), LONG.index(" ", last)
    assert same(encoded(loaded, LONG[:after] + LONG[after:].replace("o", "u"))[0], text)
    changed = encoded(loaded, LONG[: before - 1].rpartition(" ")[0] + " zip" + LONG[before:])[0]
    assert not same(changed, text)


def test_a_prompt_that_fits_is_not_told_of(loaded: tuple[Any, Any, Any]) -> None:
    assert notes(encoded(loaded, "a fox")[1], "a fox", None) == []


def test_libraries_say_nothing(loaded: tuple[Any, Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("diffusers.pipelines.", "transformers.tokenization")):
            handler = logging.Handler()
            handler.emit = lambda record: heard.append(record.getMessage())
            logging.getLogger(name).addHandler(handler)
    encoded(loaded, LONG + " ")
    assert heard == []


def test_sentences_say_where() -> None:
    prompt = "a red fox in the snow sees an old house and runs to it"
    cut = Cut("LlamaModel", f"Describe: {prompt}<end>", len(f"Describe: {prompt[:43]}"), 12, 20)
    assert notes([cut, cut], prompt, None) == [
        "the prompt is cut: LlamaModel reads 12 of its 20 tokens, up to “…ed fox in the snow sees an old house and”"
    ]
    assert notes([cut], "blur", prompt)[0].startswith("the negative prompt is cut: LlamaModel reads 12 of its 20")
    # Of a text that was only cut in what a template puts around the prompt, nothing is lost.
    assert notes([replace(cut, end=len(cut.text) - 2)], prompt, None) == []
    assert notes([replace(cut, end=5)], prompt, None) == [
        "the prompt is cut: LlamaModel reads 12 of its 20 tokens, none of it"
    ]
    # A prompt that the pipeline tidied up.
    spaced = prompt.replace(" ", "  ")
    assert "up to “a red fox”" in notes([replace(cut, text=prompt, end=9)], spaced, None)[0]
