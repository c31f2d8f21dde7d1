"""Actors that load no model, for tests of what deals samples out to them; what they do stands in the prompt."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from grat_cli.errors import OutOfMemory
from grat_cli.generation.batch_folder import Batch
from grat_cli.generation.batch_layout import Sample
from grat_cli.generation.batch_worker import Failure, MadeElsewhere, MadeHere
from grat_cli.generation.cluster import About, Answer, Maker


class QuickMaker(Maker):
    """Makes nothing, and says that it did."""

    def load(self, batch: Batch, samples: Sequence[Sample], folder: str, threads: int | None) -> Answer:
        os.chdir(folder)
        return Answer("nothing", notes=("said once",))

    def make(self, key: str, sample: Sample, claim: Any) -> Answer:
        claim.require()
        self._progress.phase("denoise")
        what = sample.entry.prompt
        if "made before" in what:
            if sample.output.exists():
                return Answer(MadeElsewhere(sample))
            sample.report.write_text('{"schema": "grat.report/1"}')
            sample.output.write_text("made")
            os.kill(os.getpid(), signal.SIGKILL)
        if "deadly" in what:
            os.kill(os.getpid(), signal.SIGKILL)
        if "elsewhere" in what:
            return Answer()
        if "unforeseen" in what:
            return Answer(Failure(sample, "ValueError: nobody thought of that"))
        if "too large" in what:
            return Answer(error=OutOfMemory("the device has too little memory"))
        while "endless" in what:
            time.sleep(0.05)
            try:
                self._progress.step(1, 2)
            except KeyboardInterrupt:
                sample.output.with_suffix(".kept").write_text("")
                return Answer()
        return Answer(MadeHere(sample, {}))


class OtherMaker(Maker):
    """Of another version."""

    def about(self) -> About:
        return About("0.0.1", "elsewhere", 1)


class MakerWithoutModel(Maker):
    """Dies whenever it loads."""

    def load(self, batch: Batch, samples: Sequence[Sample], folder: str, threads: int | None) -> Answer:
        os.kill(os.getpid(), signal.SIGKILL)
        return Answer()
