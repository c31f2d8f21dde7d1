from __future__ import annotations

import pytest
import torch

from grat_cli.errors import (
    BadInput,
    GratError,
    ModelUnavailable,
    NumericalFailure,
    OutOfMemory,
    RankLost,
    choices,
    nearest,
    steadier,
)


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {error: error.exit_code for error in (BadInput, ModelUnavailable, OutOfMemory, NumericalFailure, RankLost)}
    assert codes == {BadInput: 2, ModelUnavailable: 3, OutOfMemory: 4, NumericalFailure: 5, RankLost: 6}
    assert all(issubclass(error, GratError) for error in codes)


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("flx-far", ["flux-far", "demo-far"], "flux-far"),
        ("--rse", ["--set", "--res"], "--res"),  # both share three letters; only one has the same
        ("FLUX-X", ["flux-b", "flux-x"], "flux-x"),
        ("qqq", ["flux-b"], None),
        ("", ["flux-b"], None),
        ("x", [], None),
    ],
)
def test_nearest_names_the_likely_slip_and_nothing_unlike(word: str, known: list[str], expected: str | None) -> None:
    assert nearest(word, known) == expected


def test_choices_always_list_what_there_is() -> None:
    assert choices("tritn", ["sdpa", "triton"]) == "did you mean 'triton'? (choose from sdpa, triton)"
    assert choices("qqq", ["sdpa", "triton"]) == "choose from sdpa, triton"


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "try --dtype float32 or bfloat16, or another --backend"),
        (torch.float8_e4m3fn, "try --dtype float32 or bfloat16, or another --backend"),
        (torch.bfloat16, "try --dtype float32, or another --backend"),
        ("float32", "try another --backend"),
    ],
)
def test_advice_after_nan_is_not_what_is_in_use(dtype: object, advice: str) -> None:
    assert steadier(dtype, "another --backend") == advice


def test_a_word_that_has_no_end_is_like_none() -> None:
    assert nearest("flux-" * 100_000, ["flux-far"]) is None
