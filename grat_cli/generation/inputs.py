"""Pictures that outputs are made from: whether they fit one another, their pixels, and how these are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grat_cli.errors import BadInput
from grat_cli.families.base import ModelChoice, PictureKind, Pictures
from grat_cli.files.fingerprint import fingerprint
from grat_cli.files.pictures import MOST_PIXELS, picture_size, read_picture
from grat_cli.generation.request import Progress, Request
from grat_cli.models.picture_kinds import OPTIONS
from grat_cli.models.resolution import LARGEST_SIDE

if TYPE_CHECKING:
    import torch
    from PIL import Image

_PIXELS = {"start": "start_pixels", "mask": "mask_pixels", "control": "control_pixels"}
_REFERENCE_PIXELS = "reference_pixels_"
_HALF = 128  # of a mask, white from here on


# ---- Sizes, which the beginnings of files tell


def refuse_sizes(request: Request) -> None:
    """Makes sure, before anything is loaded, that pictures are there, and of sizes that go together.

    Raises:
        BadInput: if not, naming the option.
    """
    sizes = {path: _size(path, option) for path, option in _given(request)}
    start, mask = request.init_image, request.mask
    if start is not None and mask is not None and sizes[start] != sizes[mask]:
        raise BadInput(
            f"--mask {mask} is {_text(sizes[mask])}, and --init-image {start} {_text(sizes[start])}: "
            f"make the mask {_text(sizes[start])} too"
        )
    for path in request.references:
        refuse_small(request.model, path, sizes[path])


def refuse_small(model: ModelChoice, path: Path, size: tuple[int, int]) -> None:
    """Raises BadInput for a reference of less than a token."""
    if min(size) < model.size_multiple:
        raise BadInput(
            f"--reference {path} is {_text(size)}: {model.name} takes pictures of {model.size_multiple} pixels a side "
            "and more"
        )


def reference_tokens(request: Request, sizes: Sequence[tuple[int, int]] | None = None) -> int:
    """Tokens of the references in the joint sequence; of files, where their sizes are not given."""
    if sizes is None:
        sizes = [picture_size(path) for path in request.references]
    return request.family.reference_tokens(request.model, (request.width, request.height), request.kinds, sizes)


def start_size(request: Request, picture: tuple[int, int]) -> tuple[int, int]:
    """The largest size in a request's shape that a picture holds, and no larger than what is asked for."""
    scale = min(picture[0] / request.width, picture[1] / request.height, 1.0)
    return max(1, round(request.width * scale)), max(1, round(request.height * scale))


def _given(request: Request) -> list[tuple[Path, str]]:
    return [(path, OPTIONS[kind]) for kind, path in _files(request)]


def _size(path: Path, option: str) -> tuple[int, int]:
    if not path.is_file():
        raise BadInput(f"{option} {path}: there is no such file")
    return picture_size(path)


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# ---- Pixels


def read_start(request: Request, progress: Progress) -> Image.Image | None:
    """The picture that is redone, cut to the request's shape but of its own size; None where there is none.

    Raises:
        BadInput: if it cannot be read.
    """
    if request.init_image is None or request.handed:
        return None
    from PIL import Image, ImageOps

    picture = read_picture(request.init_image)
    _note_cut(request, request.init_image, picture, progress)
    return ImageOps.fit(picture, start_size(request, picture.size), Image.Resampling.LANCZOS)


def read_pictures(request: Request, progress: Progress) -> Pictures:
    """The pictures that the pipeline is given: of the output's size, but for references; none where one is redone.

    Raises:
        BadInput: if one cannot be read, or a mask is all black.
    """
    if not request.handed:
        return Pictures()
    from PIL import Image, ImageOps

    def fitted(path: Path | None, *, told: bool = True) -> Image.Image | None:
        if path is None:
            return None
        picture = read_picture(path)
        if told:
            _note_cut(request, path, picture, progress)
        return ImageOps.fit(picture, (request.width, request.height), Image.Resampling.LANCZOS)

    mask = fitted(request.mask, told=False)  # it is cut as the picture is
    if mask is not None:
        mask = mask.convert("L").point([255 * (level >= _HALF) for level in range(256)])
        if mask.getbbox() is None:
            raise BadInput(f"--mask {request.mask} has no white, which is where the picture is made anew: paint some")
    return Pictures(
        fitted(request.init_image),
        mask,
        fitted(request.control),
        tuple(read_picture(path) for path in request.references),
    )


def _note_cut(request: Request, path: Path, picture: Image.Image, progress: Progress) -> None:
    if picture.width * request.height != picture.height * request.width:
        progress.note(
            f"{path.name} is {_text(picture.size)}: "
            f"its middle is cut out in the shape of {request.width}x{request.height}"
        )


Known = Mapping[PictureKind, Sequence[Mapping[str, Any]]]
"""What the files of pictures are known by: of each kind, in the order in which they are given."""


def known_files(request: Request) -> Known:
    """Size in bytes and SHA-256 of the files of a request's pictures.

    Raises:
        BadInput: if one cannot be read.
    """
    known: dict[PictureKind, list[Mapping[str, Any]]] = {}
    for kind, path in _files(request):
        try:
            found = fingerprint(path)
        except OSError as error:
            raise BadInput(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
        known.setdefault(kind, []).append({"bytes": found.bytes, "sha256": found.sha256})
    return known


def known_before(report: Mapping[str, Any]) -> Known:
    """The same of a run that is taken up, as its report says."""
    known: dict[PictureKind, list[Mapping[str, Any]]] = {}
    for picture in report.get("pictures", ()):
        own = {name: picture[name] for name in ("bytes", "sha256") if name in picture}
        known.setdefault(picture["kind"], []).append(own)
    return known


def _files(request: Request) -> list[tuple[PictureKind, Path]]:
    one: dict[PictureKind, Path | None] = {
        "start": request.init_image,
        "mask": request.mask,
        "control": request.control,
    }
    given: list[tuple[PictureKind, Path]] = [(kind, path) for kind, path in one.items() if path is not None]
    return [*given, *(("reference", path) for path in request.references)]


def told(
    request: Request, pictures: Pictures, start: tuple[int, int] | None, known: Known | None = None
) -> list[dict[str, Any]]:
    """Kind, file name, size in pixels and identity of each picture that an output is made from, for reports.

    Args:
        request: which files.
        pictures: that the pipeline is given.
        start: width and height of the picture that is redone, or None.
        known: what the files are known by.
    """
    one = {"start": pictures.start, "mask": pictures.mask, "control": pictures.control}
    sizes = {kind: picture.size for kind, picture in one.items() if picture is not None}
    if start is not None:
        sizes["start"] = start
    of_references = iter([picture.size for picture in pictures.references])
    identities = {kind: iter(ones) for kind, ones in (known or {}).items()}
    parts = []
    for kind, path in _files(request):
        identity = next(identities.get(kind, iter(())), {})
        size = next(of_references, None) if kind == "reference" else sizes.get(kind)
        if size is not None:
            parts.append({"kind": kind, "file": path.name, "width": size[0], "height": size[1], **identity})
    return parts


# ---- In files of a run


def tensors_of(pictures: Pictures) -> dict[str, torch.Tensor]:
    """Pixels as they are kept with a run: `[H, W, 3]`, of a mask `[H, W]`, 8 bits each."""
    import numpy as np
    import torch

    one = {name: getattr(pictures, kind) for kind, name in _PIXELS.items()}
    several = {f"{_REFERENCE_PIXELS}{number}": picture for number, picture in enumerate(pictures.references)}
    return {
        name: torch.from_numpy(np.array(picture, np.uint8))
        for name, picture in (one | several).items()
        if picture is not None
    }


def pictures_in(held: Mapping[str, torch.Tensor], request: Request) -> Pictures:
    """The pictures of a run again.

    Args:
        held: tensors of a file, those of `tensors_of` among them.
        request: whose pictures they are to be.

    Raises:
        ValueError: if they are not, each of its kind, number, type and size.
    """
    import torch
    from PIL import Image

    own = {name: tensor for name, tensor in held.items() if "_pixels" in name}
    names = [_PIXELS[kind] for kind in _PIXELS if kind in request.handed]
    names += [f"{_REFERENCE_PIXELS}{number}" for number in range(len(request.references))]
    if sorted(own) != sorted(names):
        raise ValueError(f"it holds {', '.join(sorted(own)) or 'no pictures'}, and not {', '.join(sorted(names))}")
    for name, tensor in own.items():
        channels = () if name == _PIXELS["mask"] else (3,)
        fits = tensor.dtype == torch.uint8 and tensor.ndim == 2 + len(channels) and tuple(tensor.shape[2:]) == channels
        height, width = tensor.shape[:2] if fits else (0, 0)
        if name.startswith(_REFERENCE_PIXELS):
            fits = request.model.size_multiple <= min(height, width) <= max(height, width) <= LARGEST_SIDE
            fits = fits and height * width <= MOST_PIXELS
        elif (height, width) != (request.height, request.width):
            fits = False
        if not fits:
            raise ValueError(f"its {name} are {list(tensor.shape)}, {tensor.dtype}, which is no such picture")
    images = {name: Image.fromarray(own[name].numpy()) for name in names}
    return Pictures(
        **{kind: images.get(name) for kind, name in _PIXELS.items()},  # pyright: ignore[reportArgumentType]
        references=tuple(images[name] for name in names if name.startswith(_REFERENCE_PIXELS)),
    )
