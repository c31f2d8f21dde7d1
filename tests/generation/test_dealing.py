"""Dealing items out: everything is over once, whoever dies, and what kills its workers is known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grat_cli.generation.dealing import IN_HAND, MOST_DEATHS, Deal


def test_one_is_made_and_one_in_hand_but_not_at_the_end() -> None:
    deal = Deal("abcdef")
    assert deal.neediest() is None  # nobody is there
    for worker in (1, 2):
        deal.join(worker)
    given: list[tuple[int, str]] = []
    while (worker := deal.neediest()) is not None:
        deal.give(worker, name := deal.next())
        given.append((worker, name))
    assert given == [(1, "a"), (2, "b"), (1, "c"), (2, "d")]
    deal.over(1, "a")
    assert deal.neediest() is None  # two wait for two workers: whoever is done first gets the next
    deal.over(2, "b")
    deal.over(2, "d")
    assert deal.neediest() == 2


def test_what_a_dead_worker_had_comes_before_all_else() -> None:
    deal = Deal("abcdefgh")
    deal.join(1)
    deal.give(1, deal.next())
    deal.give(1, deal.next())
    assert deal.died(1) == ("a", "b")
    assert [deal.next() for _ in range(3)] == ["a", "b", "c"]
    assert [deal.deaths(name) for name in "abc"] == [1, 0, 0]  # what it had not begun is not to blame
    assert deal.died(7) == ()  # one that never was ready


@settings(max_examples=30)
@given(st.data(), st.integers(0, 12), st.integers(1, 4))
def test_everything_is_over_once(data: st.DataObject, count: int, workers: int) -> None:
    names = [f"item {number}" for number in range(count)]
    deal, over, given_up = Deal(names), list[str](), list[str]()
    there = set(range(workers))
    for worker in there:
        deal.join(worker)
    while deal:
        while (worker := deal.neediest()) is not None:
            name = deal.next()
            if deal.deaths(name) >= MOST_DEATHS:
                given_up.append(name)
            elif data.draw(st.integers(0, 5)) == 0:
                deal.back(name)
                break
            else:
                deal.give(worker, name)
        held = [name for each in there for name in deal.hands(each)]
        assert len(held) == len(set(held))
        assert all(len(deal.hands(each)) <= IN_HAND for each in there)
        busy = [each for each in there if deal.hands(each)]
        if not busy:
            continue
        worker = data.draw(st.sampled_from(busy))
        if data.draw(st.booleans()):
            over.append(deal.hands(worker)[0])
            deal.over(worker, over[-1])
        else:
            deal.died(worker)
            there.remove(worker)
            there.add(new := max([worker, *there]) + 1)
            deal.join(new)
    assert sorted(over + given_up) == sorted(names)
    assert all(deal.deaths(name) == MOST_DEATHS for name in given_up)
    with pytest.raises(IndexError):
        deal.next()
