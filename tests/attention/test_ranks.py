"""Meshes of ranks, as `install` takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from grat_cli.attention.ranks import Ranks
from grat_cli.errors import BadInput


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """One rank."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_dimensions_of_one_rank_share_nothing() -> None:
    ranks = Ranks.of(init_device_mesh("cpu", (1, 1), mesh_dim_names=("cfg", "cp")))
    assert ranks.cp is None
    assert ranks.cfg is None


@pytest.mark.usefixtures("alone")
def test_other_meshes_are_refused() -> None:
    for mesh in (
        init_device_mesh("cpu", (1,)),
        init_device_mesh("cpu", (1, 1), mesh_dim_names=("cp", "dp")),
        cast(Any, "cp=2"),
    ):
        with pytest.raises(BadInput, match="mesh_dim_names"):
            Ranks.of(mesh)
