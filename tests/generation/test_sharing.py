"""Which part of a batch a worker begins with, and how several make everything once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.errors import BadInput
from grat_cli.files.claims import Claim, ClaimLost, Claims
from grat_cli.generation import sharing
from grat_cli.generation.sharing import MOST_SHARDS, FailureNotes, Shard, parse_shard, shared

SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *SLURM)


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/8", {}, (2, 8, None)),
        ("1/1", {"RANK": "3", "WORLD_SIZE": "4"}, (1, 1, None)),
        ("auto", {"RANK": "3", "WORLD_SIZE": "4"}, (4, 4, None)),
        ("auto", {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}, (1, 16, 0)),
        ("auto", dict(zip(SLURM, ("0", "4"), strict=False)), (1, 4, None)),
        ("auto", dict(zip(SLURM, ("5", "3", "1", "2"), strict=True)), (3, 3, None)),
        # A launcher within a task of an array deals out what the task has.
        ("auto", {"RANK": "1", "WORLD_SIZE": "2", SLURM[0]: "7", SLURM[1]: "8"}, (2, 2, None)),
        # One that says half of it is not heard.
        ("auto", {"RANK": "1", SLURM[0]: "7", SLURM[1]: "8"}, (8, 8, None)),
    ],
)
def test_a_part_is_typed_or_told(text: str, environment: dict[str, str], expected: tuple[int, int, int | None]) -> None:
    assert parse_shard(text, environment) == Shard(*expected)


@pytest.mark.parametrize(
    ("text", "environment", "says"),
    [
        ("3", {}, "--shard 3: expected a part such as 2/8"),
        ("-1/8", {}, "--shard -1/8: expected a part such as 2/8"),
        ("1/2/3", {}, "expected a part such as 2/8"),
        ("٢/٨", {}, "expected a part such as 2/8"),
        ("0/8", {}, "--shard 0/8: expected a part from 1 to the number of parts, at most 100000, such as --shard 2/8"),
        ("9/8", {}, "--shard 9/8: expected a part from 1 to the n"),
        ("1/100001", {}, "expected a part from 1 to the n"),
        ("auto", {}, "says which part this is:\ntype it, such as --shard 2/8"),
        ("auto", {"WORLD_SIZE": "2"}, "neither torchrun (RANK, WORLD_SIZE) nor a Slurm array"),
        ("auto", {SLURM[0]: "2"}, "neither torchrun"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2: expected a part from 1 to the n"),
        ("auto", {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', no whole number: type which part this is"),
        ("auto", {"RANK": "1", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '9999"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "gpu"}, "LOCAL_RANK is 'gpu', no whole number"),
        ("auto", dict(zip(SLURM, ("7", "3", "1"), strict=False)), "_ID=7, _MIN=1, _STEP=1, _COUNT=3: expected a part"),
        ("auto", dict(zip(SLURM, ("0", "3", "1"), strict=False)), "is no part of a whole: type which part this is"),
        ("auto", dict(zip(SLURM, ("4", "3", "1", "2"), strict=True)), "is no part of a whole"),
        ("auto", dict(zip(SLURM, ("4", "3", "1", "0"), strict=True)), "is no part of a whole"),
    ],
)
def test_what_is_no_part_is_refused_with_what_to_type(text: str, environment: dict[str, str], says: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_shard(text, environment)
    assert says in str(refused.value)
    assert "2/8" in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2


_VALUES = st.one_of(st.integers(-2, 12).map(str), st.text(max_size=12), st.integers().map(str))


@given(
    text=st.one_of(st.just("auto"), st.text(max_size=20)),
    environment=st.dictionaries(st.sampled_from(LAUNCHERS), _VALUES),
)
def test_whatever_is_set_gives_a_part_or_is_refused(text: str, environment: dict[str, str]) -> None:
    try:
        shard = parse_shard(text, environment)
    except BadInput:
        return
    assert 1 <= shard.rank <= shard.count <= MOST_SHARDS


@given(count=st.integers(1, 40), least=st.integers(0, 1000), step=st.integers(1, 9), number=st.integers(0, 39))
def test_tasks_of_an_array_are_parts_of_a_whole(count: int, least: int, step: int, number: int) -> None:
    number %= count
    told = map(str, (least + number * step, count, least, step))
    assert parse_shard("auto", dict(zip(SLURM, told, strict=True))) == Shard(number + 1, count)


@given(items=st.integers(0, 30), count=st.integers(1, 12))
def test_each_begins_with_its_own_part_and_goes_on_with_all_others(items: int, count: int) -> None:
    orders = [Shard(rank, count).ordered(range(items)) for rank in range(1, count + 1)]
    assert all(sorted(order) == list(range(items)) for order in orders)
    own = [order[: len(range(rank, items, count))] for rank, order in enumerate(orders)]
    assert own == [list(range(rank, items, count)) for rank in range(count)]


def test_what_others_make_is_waited_for_and_what_they_lose_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: dict[str, str] = {"b": "by another"}
    other = {name: Claims(tmp_path).take(name) for name in ("c", "d")}
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        for name in ("d", "c")[: len(naps)]:
            if (claim := other.pop(name, None)) is not None:
                claim.__exit__()
        if len(naps) == 2:
            done["c"] = "by another"

    def make(name: str, item: int, claim: Claim) -> str:
        assert claim.is_held()
        made = done.get(name) or f"{item} here"
        if name == "e" and "e" not in lost:
            lost.append(name)
            raise ClaimLost
        done[name] = made
        return made

    lost: list[str] = []
    waited: list[int] = []
    monkeypatch.setattr(sharing.time, "sleep", sleep)
    items = {name: number for number, name in enumerate("abcde")}
    results = list(shared(items, Claims(tmp_path), lambda name, _: done.get(name), make, waited.append))
    assert results == ["0 here", "by another", "4 here", "3 here", "by another"]
    assert waited == [2, 1]
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_told_to_those_who_are_at_work_and_tried_again_by_who_comes_later(tmp_path: Path) -> None:
    here, there = FailureNotes(tmp_path / "new"), FailureNotes(tmp_path / "new")
    assert there.read("a") is None
    here.write("a", "it has\nNaN")
    assert there.read("a") == "it has"
    later, too = FailureNotes(tmp_path / "new"), FailureNotes(tmp_path / "new")
    assert later.read("a") is None
    later.write("a", "it has NaN again")
    assert [notes.read("a") for notes in (here, there, too)] == ["it has NaN again"] * 3
    too.remove_all()
    assert list((tmp_path / "new").iterdir()) == []


def test_notes_of_others_are_not_trusted(tmp_path: Path) -> None:
    notes = FailureNotes(tmp_path)
    (tmp_path / "secret").write_text("a secret")
    (tmp_path / "link.failed").symlink_to("secret")
    (tmp_path / "folder.failed").mkdir()
    (tmp_path / "long.failed").write_bytes(b"a" * 5000)
    (tmp_path / "binary.failed").write_bytes(b"\x1b[2J\xff\n\n")
    assert [notes.read(name) for name in ("link", "folder", "long")] == [None] * 3
    assert notes.read("binary") == "\\x1b[2J\ufffd"
    FailureNotes(tmp_path).remove_all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.failed", "link.failed", "secret"]
