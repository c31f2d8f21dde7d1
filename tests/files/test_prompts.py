"""Files of prompts, and where their samples go."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grat_cli.errors import BadInput
from grat_cli.files.prompts import PromptEntry, read_prompts, unknown_keys
from grat_cli.generation.batch_layout import LAYOUTS, Sample, lay_out


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_text_has_a_prompt_per_line(tmp_path: Path) -> None:
    path = written(tmp_path, "p.txt", "\ufeffa red fox \r\n\n  ein grünes Boot\n# not a comment\n")
    assert [(entry.place, entry.prompt) for entry in read_prompts(path)] == [
        ("line 1", "a red fox"),
        ("line 3", "ein grünes Boot"),
        ("line 4", "# not a comment"),
    ]


def test_objects_say_seed_samples_and_what_to_keep_out(tmp_path: Path) -> None:
    items: list[dict[str, Any]] = [
        {"prompt": "a fox", "seed": 7, "n": 2, "negative": "blur", "tag": "colors", "include": [{"class": "fox"}]},
        {"prompt": "a line\u2028separator", "seed": None},
    ]
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    first, second = read_prompts(written(tmp_path, "p.jsonl", lines))
    assert first == PromptEntry("line 1", "a fox", items[0], "blur", 7, 2)
    assert second == PromptEntry("line 2", "a line\u2028separator", items[1])


def test_what_to_keep_out_has_the_name_that_reports_give_it_too(tmp_path: Path) -> None:
    items = [{"prompt": "a", "negative_prompt": "blur"}, {"prompt": "a", "negative_prompt": None, "negative": "snow"}]
    path = written(tmp_path, "p.json", json.dumps([*items, {"prompt": "a", "negative_prompt": ""}]))
    assert [entry.negative for entry in read_prompts(path)] == ["blur", "snow", ""]


def test_keys_that_mean_nothing_are_named(tmp_path: Path) -> None:
    items = [
        {"prompt": "a", "tag": "colors", "include": [], "steps": 5, "negativ": "blur"},
        {"prompt_en": "b", "dimension": ["scene"], "auxiliary_info": {}, "seed": 1, "n": 1, "steps": 6, "mask": None},
    ]
    assert unknown_keys(read_prompts(written(tmp_path, "p.json", json.dumps(items)))) == ["steps", "negativ"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(["prompt", "prompt_en", "negative", "negative_prompt", "seed", "n", "mask", "reference", "tag"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(st.dictionaries(KEYS, JSON) | JSON, max_size=3), odd=st.binary(max_size=3), lines=st.booleans())
def test_any_file_gives_prompts_that_can_be_written_or_is_refused(
    tmp_path: Path, items: list[Any], odd: bytes, lines: bool
) -> None:
    text = "\n".join(map(json.dumps, items)) if lines else json.dumps(items)
    path = written(tmp_path, "p.jsonl" if lines else "p.json", text.encode() + odd)
    with contextlib.suppress(BadInput):
        for entry in read_prompts(path):
            assert json.loads(json.dumps(entry.item, ensure_ascii=False, indent=2, allow_nan=False).encode())
            assert entry.prompt.encode()


def test_vbench_lists_its_prompts(tmp_path: Path) -> None:
    items = [{"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]}]
    (entry,) = read_prompts(written(tmp_path, "VBench_full_info.json", json.dumps(items)))
    assert (entry.place, entry.prompt, entry.item) == ("entry 1", items[0]["prompt_en"], items[0])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.csv", "a fox", "p.csv: prompts stand in .txt, .jsonl or .json files"),
        ("p.txt", b"\xff\xfe\x00", "p.txt is not UTF-8 text"),
        ("p.txt", " \n\n", "p.txt has no prompts"),
        ("p.jsonl", "", "has no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "p.jsonl, line 2 is not valid JSON"),
        ("p.jsonl", '\n"a fox"', 'line 2: expected an object such as {"prompt": "a red fox"}, not "a fox"'),
        ("p.jsonl", '{"text": "a fox"}', "line 1 has no prompt"),
        ("p.jsonl", '{"prompt": ""}', 'prompt must be text, not ""'),
        ("p.jsonl", '{"prompt": ["a fox"]}', 'prompt must be text, not ["a fox"]'),
        ("p.jsonl", '{"prompt": "a", "negative": 3}', "negative must be text, not 3"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "seed must be a whole number from 0"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "seed must be a whole number from 0"),
        ("p.jsonl", '{"prompt": "a", "seed": 9223372036854775808}', "to 9223372036854775807, not 9223372036854775808"),
        ("p.jsonl", '{"prompt": "a", "n": 0}', "n must be a whole number from 1 to 1000, not 0"),
        ("p.jsonl", '{"prompt": "a", "n": 1.5}', "n must be a whole number from 1 to 1000, not 1.5"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "a lone surrogate"),
        ("p.jsonl", '{"prompt": "a", "tag": ["\\ud800"]}', "a lone surrogate"),
        ("p.jsonl", '{"prompt": "a", "tag": NaN}', "is not valid JSON"),
        ("p.jsonl", '{"prompt": "a", "tag": 1e999}', "is not valid JSON"),
        ("p.jsonl", '{"prompt": "a", "tag": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
        ("p.jsonl", '{"prompt": "a", "seed": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("p.jsonl", '{"prompt": "a", "negative": "b", "negative_prompt": "c"}', "mean the same and differ"),
        ("p.jsonl", b'{"prompt": "fu\xdfball"}', "is not UTF-8 text"),
        ("p.jsonl", "[" * 100_000, "line 1 is not valid JSON"),
        ("p.json", '{"prompt": "a"}', "expected a list of objects"),
        ("p.json", '[{"prompt": "a"}, {}]', "p.json, entry 2 has no prompt"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, name: str, text: str | bytes, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_prompts(written(tmp_path, name, text))
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read .*: no such file"):
        read_prompts(tmp_path / "p.txt")


def entry(prompt: str, place: str = "line 1", **more: Any) -> PromptEntry:
    return PromptEntry(place, prompt, {"prompt": prompt, "tag": "colors", "include": []}, **more)


def laid_out(layout: str, *entries: PromptEntry, **changes: Any) -> list[Sample]:
    options: dict[str, Any] = {"suffix": ".mp4" if layout == "vbench" else ".png", "first_seed": 5, "samples": None}
    options |= {"negative": "blur", "plain_name": lambda prompt, seed: f"grat-{prompt.split()[0]}-s{seed}.png"}
    return lay_out(entries, LAYOUTS[layout], Path("out"), **(options | changes))


def test_plain_names_are_grats_own_and_differ() -> None:
    samples = laid_out(
        "plain", entry("a fox"), entry("a cat", seed=6, negative=""), entry("a fox", place="line 3"), samples=2
    )
    assert [(sample.asked, sample.output.name, sample.report.name) for sample in samples] == [
        (("a fox", "blur", 5), "grat-a-s5.png", "grat-a-s5.json"),
        (("a fox", "blur", 6), "grat-a-s6.png", "grat-a-s6.json"),
        (("a cat", "", 6), "grat-a-s6-2.png", "grat-a-s6-2.json"),
        (("a cat", "", 7), "grat-a-s7.png", "grat-a-s7.json"),
    ]


def test_geneval_numbers_prompts_and_samples() -> None:
    samples = laid_out("geneval", entry("a fox"), entry("a fox", samples=1))
    assert [str(sample.output) for sample in samples] == [
        *(f"out/00000/samples/000{index}.png" for index in range(4)),
        "out/00001/samples/0000.png",
    ]
    assert [sample.seed for sample in samples] == [5, 6, 7, 8, 5]
    assert str(samples[-1].report) == "out/reports/00001-0000.json"
    assert str(samples[-1].metadata) == "out/00001/metadata.jsonl"
    with pytest.raises(BadInput, match="line 1 has no include, which GenEval's evaluator needs"):
        laid_out("geneval", PromptEntry("line 1", "a", {"prompt": "a", "tag": "colors"}))


def test_vbench_names_videos_after_prompts() -> None:
    samples = laid_out("vbench", entry("a fox, 4K."), entry("a fox, 4K.", place="line 2"))
    assert [str(sample.output) for sample in samples] == [f"out/videos/a fox, 4K.-{index}.mp4" for index in range(5)]
    assert str(samples[0].report) == "out/reports/a fox, 4K.-0.json"
    with pytest.raises(BadInput, match="line 1 and line 2 have the same prompt"):
        laid_out("vbench", entry("a fox"), entry("a fox", place="line 2", seed=9))


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a fox/cat", "cannot be part of a file's name"),
        ("a\0fox", "cannot be part of a file's name"),
        ("a\nfox", "cannot be part of a file's name"),
        ("f" * 247, "is 1 bytes too long for a file's name"),
        ("ö" * 124, "is 2 bytes too long for a file's name"),
    ],
)
def test_prompts_that_vbench_cannot_name_a_file_after(prompt: str, says: str) -> None:
    assert len(laid_out("vbench", entry("f" * 246))) == 5
    with pytest.raises(BadInput, match=says):
        laid_out("vbench", entry(prompt))
    assert len(laid_out("plain", entry(prompt + " x"), plain_name=lambda prompt, seed: "a.png")) == 1


def test_seeds_stay_in_range() -> None:
    with pytest.raises(BadInput, match="line 1: sample 1 goes past the largest seed"):
        laid_out("plain", entry("a fox"), first_seed=2**63 - 1, samples=2)
