"""What is read of reports, which somebody else may have written: each field that is used, of its type, within bounds.

A report that is gone on with needs less than one that is shown, so there are two models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from grat_cli.attention.schedule import STEP_KINDS, StepKind
from grat_cli.files import videos
from grat_cli.files.prompts import LARGEST_SEED
from grat_cli.models.lora import MOST_LORAS
from grat_cli.models.parallel import MOST_RANKS
from grat_cli.models.resolution import LARGEST_SIDE
from grat_cli.models.video_size import MOST_FRAMES
from grat_cli.presets import MOST_STEPS, Preset

MOST_REFERENCES, MOST_STAGES, MOST_THREADS = 100, 100, 4096
Text = Annotated[str, Field(max_length=1_000_000)]
Line = Annotated[str, Field(max_length=4096)]
PathText = Annotated[str, Field(min_length=1, max_length=4096)]
Name = Annotated[str, Field(max_length=80)]
Ranges = Annotated[str, Field(max_length=10_000, pattern=r"^[0-9, -]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Frames = Annotated[int, Field(ge=1, le=MOST_FRAMES)]
Rate = Annotated[int, Field(ge=1, le=videos.FASTEST)]
Bytes = Annotated[int, Field(ge=0, le=2**63)]
Number = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
Time = Annotated[Number, Field(ge=0)]  # in milliseconds
Density = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Phases = Annotated[dict[Name, Time], Field(max_length=1000)]


class Told(BaseModel):
    """Part of a report; what else stands there is left as it is."""

    model_config = ConfigDict(strict=True)


class ToldLowest(Told):
    """What the layer kept that kept least under the guard, and when."""

    step: Count
    layer: Count
    kept: Number


class ToldWidening(Told):
    """A layer that went wider under the guard."""

    step: Count
    layer: Count
    to: Line


class ToldCarried(Told):
    """The reference to which layers would have carried least, and how much of what was computed then."""

    step: Count
    section: Count
    kept: Number


class ToldDoubling(Told):
    """References that came twice as often under the guard."""

    step: Count
    section: Count
    references: Annotated[tuple[Count, ...], Field(max_length=MOST_STEPS)]


class ToldGuard(Told):
    """What the guard of a run or stage did."""

    bar: Number
    layers: Count
    planned_density: Number | None
    lowest: ToldLowest | None
    widened: Annotated[tuple[ToldWidening, ...], Field(max_length=MOST_STEPS)]
    least_carried: ToldCarried | None = None
    doubled: Annotated[tuple[ToldDoubling, ...], Field(max_length=MOST_STEPS)] = ()

    @model_validator(mode="after")
    def _check_wholeness(self) -> ToldGuard:
        if (self.lowest or self.least_carried) is not None and self.planned_density is None:
            raise ValueError("a guard that judged layers knows the density that was planned")
        if self.doubled and self.least_carried is None:
            raise ValueError("a guard that made references come more often knows why")
        return self


class ToldAlike(Told):
    """Steps in which a cache had the same layers computed."""

    steps: Ranges
    count: Count
    computed: Annotated[tuple[Ranges, ...], Field(max_length=16)] | None


class ToldCache(Told):
    """What the cache of a run or stage did."""

    kind: Name
    skipped: Name
    layers: Count
    planned_density: Number
    steps: Annotated[tuple[ToldAlike, ...], Field(max_length=MOST_STEPS)]


class ToldOfKind(Told):
    """Steps of a kind, where attention is carried over steps."""

    kind: StepKind
    steps: Ranges
    count: Count


class ToldOverSteps(Told):
    """What was carried over the steps of a run or stage."""

    steps: Annotated[tuple[ToldOfKind, ...], Field(max_length=len(STEP_KINDS))]
    layers: Ranges | None
    kept_bytes: Bytes | None = None
    foretold_bytes: Bytes | None = None


class ToldStage(Told):
    """A stage that is done or under way."""

    number: Count
    width: Side
    height: Side
    steps: Count
    density: Number
    guard: ToldGuard | None = None
    cache: ToldCache | None = None
    over_steps: ToldOverSteps | None = None


class ToldStep(Told):
    """A `StepTiming`."""

    index: Count
    total_ms: Time
    attention_ms: Time
    density: Number
    stage: Annotated[int, Field(ge=0, le=MOST_STAGES)] = 0
    over_steps: StepKind | None = None


class ToldRank(Told):
    """What one of several ranks took; see `world.World.told`."""

    rank: Count
    total_ms: Time
    attention_ms: Time
    exchange_ms: Time
    waiting_ms: Time
    bytes_per_step: Bytes


class ToldRanks(Told):
    """How ranks shared an output, and once it is done what each took."""

    count: Annotated[int, Field(ge=1, le=MOST_RANKS)]
    cp: Annotated[int, Field(ge=1, le=MOST_RANKS)]
    cfg: Annotated[int, Field(ge=1, le=2)]
    reason: Line
    each: Annotated[tuple[ToldRank, ...], Field(max_length=MOST_RANKS)] = ()
    foretold: Annotated[dict[Name, Number], Field(max_length=10)] = {}


class ToldSampling(Told):
    """How an output was sampled."""

    steps: Count
    guidance: Number | None
    shift: Number


class ToldLora(Told):
    """A LoRA that an output was made with."""

    name: PathText
    scale: Number
    noise: Name
    fused: bool
    sha256: Sha256


class ToldModel(Told):
    """Which model made an output."""

    name: Line
    source: Line
    revision: Line | None = None
    loras: Annotated[tuple[ToldLora, ...], Field(max_length=MOST_LORAS)] = ()


class ToldDevice(Told):
    """What made an output."""

    name: Line
    model: Line
    dtype: Line


class ToldBackend(Told):
    """How attention was computed."""

    used: Line
    reason: Line


class ToldPicture(Told):
    """A picture that an output was made from."""

    kind: Line
    file: Line
    width: Side
    height: Side


class ToldVersions(Told):
    """Of what made an output."""

    grat: Line


class ShownReport(Told):
    """A report as it is shown: beside an output, in part within it, or of latents and checkpoints."""

    created: Line
    command: Text
    prompt: Text
    negative_prompt: Text | None = None
    seed: Seed
    width: Side
    height: Side
    frames: Frames | None = None
    fps: Annotated[float, Field(gt=0, le=videos.FASTEST)] | None = None
    seconds: Time | None = None
    init_image: Line | None = None
    strength: Number | None = None
    pictures: Annotated[tuple[ToldPicture, ...], Field(max_length=MOST_REFERENCES + 3)] = ()
    preset: Preset
    model: ToldModel
    sampling: ToldSampling
    density: Number
    ideal_speedup: Number | None
    guard: ToldGuard | None = None
    cache: ToldCache | None = None
    over_steps: ToldOverSteps | None = None
    ranks: ToldRanks | None = None
    backend: ToldBackend
    device: ToldDevice
    versions: ToldVersions
    stages: Annotated[tuple[ToldStage, ...], Field(max_length=MOST_STAGES)] = ()
    steps: Annotated[tuple[ToldStep, ...], Field(max_length=MOST_STEPS)] | None = None
    phases: Phases | None = None
    peak_memory_bytes: Bytes | None = None
    peak_memory_kind: Line | None = None
    steps_done: Count | None = None
    steps_total: Count | None = None

    @model_validator(mode="after")
    def _check_wholeness(self) -> ShownReport:
        for names in (("frames", "fps", "seconds"), ("steps", "phases"), ("peak_memory_bytes", "peak_memory_kind")):
            told = [name for name in names if getattr(self, name) is not None]
            # Of a run that is under way nothing is said of memory but how it is measured.
            if told and len(told) < len(names) and told != ["peak_memory_kind"]:
                raise ValueError(f"{' and '.join(told)} without the rest of {', '.join(names)}")
        return self


class KeptDevice(Told):
    """What of a device decides how a run goes on."""

    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None


class KeptLora(Told):
    """What says which LoRA it was."""

    name: PathText
    sha256: Sha256


class KeptFile(Told):
    """What says which file weights were read from."""

    part: Annotated[str, Field(pattern=r"^[a-z][a-z_0-9]{0,40}$")]
    name: Annotated[str, Field(max_length=255)]
    sha256: Sha256


class KeptWeights(Told):
    """What of a model decides how a run goes on."""

    revision: Line | None
    weights: Annotated[tuple[KeptFile, ...], Field(max_length=1000)] = ()
    loras: Annotated[tuple[KeptLora, ...], Field(max_length=MOST_LORAS)] = ()


class KeptPicture(Told):
    """What says which picture an output is made from."""

    kind: Literal["start", "mask", "control", "reference"]
    file: PathText
    bytes: Bytes | None = None
    sha256: Sha256 | None = None


class KeptReport(Told):
    """What of a report decides how a run goes on, or is told when it is done."""

    seed: Seed
    prompt: Text
    device: KeptDevice
    model: KeptWeights
    sampling: dict[str, Any]
    density: Number
    guard: ToldGuard | None
    cache: ToldCache | None = None
    over_steps: ToldOverSteps | None = None
    ranks: ToldRanks | None = None
    peak_memory_kind: Line
    pictures: Annotated[tuple[KeptPicture, ...], Field(max_length=MOST_REFERENCES + 3)] = ()
