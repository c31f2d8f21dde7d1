"""Weights that several ranks share, in processes of their own that talk by gloo.

Each rank computes with whole weights, copies of the parts of others: the same bits.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny_flux
import tiny_wan
import torch
from lora_files import diffusers_layout, layers_of, write
from ranks import on_ranks
from sharded_models import Everything, alone, everything

from grat_cli.demo import DEMO_FLUX
from grat_cli.demo.architecture import load_pipeline
from grat_cli.errors import BadInput
from grat_cli.models.catalogue import choose_model
from grat_cli.models.loading import load_model
from grat_cli.models.sharding import require_sharding, shard_weights
from grat_cli.models.weights import Weights


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> list[Everything]:
    """Of one rank alone, and of each of two that share weights."""
    folder = tmp_path_factory.mktemp("sharded")
    wan = tiny_wan.save(folder / "wan", "two")
    demo = layers_of(load_pipeline(DEMO_FLUX.path).transformer, "attn", "proj_mlp")
    lora = write(folder / "style.safetensors", diffusers_layout(demo, strength=0.2))
    read = (str(wan), str(lora))
    return [*on_ranks(1, alone, *read), *on_ranks(2, everything, *read)]


def test_ranks_that_share_weights_predict_what_one_does(every: list[Everything]) -> None:
    """Also where they share calls as well, and tokens come in chunks."""
    whole, *others = every
    for of_rank in others:
        for variant, expected_variant in ((of_rank.plain, whole.plain), (of_rank.shared, whole.shared)):
            for name, expected in expected_variant.items():
                made = variant[name]
                assert torch.equal(made.predictions, expected.predictions), name
                assert 0.45 < made.share < 0.55
                assert made.whole == 1 < expected.whole, "blocks are whole as they are called"
                assert made.chunking == expected.chunking
    assert whole.shared["flux"].chunking[0] == 16


def test_no_more_is_held_after_a_call_than_before(every: list[Everything]) -> None:
    whole, *parts = (one.held for one in every)
    for before, after in (whole, *parts):
        assert before == after
    assert whole[0] == sum(parameter.nbytes for parameter in tiny_flux.transformer().parameters())
    assert sum(before for before, _ in parts) == pytest.approx(whole[0], rel=0.01)


def test_pipelines_are_loaded_with_the_weights_of_their_transformers_shared(every: list[Everything]) -> None:
    alone, *others = every
    assert [run.elsewhere for run in alone.runs] == [[], []]
    for of_rank in others:
        for run, expected in zip(of_rank.runs, alone.runs, strict=True):
            assert torch.equal(run.made, expected.made)
            assert all(0.45 < share < 0.55 for share in run.shares)
            assert not run.elsewhere
        of_wan = of_rank.runs[0]
        assert len(of_wan.shares) == 2
        assert of_wan.dtypes == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "group"}, "--shard-weights with --offload group"),
        ({"quantize": "int8"}, "--shard-weights with --quantize int8"),
        ({"cast": "fp8"}, "--shard-weights with --cast fp8"),
        ({"compiled": True}, "--shard-weights with --compile"),
    ],
)
def test_what_does_not_go_with_shared_weights_is_refused(options: dict[str, Any], message: str) -> None:
    require_sharding("auto")
    with pytest.raises(BadInput, match=message):
        require_sharding(**options)


def test_weights_that_are_no_plain_tensors_are_refused_before_anything_is_loaded_or_cut() -> None:
    demo, mesh = choose_model("demo"), cast(Any, SimpleNamespace())
    with pytest.raises(BadInput, match="--shard-weights with --cast fp8"):
        load_model(demo, device=torch.device("cpu"), dtype=torch.float32, weights=Weights(cast="fp8"), shard_over=mesh)
    method = SimpleNamespace(quant_method=SimpleNamespace(value="gguf"))
    quantized = SimpleNamespace(hf_quantizer=SimpleNamespace(quantization_config=method))
    with pytest.raises(BadInput, match="quantized by gguf"):
        shard_weights(quantized, mesh)
