"""What is asked for: pictures and videos alike, whole enough to be kept in a file and gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from grat_cli.errors import BadInput
from grat_cli.families import Family, ModelChoice, family_of
from grat_cli.families.base import NO_PICTURES, PictureKind
from grat_cli.models.picture_kinds import refuse_pictures
from grat_cli.models.weights import AS_THEY_ARE, Weights
from grat_cli.presets import Preset
from grat_kernels import Grid

if TYPE_CHECKING:
    from typing_extensions import NotRequired


class Size(TypedDict):
    """In pixels and frames, as `grat_cli.install` takes it."""

    height: int
    width: int
    num_frames: NotRequired[int]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to make.

    Attributes:
        prompt: what the output shows.
        preset: attention, schedule, kernel and sampling.
        model: of `catalogue.choose_model`.
        width: in pixels.
        height: in pixels.
        frames: of a video; None for pictures.
        fps: frames per second of a video; None for pictures.
        seeds: one output is made for each.
        negative_prompt: what to steer away from, or None.
        init_image: picture to start from, or None for noise; of a video its first frame.
        mask: picture that is white where `init_image` is made anew, or None for all of it.
        control: picture of edges, depth or the like that the output follows, or None.
        references: pictures that the output refers to.
        strength: share of the steps that are run on `init_image`: 1 leaves nothing of it. None for 0.7, with a mask
            for 1, or on the high-resolution path for the preset's.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        offload: one of `offloading.OFFLOADS`.
        weights: how they come.
        compile: whether the transformer's blocks are compiled; see `compiling`.
        outputs: file, or folder of frames, of each seed's output; all in one folder. Empty where none is written.
        overwrite: whether existing files may be replaced; it is typed, and never read from a file.
        format: of the outputs, one of `pictures.FORMATS` or `videos.FORMATS`.
        quality: of the encoder, by the format's own scale; None for its own choice.
        metadata: whether an output says how it was made.
        save_latents: whether the latents are kept beside the output.
        checkpoint_every: steps between checkpoints; 0 for none, None for one about every two minutes.
        preview_every: steps between previews; 0 for none.
        text_cache: whether embeddings of the prompt are read from the cache of texts, and kept there.
        command: the command line as typed, for the report.
    """

    prompt: str
    preset: Preset
    model: ModelChoice
    width: int
    height: int
    frames: int | None = None
    fps: int | None = None
    seeds: tuple[int, ...] = ()
    negative_prompt: str | None = None
    init_image: Path | None = None
    mask: Path | None = None
    control: Path | None = None
    references: tuple[Path, ...] = ()
    strength: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    weights: Weights = AS_THEY_ARE
    compile: bool = False
    outputs: tuple[Path, ...] = ()
    overwrite: bool = False
    format: str = ""
    quality: int | None = None
    metadata: bool = True
    save_latents: bool = False
    checkpoint_every: int | None = None
    preview_every: int = 0
    text_cache: bool = True
    command: str = ""

    @property
    def family(self) -> Family:
        """Of the model."""
        return family_of(self.model)

    @property
    def kinds(self) -> frozenset[PictureKind]:
        """Of the pictures that an output is made from."""
        given: dict[PictureKind, bool] = {
            "start": self.init_image is not None,
            "mask": self.mask is not None,
            "control": self.control is not None,
            "reference": bool(self.references),
        }
        return frozenset(kind for kind, is_there in given.items() if is_there)

    @property
    def handed(self) -> frozenset[PictureKind]:
        """Of those that the pipeline is given as they are: all, but for a picture that is redone from its latents."""
        redone = self.kinds == {"start"} and self.model.redoes(self.kinds)
        return NO_PICTURES if redone else self.kinds

    @property
    def grid(self) -> Grid:
        """Image tokens of an output."""
        return self.model.grid(self.width, self.height, self.frames)

    @property
    def size(self) -> str:
        """For example `1024x1024`, or of a video `1280x720x129`."""
        return "x".join(str(number) for number in (self.width, self.height, self.frames) if number is not None)

    @property
    def title(self) -> str:
        """The size, for people."""
        frames = f", {self.frames} frames" if self.frames else ""
        return f"{self.width}x{self.height} pixels{frames}"

    @property
    def installed_size(self) -> Size:
        """The size, as `grat_cli.install` takes it."""
        size: Size = {"height": self.height, "width": self.width}
        return {**size, "num_frames": self.frames} if self.frames else size


class Progress(Protocol):
    """Told how a run goes on."""

    def phase(self, name: str) -> None:
        """A phase begins: load, text, denoise, decode or save."""
        ...

    def step(self, done: int, total: int) -> None:
        """So many denoising steps have been issued; those of an earlier process count."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing, in one sentence."""
        ...


class WritingProgress(Progress, Protocol):
    """Told of files as well."""

    def written(self, count: int) -> None:
        """So many bytes of the output are written."""
        ...

    def work(self, text: str) -> None:
        """What of the step that is told next was computed, in a few words, where a cache takes over the rest."""
        ...


def request_for(
    model: ModelChoice,
    preset: Preset,
    prompt: str,
    *,
    width: int | None = None,
    height: int | None = None,
    frames: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    weights: Weights = AS_THEY_ARE,
) -> Request:
    """A request for one output of a model, with seeds and files left open; sizes are by default those of its training.

    Raises:
        BadInput: if the model cannot make outputs of that size, or none without pictures, or frames are given for a
            model of images.
    """
    traits = model.video
    if frames is not None and not traits:
        raise BadInput(f"{model.name} makes images: leave out frames")
    request = Request(
        prompt=prompt,
        preset=preset,
        model=model,
        width=width or (traits.width if traits else model.native_side),
        height=height or (traits.height if traits else model.native_side),
        frames=(frames or traits.frames) if traits else None,
        fps=traits.fps if traits else None,
        device=device,
        dtype=dtype,
        weights=weights,
    )
    check_size(request)
    check_pictures(request)
    return request


def check(request: Request) -> None:
    """Raises BadInput unless the model can make such outputs, and there is a place for each."""
    check_size(request)
    if request.strength is not None and not 0.0 < request.strength <= 1.0:
        raise BadInput(f"strength must lie above 0 and at most at 1, not {request.strength}")
    check_pictures(request)
    if request.outputs and len(request.outputs) != len(request.seeds):
        raise BadInput(f"{len(request.seeds)} seeds need as many outputs, not {len(request.outputs)}")
    if (request.checkpoint_every or 0) < 0:
        raise BadInput(f"steps between checkpoints must be 0 or more, not {request.checkpoint_every}")


def check_pictures(request: Request) -> None:
    """Raises BadInput unless the model takes such pictures as are given, and is given those that it needs."""
    refuse_pictures(
        request.model,
        request.kinds,
        references=len(request.references),
        strength=request.strength,
        negative_prompt=request.negative_prompt,
    )


def check_size(request: Request) -> None:
    """Raises BadInput unless the model can make outputs of this width, height and number of frames."""
    unit = request.model.size_multiple
    if request.width % unit or request.height % unit or min(request.width, request.height) < unit:
        raise BadInput(
            f"width and height must be multiples of {unit}, not {request.width}x{request.height}: "
            f"the nearest is {_nearest(request.width, unit)}x{_nearest(request.height, unit)}"
        )
    if request.frames is None:
        return
    unit = request.model.require_video().frames_per_latent
    if request.frames < 1 or (request.frames - 1) % unit:
        lower = max(0, (request.frames - 1) // unit) * unit + 1
        raise BadInput(
            f"the frames of a video must be a multiple of {unit} and one more, not {request.frames}: "
            f"use {lower} or {lower + unit}"
        )
    if request.fps is None or request.fps < 1:
        raise BadInput(f"frames per second must be 1 or more, not {request.fps}")


def note_expectations(request: Request, progress: Progress) -> None:
    """Says beforehand what a model cannot do."""
    model, preset = request.model, request.preset
    if model.is_demo:
        from grat_cli.demo import unknown_words

        known = request.family.vocabulary()
        if unknown := unknown_words(request.prompt, dict(known)):
            does = "shows" if request.frames else "draws"
            subjects = ", ".join(known["subjects"])
            progress.note(f"the demo model does not know {', '.join(unknown)}; it {does} {subjects}")
    if model.largest_pixels and request.width * request.height > model.largest_pixels:
        side = int(model.largest_pixels**0.5)
        progress.note(
            f"{model.name} is made for pictures of up to {side}x{side}: larger ones repeat and blur with any attention"
        )
    from grat_cli.estimates.stages import FAIR_AREA, uses_highres

    if request.compile:
        from grat_cli.models.compiling import expectation

        outputs = max(1, len(request.seeds))
        progress.note(expectation(request.grid.tokens * preset.sampling.steps * outputs))
    if request.handed and uses_highres(preset, model, request.width, request.height):
        progress.note(
            f"{request.size} is made in one stage, not from a smaller picture: the given ones say what is where"
        )
        return
    from_noise = request.init_image is None and preset.highres is not None and preset.highres.mode != "cascade"
    if request.family.stages and from_noise and request.width * request.height > FAIR_AREA * model.native_side**2:
        side = model.native_side
        progress.note(
            f"{model.name} was trained at about {side}x{side}: much larger pictures from noise repeat and blur "
            "with any attention; leave --highres to its default, or start from a picture with --init-image"
        )


def _nearest(size: int, unit: int) -> int:
    return max(unit, round(size / unit) * unit)
