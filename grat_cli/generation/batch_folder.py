"""A batch, and what is there of it: outputs are known again by what their reports say of the request."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from grat_cli.errors import BadInput
from grat_cli.files.fingerprint import fingerprint
from grat_cli.files.outputs import report_path, slug
from grat_cli.files.prompts import PromptEntry
from grat_cli.files.stores import LOCAL, Store
from grat_cli.generation.batch_layout import Layout, Sample, has_metadata
from grat_cli.generation.inputs import refuse_sizes
from grat_cli.generation.request import Request, check_pictures
from grat_cli.generation.sharing import Shard
from grat_cli.generation.stored import request_data, told_model
from grat_cli.models.lora import own_name

_NOT_SHOWN_OF_PRESETS = ("name", "description", "model", "kernel", "evidence")
# What says how an output is kept and told of, not what it shows.
_NOT_OF_THE_OUTPUT = ("command", "checkpoint_every", "preview_every", "save_latents", "text_cache")


@dataclass(frozen=True)
class Batch:
    """A batch, and how it is written.

    Attributes:
        file: of the prompts.
        layout: of its outputs.
        out: their folder.
        samples: all of them, those that are there already included.
        template: what is made of each prompt; prompt, negative prompt, seeds and outputs are replaced. Its `overwrite`
            says whether outputs of other requests may be replaced.
        shard: that this worker begins with; None of one that works alone.
        store: that takes the outputs.
    """

    file: Path
    layout: Layout
    out: Path
    samples: Sequence[Sample]
    template: Request
    shard: Shard | None = None
    store: Store = LOCAL

    @property
    def unfinished(self) -> Path:
        """Where outputs are made, with all that is kept of one until it is written, and moved to their place whole."""
        return self.store.unfinished(self.out)

    @property
    def overwrite(self) -> bool:
        """Whether outputs of other requests may be replaced."""
        return self.template.overwrite

    @cached_property
    def loras(self) -> dict[str, Any]:
        """What every sample says of the LoRAs that it is made with; nothing without any, as earlier versions."""
        told = [
            {
                "name": own_name(lora),
                "scale": lora.scale,
                "noise": lora.noise,
                "sha256": fingerprint(Path(lora.source)).sha256 if lora.kind == "file" else None,
            }
            for lora in self.template.weights.loras
        ]
        return _loras_told(told)

    def told(self, sample: Sample) -> dict[str, Any]:
        """What the report of a sample says of the batch: its place in the file, and all that stands there."""
        return {
            "file": self.file.name,
            "place": sample.entry.place,
            "sample": sample.index,
            "layout": self.layout.name,
            "item": _told_item(sample.entry),
        }


def request_of(template: Request, sample: Sample) -> Request:
    """The request of one sample."""
    prompt, negative, seed = sample.asked
    told = {"prompt": prompt, "negative_prompt": negative, "seeds": (seed,), "outputs": (sample.output,)}
    return replace(template, **told, **pictures_of(sample.entry))


def _told_item(entry: PromptEntry) -> dict[str, Any]:
    """What stands in the file, with the names of pictures alone."""
    names = {
        kind: [path.name for path in paths] if isinstance(entry.item.get(kind), list) else paths[0].name
        for kind, paths in entry.pictures.items()
        if paths
    }
    return {**entry.item, **names}


def pictures_of(entry: PromptEntry) -> dict[str, Any]:
    """The pictures of an entry, as requests take them."""
    one = {name: next(iter(entry.pictures.get(name, ())), None) for name in ("init_image", "mask", "control")}
    return {**one, "references": entry.pictures.get("reference", ())}


def refuse_pictures(batch: Batch) -> None:
    """Makes sure, before anything is loaded, that a model takes the pictures of each sample, and that they are there.

    Raises:
        BadInput: if not, with the place of the entry.
    """
    for sample in {sample.entry.place: sample for sample in batch.samples}.values():
        request = request_of(batch.template, sample)
        try:
            check_pictures(request)
            refuse_sizes(request)
        except BadInput as error:
            raise BadInput(f"{batch.file}, {sample.entry.place}: {error}") from error


def work_name(request: Request) -> str:
    """A name that an output has while it is made, the same whenever the same is asked for."""
    data = {name: value for name, value in request_data(request).items() if name not in _NOT_OF_THE_OUTPUT}
    data["device"] = request.device.partition(":")[0]  # any of its kind goes on
    digest = sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
    return f"{slug(request.prompt)}-s{request.seeds[0]}-{digest}{request.outputs[0].suffix}"


def _is_there(batch: Batch, sample: Sample) -> bool:
    """Whether a sample is at its place, whole, and of the same request.

    Raises:
        BadInput: if something else is, and may not be overwritten.
    """
    metadata, overwrite, store = sample.metadata, batch.overwrite, batch.store
    if metadata is not None and not overwrite and store.exists(metadata) and not has_metadata(sample, store):
        raise BadInput(
            f"{store.shown(metadata)} is of another prompt than {sample.entry.place} of {batch.file}: "
            "use another --out, or --overwrite"
        )
    if not store.exists(sample.output):
        return False
    asked, found = _facts_asked(batch, sample), _facts_at(batch, sample.report)
    if found == asked:
        return True
    if not overwrite:
        if found is None:
            raise BadInput(f"{store.shown(sample.output)} exists and has no report: use another --out, or --overwrite")
        told, wanted = json.loads(found), json.loads(asked)
        others = ", ".join(name for name in wanted if wanted[name] != told.get(name))
        raise BadInput(
            f"{store.shown(sample.output)} was made with other options ({others}): "
            "to go on, give the same as then; or another --out, or --overwrite"
        )
    return False


class Folder:
    """What is there of a batch, as far as has been looked.

    Of the plain layout, whose names hold a time, an output is known by its report, of which each is read once.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch, self._by_reports = batch, batch.layout.name == "plain"
        self._read: set[Path] = set()
        self._outputs: dict[str, list[Path]] = {}
        self._has_looked = False

    def look(self) -> None:
        """Reads the reports that came since."""
        store, self._has_looked = self._batch.store, True
        store.look(self._batch.out)
        if not self._by_reports:
            return
        suffix = self._batch.samples[0].output.suffix
        new = set(store.matching(self._batch.out, "grat-*.json")) - self._read
        for path, report in store.reports(sorted(new)):
            if (facts := _facts_found(report)) is not None:
                self._read.add(path)
                self._outputs.setdefault(facts, []).append(path.with_name(path.stem + suffix))

    def find(self, sample: Sample) -> Sample | None:
        """The sample as it is to be made, None if it is there; one whose output is lost keeps its name.

        Raises:
            BadInput: if something else is in its way, and may not be overwritten.
        """
        if not self._has_looked:
            self.look()
        if not self._by_reports:
            return None if _is_there(self._batch, sample) else sample
        outputs = self._outputs.get(_facts_asked(self._batch, sample), ())
        if any(self._batch.store.exists(output) for output in outputs):
            return None
        return replace(sample, output=outputs[-1], report=report_path(outputs[-1])) if outputs else sample


def key_of(batch: Batch, sample: Sample) -> str:
    """A name of a sample that is the same for all workers, whatever each calls its output."""
    place = str(sample.output.relative_to(batch.out)) if batch.layout.name != "plain" else sample.output.suffix
    return sha256(json.dumps([_facts_asked(batch, sample), place]).encode()).hexdigest()[:32]


def is_told_of(batch: Batch, sample: Sample) -> bool:
    """Whether the report at a sample's place is of that very sample."""
    return _facts_at(batch, sample.report) == _facts_asked(batch, sample)


def _facts_asked(batch: Batch, sample: Sample) -> str:
    """All that decides what a sample shows, as JSON; device, dtype and kernels do not, but for rounding."""
    request = request_of(batch.template, sample)
    facts = {
        "prompt": request.prompt,
        "negative prompt": request.negative_prompt,
        "seed": sample.seed,
        "size": [request.width, request.height],
        "model": told_model(request.model)["source"],
        **batch.loras,
        "quantization": [request.weights.quantize, request.weights.cast],
        "text encoder": request.weights.text_encoder and Path(request.weights.text_encoder).name,
        "pictures": [path.name for files in sample.entry.pictures.values() for path in files],
        **_facts_of_preset(request.preset.model_dump(mode="json")),
    }
    if request.frames:
        facts["size"] += [request.frames]
        facts["frame rate"] = request.fps
    return json.dumps(facts)


def _loras_told(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """LoRAs of a report by what tells them apart: files by what they hold, those of the hub by their names."""
    known = [
        [lora["name"], lora["scale"], lora["noise"], None if "/" in lora["name"] else lora["sha256"]] for lora in told
    ]
    return {"LoRAs": known} if known else {}


def _facts_at(batch: Batch, path: Path) -> str | None:
    """The same of a report that is at its place; None where there is none, or another kind of file."""
    return next((_facts_found(report) for _, report in batch.store.reports([path])), None)


def _facts_found(told: Mapping[str, Any]) -> str | None:
    """The same as a report tells it; None of another kind of file."""
    try:
        facts = {
            "prompt": told["prompt"],
            "negative prompt": told["negative_prompt"],
            "seed": told["seed"],
            "size": [told["width"], told["height"]],
            "model": told["model"]["source"],
            **_loras_told(told["model"].get("loras", ())),
            "quantization": [told["device"]["quantize"], told["device"].get("cast", "none")],
            "text encoder": told["model"].get("text_encoder"),
            "pictures": [picture["file"] for picture in told.get("pictures", ())],
            **_facts_of_preset(told["preset"]),
        }
        if "frames" in told:
            facts["size"] += [told["frames"]]
            facts["frame rate"] = told["fps"]
    except (KeyError, TypeError, AttributeError):
        return None
    return json.dumps(facts)


def _facts_of_preset(preset: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in preset.items() if name not in _NOT_SHOWN_OF_PRESETS}
