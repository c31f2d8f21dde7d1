"""The ranks that make one output, and the two ways in which they share its transformer calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from grat_cli.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

CP, CFG = "cp", "cfg"


@dataclass(frozen=True)
class Ranks:
    """The ranks of a device mesh, seen from one of them.

    Attributes:
        cp: those that share a call, each with some of its tokens; None for one alone. See `context_parallel`.
        cfg: the two that make a call of guidance each, with the same tokens; None where each makes both. See
            `guidance_split`.
        device: where this one computes, None for one that is alone.
    """

    cp: ProcessGroup | None = None
    cfg: ProcessGroup | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Ranks:
        """Of a mesh with the dimensions `cp` and `cfg`, or one of them.

        Raises:
            BadInput: if it has others, or more than two ranks take turns at guidance.
        """
        import torch
        from torch.distributed.device_mesh import DeviceMesh

        names = mesh.mesh_dim_names if isinstance(mesh, DeviceMesh) else None
        if not names or not {*names} <= {CP, CFG}:
            raise BadInput(
                "parallel: expected a DeviceMesh with the dimensions cp (ranks that share a call) and cfg (2, where "
                'each half makes one call of guidance), such as init_device_mesh("cuda", (4,), mesh_dim_names=("cp",))'
            )
        groups = {name: mesh.get_group(name) for name in names}
        sizes = {name: group.size() for name, group in groups.items()}
        if sizes.get(CFG, 1) > 2:
            raise BadInput(f"parallel: guidance makes two calls a step, which {sizes[CFG]} ranks cannot share: take 2")
        several = {name: group for name, group in groups.items() if sizes[name] > 1}
        return cls(several.get(CP), several.get(CFG), torch.device(mesh.device_type))

    @property
    def are_several(self) -> bool:
        """Whether there is another one."""
        return self.cp is not None or self.cfg is not None


ALONE = Ranks()
