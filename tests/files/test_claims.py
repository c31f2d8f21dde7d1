"""Of all that claim the same, one has it; a live owner keeps it, a dead one's is taken over once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grat_cli.errors import CannotWrite
from grat_cli.files import claims as module
from grat_cli.files.claims import BEAT_S, SILENT_S, Claim, ClaimLost, Claims

NEVER = 3600.0


class Clock:
    """This process's clock, set by hand."""

    now = 0.0

    def after(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0.01)  # longer than file systems take for one moment


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def taken(claims: Claims, name: str = "a") -> Claim:
    claim = claims.take(name)
    assert claim is not None
    return claim


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def watch(claims: Claims, clock: Clock) -> Claim | None:
    """Takes a look every second until a claim is free, for as long as it may have to."""
    for _ in range(int(SILENT_S) + 2):
        if (claim := claims.take("a")) is not None:
            return claim
        clock.now += 1
    return None


def test_one_has_it_until_it_lets_go(tmp_path: Path) -> None:
    ours, others = Claims(tmp_path / "new" / "folder"), Claims(tmp_path / "new" / "folder")
    with taken(ours) as claim:
        assert claim.is_held()
        assert others.take("a") is None
        assert ours.take("a") is None
        with taken(others, "b"):
            pass
    assert names(tmp_path / "new" / "folder") == []
    with taken(others):
        assert ours.take("a") is None
    with pytest.raises(KeyboardInterrupt), taken(ours):
        raise KeyboardInterrupt
    assert names(tmp_path / "new" / "folder") == []


def _race(folder: Path, count: int, start: Callable[[], object]) -> None:
    """Makes what nobody makes; fails if anybody else does, or is about to."""
    claims = Claims(folder / "claims", beat_s=1, silent_s=NEVER)
    start()
    left = set(range(count))
    while left:
        for number in tuple(left):
            if (claim := claims.take(str(number))) is None:
                continue
            with claim:
                (folder / f"doing-{number}").touch(exist_ok=False)
                if not (folder / f"done-{number}").exists():
                    (folder / f"done-{number}").touch(exist_ok=False)
                (folder / f"doing-{number}").unlink()
            left.discard(number)
            with contextlib.suppress(OSError):
                (folder / "claims").rmdir()


def test_of_many_processes_one_at_a_time_has_each(tmp_path: Path) -> None:
    context: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    start = context.Barrier(6)
    racers = [context.Process(target=_race, args=(tmp_path, 30, start.wait)) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 6
    assert names(tmp_path) == sorted(f"done-{number}" for number in range(30))


def test_a_live_claim_is_never_taken(tmp_path: Path, clock: Clock) -> None:
    ours, others = Claims(tmp_path, beat_s=NEVER), Claims(tmp_path)
    with taken(ours) as claim:
        for _ in range(30):
            assert others.take("a") is None
            clock.after(SILENT_S - BEAT_S)
            assert others.take("a") is None
            clock.after(BEAT_S / 2)
            assert claim.is_held()


def test_a_claim_is_touched_while_it_is_held(tmp_path: Path) -> None:
    with taken(Claims(tmp_path, beat_s=0.01)):
        (file,) = tmp_path.glob("a.claim/*")
        first, deadline = file.stat().st_mtime_ns, time.monotonic() + 60
        while file.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_dead_claim_is_taken_over_and_its_owner_notices(tmp_path: Path, clock: Clock) -> None:
    stalled = taken(Claims(tmp_path, beat_s=NEVER))
    others = Claims(tmp_path)
    looks = 0
    while (claim := others.take("a")) is None:
        looks += 1
        clock.after(BEAT_S / 2)
    assert looks == 2 * SILENT_S / BEAT_S
    assert claim.is_held()
    assert not stalled.lost  # it has not looked
    with pytest.raises(ClaimLost, match="a was taken over"):
        stalled.require()
    assert stalled.lost
    assert not stalled.is_held()
    stalled.__exit__()
    assert claim.is_held()
    claim.__exit__()
    assert names(tmp_path) == []


def test_a_thread_that_wakes_notices_too(tmp_path: Path) -> None:
    stalled = taken(Claims(tmp_path, beat_s=0.01))
    Claims(tmp_path).clear(["a", "b"])
    deadline = time.monotonic() + 60
    while not stalled.lost:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with taken(Claims(tmp_path)) as claim:
        assert claim.is_held()


def test_time_in_which_nobody_was_awake_does_not_count(tmp_path: Path, clock: Clock) -> None:
    """A scheduler suspends all workers at once, and who wakes first looks at a claim that was not touched for long."""
    ours, others = Claims(tmp_path, beat_s=NEVER), Claims(tmp_path)
    with taken(ours) as claim:
        for _ in range(3):
            assert others.take("a") is None
            clock.after(100 * SILENT_S)
            assert others.take("a") is None
            assert claim.is_held()


def test_of_several_that_see_a_dead_claim_one_has_it(tmp_path: Path) -> None:
    seen, tried, held = threading.Barrier(8), threading.Barrier(8), []

    def race() -> None:
        for turn in range(20):
            claims = Claims(tmp_path, silent_s=0)  # dead as soon as it is the same at the second look
            assert claims.take(str(turn)) is None
            seen.wait()
            claim = claims.take(str(turn))
            tried.wait()
            held.extend([turn] if claim is not None and claim.is_held() else [])

    for turn in range(20):
        taken(Claims(tmp_path, beat_s=NEVER), str(turn))
    racers = [threading.Thread(target=race) for _ in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert held == list(range(20))


def test_who_is_late_with_a_dead_claim_does_not_take_its_successor(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has decided, and before it acts, somebody else has taken the claim over."""
    taken(Claims(tmp_path, beat_s=NEVER))
    early, late = Claims(tmp_path), Claims(tmp_path)
    successors: list[Claim | None] = []
    remove = module._remove

    def overtaken(path: Path, seen: object) -> None:
        monkeypatch.setattr(module, "_remove", remove)
        successors.append(watch(early, clock))
        remove(path, seen)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "_remove", overtaken)
    assert watch(late, clock) is None
    (successor,) = successors
    assert successor is not None
    assert successor.is_held()


def _a_folder(path: Path) -> None:
    path.mkdir()


def _a_file(path: Path) -> None:
    path.touch()


def _a_huge_file(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def _a_huge_file_inside(path: Path) -> None:
    path.mkdir()
    _a_huge_file(path / "x")


def _a_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "kept")


def _a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def _a_link_inside(path: Path) -> None:
    path.mkdir()
    _a_link(path / "link")
    (path / "link").unlink()
    (path / "link").symlink_to(path.parent.parent / "kept" / "file")


def _a_pipe(path: Path) -> None:
    os.mkfifo(path)


def _folders_inside(path: Path) -> None:
    (path / "0123456789abcdef").mkdir(parents=True)
    (path / "other").mkdir()


@pytest.mark.parametrize(
    "junk",
    [
        _a_folder,
        _a_file,
        _a_huge_file,
        _a_huge_file_inside,
        _a_link,
        _a_link_to_nothing,
        _a_link_inside,
        _a_pipe,
        _folders_inside,
    ],
)
def test_what_is_no_claim_is_neither_read_nor_followed(
    junk: Callable[[Path], None], tmp_path: Path, clock: Clock
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_bytes(b"of somebody")
    (tmp_path / "claims").mkdir()
    junk(tmp_path / "claims" / "a.claim")
    claim = watch(Claims(tmp_path / "claims"), clock)
    assert claim is not None
    assert claim.is_held()
    with claim:
        assert Claims(tmp_path / "claims").take("a") is None
    assert names(tmp_path / "claims") == []
    assert (tmp_path / "kept" / "file").read_bytes() == b"of somebody"


def test_a_folder_with_something_in_it_is_refused_by_name(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "a.claim" / "folder" / "work").mkdir(parents=True)
    with pytest.raises(CannotWrite, match=r"a\.claim/folder is no claim of grat, and in the way of one: remove it"):
        watch(Claims(tmp_path), clock)
    assert (tmp_path / "a.claim" / "folder" / "work").is_dir()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match=r"cannot write .*file/claims/a\.claim: not a directory"):
        Claims(tmp_path / "file" / "claims").take("a")
    with pytest.raises(CannotWrite, match=r"cannot write .*file/a\.claim"):
        Claims(tmp_path / "file").take("a")


def test_a_claim_that_is_sent_to_another_process_is_its_own_too_and_ends_for_both(tmp_path: Path) -> None:
    claims = Claims(tmp_path, beat_s=0.05)
    claim = claims.take("a")
    assert claim is not None
    with claim:
        sent: Claim = pickle.loads(pickle.dumps(claim))
        assert sent.is_held()
    with pytest.raises(ClaimLost):
        sent.require()
    another = claims.take("a")  # by whoever goes on; what was sent before stays without it
    assert another is not None
    with another:
        assert not sent.is_held()
