"""References by dynamic programming against all there are, and what they lose against outputs that are carried."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.fidelity.references import STEEPEST, best_references, moved, stretches, weights_of

ROUNDING = 1e-9


def vectors_of(seed: int, steps: int) -> np.ndarray:
    """Outputs that turn from step to step, `[S, 6]`."""
    generator = np.random.default_rng(seed)
    return np.cumsum(np.cumsum(generator.normal(size=(steps, 6)), 0), 0) + generator.normal(size=(steps, 6))


def weights(steps: int) -> np.ndarray:
    return np.random.default_rng(steps).uniform(0.5, 1.5, steps)


def carried(vectors: np.ndarray, references: Sequence[int], slopes: Sequence[float]) -> np.ndarray:
    """What a run has at each step, by the definition, with the slope after each reference."""
    made = []
    for step in range(len(vectors)):
        number = max(number for number, reference in enumerate(references) if reference <= step)
        j = references[number]
        latest = vectors[j]
        if number:
            i = references[number - 1]
            latest = latest + slopes[number] * (step - j) / (j - i) * (latest - vectors[i])
        made.append(latest)
    return np.array(made)


def loss_of(vectors: np.ndarray, references: Sequence[int], slopes: Sequence[float]) -> float:
    distances = ((carried(vectors, references, slopes) - vectors) ** 2).sum(1)
    return float(weights(len(vectors)) @ distances)


def chains(steps: int, count: int) -> list[tuple[int, ...]]:
    """All references of a run, so many of them."""
    return [(0, *others) for others in itertools.combinations(range(1, steps), count - 1)]


@given(st.integers(0, 99), st.integers(1, 9), st.sampled_from([0.0, 0.5, 1.0, 1.3]), st.data())
def test_losses_are_distances_from_what_is_carried(
    seed: int, steps: int, steepness: float, data: st.DataObject
) -> None:
    vectors = vectors_of(seed, steps)
    found = stretches(vectors @ vectors.T, weights(steps), steepness)
    references = data.draw(st.sampled_from(chains(steps, data.draw(st.integers(1, steps)))))
    slopes = found.slopes_of(references)
    assert all(0 <= slope <= STEEPEST for slope in slopes)
    assert slopes[0] == 0
    assert any(slopes) <= bool(steepness)
    wanted = loss_of(vectors, references, slopes)
    assert found.loss(references) == pytest.approx(wanted, abs=ROUNDING * np.square(vectors).sum())


@given(st.integers(0, 99), st.integers(3, 8), st.data())
def test_no_other_slopes_lose_less(seed: int, steps: int, data: st.DataObject) -> None:
    vectors = vectors_of(seed, steps)
    found = stretches(vectors @ vectors.T, weights(steps))
    references = data.draw(st.sampled_from(chains(steps, data.draw(st.integers(2, steps)))))
    slopes = found.slopes_of(references)
    number = data.draw(st.integers(1, len(references) - 1))
    other = data.draw(st.integers(0, 150)) / 100  # slopes have two digits
    changed = (*slopes[:number], other, *slopes[number + 1 :])
    assert found.loss(references) <= loss_of(vectors, references, changed) + ROUNDING * np.square(vectors).sum()


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("steepness", [0.0, 1.0])
def test_the_best_references_are_the_best_of_all(steps: int, steepness: float) -> None:
    vectors = vectors_of(steps, steps)
    made = stretches(vectors @ vectors.T, weights(steps), steepness)
    found = best_references(made.losses, steps)
    for count, references in enumerate(found, start=1):
        best = min(made.loss(chain) for chain in chains(steps, count))
        assert references in chains(steps, count)
        assert made.loss(references) == pytest.approx(best)


@given(st.integers(1, 9), st.data())
def test_moved_references_are_neighbours(steps: int, data: st.DataObject) -> None:
    references = data.draw(st.sampled_from(chains(steps, data.draw(st.integers(1, steps)))))
    found = moved(references, steps)
    near = [
        chain
        for chain in chains(steps, len(references))
        if sum(abs(one - other) for one, other in zip(chain, references, strict=True)) == 1
    ]
    assert sorted(found) == sorted(near)


def test_references_weigh_as_much_as_the_steps_that_they_are_carried_to() -> None:
    of_steps = np.arange(1.0, 8.0)
    assert weights_of((0, 2, 5), of_steps).tolist() == [1 + 2, 3 + 4 + 5, 6 + 7]
