"""A batch on a Ray cluster: an actor per GPU that has loaded the model once, and this process, which deals out samples.

What an actor does with a sample is what every worker of a shared batch does (`batch_worker`); the claim on it is this
process's, and ends when its actor has died, so that nothing is made twice. Imported where it is used: it imports Ray.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

# Read when Ray is imported: what it prints on stdout itself, such as that an actor has died, is told here in one line.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

import ray
from ray import exceptions

from grat_cli import __version__
from grat_cli.console.progress import PHASE_WORDS, ProgressDisplay
from grat_cli.console.worker_table import GONE, WorkerRow
from grat_cli.errors import BadInput, GratError, first_line
from grat_cli.files.claims import Claim, ClaimLost
from grat_cli.generation.batch_folder import Batch
from grat_cli.generation.batch_layout import Sample
from grat_cli.generation.batch_worker import Failure, MadeElsewhere, MadeHere, Result, SaidOnce, Sharing, Worker
from grat_cli.generation.dealing import MOST_DEATHS, Deal
from grat_cli.generation.sharing import Shard

HERE = "local"
"""`--ray` for the GPUs of this machine, without a cluster."""

_ALONE = Shard(1, 1)  # this process hands everything out
_POLL_S, _STATE_S, _ROOM_S = 0.5, 1.0, 5.0
_PATIENCE_S = 15.0  # until a note says that no worker has begun, and for workers to keep what they have begun
_ANSWER_S = 10.0  # for a cluster's port
_MOST_FAILED_STARTS = 3
_MOST_ASKED = 64  # what they are at: more than a terminal shows
_OBJECT_STORE_BYTES = 128 << 20  # of a Ray of our own: all that goes through it are requests and reports
_ASIDE = "told"  # the concurrency group of what an actor answers while it makes a sample


@dataclass(frozen=True)
class About:
    """What an actor is.

    Attributes:
        version: of grat there.
        machine: by the name that it has itself.
        process: its number there.
    """

    version: str
    machine: str
    process: int


@dataclass(frozen=True)
class Answer:
    """What came of a call.

    Attributes:
        value: a result, the name of the device, or None where another process goes on with the sample.
        error: that ends the batch.
        notes: for the user.
    """

    value: Any = None
    error: GratError | None = None
    notes: tuple[str, ...] = ()


class Maker:
    """The actor. Its methods run in one thread, but for `doing` and `stop`, which are called meanwhile."""

    def __init__(self) -> None:
        self._progress = _Doing()

    def about(self) -> About:
        """What tells whether it can be sent anything else."""
        return About(__version__, platform.node(), os.getpid())

    def load(self, batch: Batch, samples: Sequence[Sample], folder: str, threads: int | None) -> Answer:
        """Loads the model and encodes all prompts; the answer's value is the name of the device.

        Args:
            batch: whose samples are made.
            samples: those that are missing.
            folder: that relative paths lead from.
            threads: on the CPU; None where a GPU does the work.
        """
        import torch

        from grat_cli.models.devices import choose_device, device_name

        try:
            os.chdir(folder)
            if batch.store.has_claims:
                os.listdir(batch.out)
        except OSError:
            if batch.store.has_claims:
                return Answer(error=_unseen(batch, platform.node()))
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            self._sharing = Sharing(batch, _ALONE, ()) if batch.store.has_claims else None
            self._worker = Worker(batch, samples, SaidOnce(self._progress))
        except GratError as error:
            return self._answer(error=error)
        return self._answer(device_name(choose_device(batch.template.device)))

    def make(self, key: str, sample: Sample, claim: Claim | None) -> Answer:
        """Makes a sample; what goes wrong with it alone is its result.

        Args:
            key: name of the sample.
            sample: to make.
            claim: on it, where its store has such.

        Raises:
            torch.AcceleratorError: after which this process cannot use its device any more.
        """
        import torch

        try:
            if self._sharing is None or claim is None:
                return self._answer(self._worker.make_unclaimed(sample))
            return self._answer(self._sharing.tried(self._worker, key, sample, claim))
        except (ClaimLost, KeyboardInterrupt):
            return self._answer()
        except GratError as error:
            return self._answer(error=error)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            return self._answer(Failure(sample, f"{type(error).__name__}: {first_line(error)}"))

    def doing(self) -> str:
        """What it is at, in a few words."""
        return self._progress.text

    def stop(self) -> None:
        """Breaks off what it makes, as Ctrl-C does: what can be gone on with is kept."""
        self._progress.is_over = True

    def _answer(self, value: Any = None, error: GratError | None = None) -> Answer:
        return Answer(value, error, self._progress.taken_notes())


class _Doing(ProgressDisplay):
    """Keeps what an actor is at for whoever asks."""

    def __init__(self) -> None:
        self.text, self.is_over, self._notes = "", False, list[str]()

    def phase(self, name: str) -> None:
        self._tell(PHASE_WORDS.get(name, name))

    def step(self, done: int, total: int) -> None:
        self._tell(f"step {done}/{total}")

    def written(self, count: int) -> None:
        self._tell(f"{count / 2**20:.0f} MiB written")

    def note(self, text: str) -> None:
        self._notes.append(text)

    def taken_notes(self) -> tuple[str, ...]:
        notes, self._notes, self.text = tuple(self._notes), [], ""
        return notes

    def _tell(self, text: str) -> None:
        if self.is_over:
            raise KeyboardInterrupt
        self.text = text


@dataclass
class _Hired:
    """An actor, as this process knows it."""

    number: int
    actor: Any
    row: WorkerRow
    is_ready: bool = False
    began_s: float = 0.0  # with what it makes now
    asked_s: float = 0.0  # what it is at
    is_asked: bool = False


@dataclass(frozen=True)
class _Call:
    """A call whose answer is to come: `about`, `load`, `doing`, or `make` with the name of what is made."""

    hired: _Hired
    method: str
    name: str = ""


class Cluster:
    """The workers of a cluster.

    Attributes:
        most: workers; None for as many as there is room for.
        device: `cuda`, `cpu`, or `auto` for GPUs where there are any.
        workers: that there are or were, as last heard of.
    """

    def __init__(self, address: str, most: int | None = None, device: str = "auto") -> None:
        """Connects to nothing yet.

        Args:
            address: of the cluster, as `ray.init` takes it; `local` for the GPUs or cores of this machine.
            most: as in the attributes.
            device: likewise.
        """
        self._address, self.most, self.device = address, most, device
        self.workers: list[WorkerRow] = []

    @property
    def is_here(self) -> bool:
        """Whether it is this machine alone."""
        return self._address == HERE

    def results(self, batch: Batch, samples: Sequence[Sample], progress: ProgressDisplay) -> Generator[Result]:
        """What came of each sample, as it comes. Errors are those of `make_samples`."""
        progress.phase("workers")
        with _connected(self._address):
            driver = _Driver(batch, samples, progress, self)
            try:
                yield from driver.results()
            except KeyboardInterrupt:
                driver.stop()
                raise
            finally:
                driver.dismiss()


class _Driver:
    """Hires actors and deals samples out to them."""

    def __init__(
        self,
        batch: Batch,
        samples: Sequence[Sample],
        progress: ProgressDisplay,
        cluster: Cluster,
    ) -> None:
        most, rows = cluster.most, cluster.workers
        self._batch, self._progress, self._most, self._rows = batch, SaidOnce(progress), most, rows
        self._display, self._total = progress, len(samples)
        self._sharing = Sharing(batch, _ALONE, samples)
        self._deal = Deal(self._sharing.left)
        self._claims: dict[str, Claim] = {}
        self._hired: dict[int, _Hired] = {}
        self._calls: dict[Any, _Call] = {}
        self._failed_starts = 0
        self._kind, self._room, self._looked_s = _resource(cluster.device), 1, 0.0
        # CPU threads of a worker: those of this machine are shared out; on a cluster any core may be alone.
        cores = int(ray.cluster_resources().get("CPU", 1)) if cluster.is_here else 1
        self._threads = max(1, cores // min(most or cores, len(samples))) if self._kind == "CPU" else None
        self._began_s, self._has_begun = time.monotonic(), False
        self._sent = ray.put(batch), ray.put(tuple(samples))

    def results(self) -> Iterator[Result]:
        """What came of each sample."""
        while self._deal:
            self._hire()
            yield from self._deal_out()
            for call in self._answered():
                result = self._heard(call)
                if result is not None:
                    yield result
            self._show()

    def stop(self) -> None:
        """Has what was begun kept, if that does not take long."""
        self._progress.note("the workers keep what they have begun; Ctrl-C again ends them at once")
        for hired in self._hired.values():
            hired.actor.stop.options(concurrency_group=_ASIDE).remote()
        made = [reference for reference, call in self._calls.items() if call.method == "make"]
        with suppress(exceptions.RayError, ValueError):  # where there is nothing to wait for
            ray.wait(made, num_returns=len(made), timeout=_PATIENCE_S)

    def dismiss(self) -> None:
        """Ends all actors, and the claims on what they had."""
        for hired in self._hired.values():
            ray.kill(hired.actor)
            hired.row.doing = ""
        for name in tuple(self._claims):
            self._let_go(name)

    def _hire(self) -> None:
        """Starts actors, as many as there is room and work for."""
        now = time.monotonic()
        if now - self._looked_s >= _ROOM_S:
            self._room = int(ray.cluster_resources().get(self._kind, 0)) // (self._threads or 1)
            self._looked_s = now
        left = self._deal.waiting + sum(len(self._deal.hands(number)) for number in self._hired)
        wanted = min(max(1, self._room), left, self._most or left)
        while len(self._hired) < wanted:
            number = len(self._rows) + 1
            takes: dict[str, Any] = {"num_cpus": self._threads or 0, "num_gpus": 0 if self._threads else 1}
            asked: Any = ray.remote(concurrency_groups={_ASIDE: 1}, **takes)  # pyright: ignore[reportCallIssue]
            actor = asked(Maker).remote()
            hired = _Hired(number, actor, WorkerRow(number, doing="starting"))
            self._rows.append(hired.row)
            self._hired[number] = hired
            self._ask(hired, "about")
        if not self._has_begun and now - self._began_s > _PATIENCE_S and not any(row.machine for row in self._rows):
            self._progress.note("no worker has begun yet: the cluster has no room for one, or is slow to start it")

    def _deal_out(self) -> Iterator[Result]:
        """Gives workers what they need, as far as others do not make it."""
        elsewhere, taken = 0, list[tuple[int, str]]()
        while elsewhere < self._deal.waiting and (number := self._deal.neediest()) is not None:
            name = self._deal.next()
            if self._deal.deaths(name) >= MOST_DEATHS:
                yield Failure(self._sharing.left[name], f"{MOST_DEATHS} workers died while they made it")
            elif (claim := self._sharing.claims.take(name)) is None:
                elsewhere += 1
                self._deal.back(name)
            else:
                self._claims[name] = claim
                self._deal.give(number, name)
                taken.append((number, name))
        if elsewhere and elsewhere == self._deal.waiting and not self._claims:
            self._display.waiting(elsewhere)
        # Once for all that are claimed: in a large folder it takes a while. Nobody else fills an address.
        if taken and self._batch.store.has_claims:
            self._sharing.look_again()
        for number, name in taken:
            found = self._sharing.settled(name, self._sharing.left[name])
            if isinstance(found, Sample):
                sent = self._claims[name] if self._batch.store.has_claims else None
                self._ask(self._hired[number], "make", name, found, sent)
            else:
                self._let_go(name)
                self._deal.over(number, name)
                yield self._own(name, found)

    def _own(self, name: str, result: Result) -> Result:
        """What a worker made that died before it could say so was not made elsewhere."""
        if isinstance(result, MadeElsewhere) and self._deal.deaths(name):
            for _, report in self._batch.store.reports([result.sample.report]):
                return MadeHere(result.sample, report)
        return result

    def _ask(self, hired: _Hired, method: str, name: str = "", *arguments: Any) -> None:
        call = getattr(hired.actor, method)
        if method == "doing":
            call = call.options(concurrency_group=_ASIDE)
        if method == "make":
            arguments = (name, *arguments)
        self._calls[call.remote(*arguments)] = _Call(hired, method, name)

    def _answered(self) -> Iterator[tuple[Any, _Call]]:
        """Calls of which there are answers, after a while at most."""
        pending = list(self._calls)
        if not pending:
            time.sleep(_POLL_S)
            return
        ray.wait([each for each in pending if self._calls[each].method != "doing"] or pending, timeout=_POLL_S)
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
        for reference in ready:
            if reference in self._calls:  # else its actor was found dead just now
                yield reference, self._calls.pop(reference)

    def _heard(self, answered: tuple[Any, _Call]) -> Result | None:
        """What an answer tells of a sample, if anything.

        Raises:
            GratError: that ends the batch.
        """
        reference, call = answered
        hired = call.hired
        try:
            answer: Any = ray.get(reference)
        except exceptions.RayError as error:
            self._lose(hired, error)
            return None
        if call.method == "doing":
            hired.is_asked, hired.row.doing = False, answer
            return None
        if call.method == "about":
            _refuse_other(answer)
            hired.row.machine, hired.row.process, hired.row.doing = answer.machine, answer.process, "loading"
            self._ask(hired, "load", "", *self._sent, os.getcwd(), self._threads)
            return None
        for note in answer.notes:
            self._progress.note(note)
        if answer.error is not None:
            raise answer.error
        if call.method == "load":
            self._begin(hired, answer.value)
            return None
        return self._over(hired, call.name, answer.value)

    def _begin(self, hired: _Hired, device: str) -> None:
        if not self._has_begun:
            self._display.outputs(0, self._total)
        self._has_begun, hired.is_ready, self._failed_starts = True, True, 0
        hired.row.device, hired.row.doing, hired.began_s = device, "", time.monotonic()
        self._deal.join(hired.number)
        self._display.note(f"worker {hired.number}: {hired.row.machine}, {device}")

    def _over(self, hired: _Hired, name: str, result: Result | None) -> Result | None:
        if result is None and self._claims[name].is_held():  # which its worker does not see
            raise _unseen(self._batch, hired.row.machine)
        self._let_go(name)
        self._deal.over(hired.number, name)
        now = time.monotonic()
        seconds, hired.began_s, hired.row.doing = now - hired.began_s, now, ""
        if result is None:
            self._deal.back(name)
            return None
        if isinstance(result, MadeHere):
            hired.row.made += 1
            hired.row.seconds += seconds
        return self._own(name, result)

    def _lose(self, hired: _Hired, error: BaseException) -> None:
        """An actor is gone; others make what it had.

        Raises:
            GratError: if none gets as far as having the model.
        """
        reason = _reason(error)
        hired.row.doing = GONE
        del self._hired[hired.number]
        self._calls = {reference: call for reference, call in self._calls.items() if call.hired is not hired}
        with suppress(Exception):
            ray.kill(hired.actor)
        had = self._deal.died(hired.number)
        for name in had:
            self._let_go(name)
        if not hired.is_ready:
            self._failed_starts += 1
            if self._failed_starts >= _MOST_FAILED_STARTS:
                raise GratError(f"{_MOST_FAILED_STARTS} workers in a row died before they had the model: {reason}")
        goes_on = f"; another one makes {self._sharing.left[had[0]].output.name}" if had else ""
        self._display.note(f"worker {hired.number} died: {reason}{goes_on}")

    def _let_go(self, name: str) -> None:
        if (claim := self._claims.pop(name, None)) is not None:
            claim.__exit__()

    def _show(self) -> None:
        now = time.monotonic()
        for hired in islice(self._hired.values(), _MOST_ASKED):
            if hired.is_ready and not hired.is_asked and now - hired.asked_s >= _STATE_S:
                hired.asked_s, hired.is_asked = now, True
                self._ask(hired, "doing")
        self._display.workers(self._rows)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Connects this process to Ray; one that is connected already stays so.

    Raises:
        BadInput: if that fails.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of runs, unless the user says so
    _refuse_silent(address)
    before = signal.getsignal(signal.SIGTERM)  # which Ray takes for itself
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(own if address == HERE else {}))
    except Exception as error:  # of many kinds
        raise BadInput(f"--ray {address}: {_why_not_connected(address, error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()


def _refuse_silent(address: str) -> None:
    """Raises BadInput if nothing answers at an address; Ray itself tries that for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise BadInput(f"--ray {address}: nothing answers there: {first_line(error)}") from error


def _why_not_connected(address: str, error: Exception) -> str:
    if "ray[client]" in str(error):
        return "Ray's client is not installed: pip install 'ray[client]'"
    if address == "auto" and isinstance(error, ConnectionError):
        return "no Ray cluster is at work here: start one (ray start --head), or use --ray local"
    return f"cannot connect to Ray: {first_line(error)}"


def _resource(device: str) -> str:
    """What of a cluster's resources a worker takes one of: GPU or CPU."""
    if device == "cuda":
        return "GPU"
    return "GPU" if device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"


def _refuse_other(about: About) -> None:
    if about.version != __version__:
        raise BadInput(
            f"{about.machine} has grat {about.version}, and this machine {__version__}: install the same everywhere"
        )


def _unseen(batch: Batch, machine: str) -> BadInput:
    return BadInput(
        f"{machine} does not see the folder {batch.out.absolute()}: use --out with one that all machines share"
    )


def _reason(error: BaseException) -> str:
    """Why an actor died, in a few words; Ray's own take a paragraph."""
    if isinstance(error, exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {first_line(error.cause)}"
    text = str(error)
    if "No module named 'grat_cli" in text:
        raise BadInput("the machines of the cluster have no grat: install grat-cli where Ray runs") from error
    if "running low on memory" in text or isinstance(error, exceptions.OutOfMemoryError):
        return "its machine ran out of memory"
    if "node" in text and "died" in text.partition("node")[2][:40]:
        return "its machine is gone"
    return "its process was killed, or crashed"
