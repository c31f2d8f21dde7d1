"""References by dynamic programming against all there are, and what they lose against outputs that are carried."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grat_cli.fidelity.references import Outputs, best_references, by_step, gaps, last_two, moved, search

ROUNDING = 1e-9


def outputs_and_vectors(seed: int, steps: int, error: float = 0.0) -> tuple[Outputs, np.ndarray]:
    """Vectors that turn from step to step, and what their Gram matrix says."""
    generator = np.random.default_rng(seed)
    vectors = np.cumsum(np.cumsum(generator.normal(size=(steps, 6)), 0), 0) + generator.normal(size=(steps, 6))
    weights = generator.uniform(0.5, 1.5, steps)
    return Outputs(vectors @ vectors.T, weights, np.full(steps, error)), vectors


def carried(vectors: np.ndarray, references: Sequence[int], slopes: np.ndarray) -> np.ndarray:
    """What a run has at each step, by the definition."""
    made = []
    for step in range(len(vectors)):
        known = [reference for reference in references if reference <= step]
        latest = vectors[known[-1]]
        if len(known) > 1:
            i, j = known[-2:]
            latest = latest + slopes[step] * (step - j) / (j - i) * (vectors[j] - vectors[i])
        made.append(latest)
    return np.array(made)


def chains(steps: int, count: int) -> list[tuple[int, ...]]:
    """All references of a run, so many of them."""
    return [(0, *others) for others in itertools.combinations(range(1, steps), count - 1)]


@given(st.integers(0, 99), st.integers(1, 9), st.data())
def test_losses_are_distances_from_what_is_carried(seed: int, steps: int, data: st.DataObject) -> None:
    outputs, vectors = outputs_and_vectors(seed, steps)
    references = data.draw(st.sampled_from(chains(steps, data.draw(st.integers(1, steps)))))
    slopes = np.array(data.draw(st.lists(st.floats(0, 1.5), min_size=steps, max_size=steps)))
    distances = ((carried(vectors, references, slopes) - vectors) ** 2).sum(1)
    found = outputs.losses_of(references, slopes)
    np.testing.assert_allclose(found, outputs.weights * distances, atol=ROUNDING * np.abs(outputs.gram).max())


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
@pytest.mark.parametrize("error", [0.0, 2.0])
@pytest.mark.parametrize("slope", [0.0, 0.9])
def test_the_best_references_are_the_best_of_all(steps: int, error: float, slope: float) -> None:
    outputs, _ = outputs_and_vectors(steps, steps, error)
    slopes = np.full(steps, slope)
    found = best_references(outputs.losses(slopes), steps)
    for count, references in enumerate(found, start=1):
        best = min(outputs.loss(chain, slopes) for chain in chains(steps, count))
        assert references in chains(steps, count)
        assert outputs.loss(references, slopes) == pytest.approx(best)


def test_errors_of_references_are_carried_on() -> None:
    steps, slopes, references, error = 7, np.linspace(0.2, 1.4, 7), (0, 2, 5), 0.5
    outputs = Outputs(np.zeros((steps, steps)), np.ones(steps), np.full(steps, error))
    # What each step has of each reference: independent errors add up by their squares.
    shares = carried(np.eye(steps), references, slopes)
    np.testing.assert_allclose(outputs.losses_of(references, slopes), error * (shares**2).sum(1))


@given(st.integers(0, 99), st.integers(3, 8), st.data())
def test_no_slopes_lose_less_than_the_best_ones(seed: int, steps: int, data: st.DataObject) -> None:
    outputs, _ = outputs_and_vectors(seed, steps, error=0.1)
    references = data.draw(st.sampled_from(chains(steps, data.draw(st.integers(2, steps)))))
    stretches = (range(steps // 2), range(steps // 2, steps))
    best = outputs.best_slopes(references, stretches)
    loss = outputs.loss(references, by_step(best.tolist(), stretches, steps))
    for early, late in itertools.product(np.linspace(0, 1.5, 7), repeat=2):
        other = outputs.loss(references, by_step([early, late], stretches, steps))
        assert loss <= other + ROUNDING * abs(outputs.gram).max()


def test_a_search_finds_what_slopes_and_references_cannot_better_alone() -> None:
    outputs, _ = outputs_and_vectors(5, 9, error=0.1)
    stretches = (range(3), range(3, 9))
    for count, found in search(outputs, range(1, 10), stretches, (0.4, 0.9)).items():
        assert len(found.steps) == count
        slopes = by_step(found.slopes, stretches, 9)
        assert found.loss == pytest.approx(outputs.loss(found.steps, slopes))
        assert found.loss <= min(outputs.loss(chain, slopes) for chain in chains(9, count)) + ROUNDING
        start = by_step((0.4, 0.9), stretches, 9)
        assert found.loss <= min(outputs.loss(chain, start) for chain in chains(9, count)) + ROUNDING
    fixed = search(outputs, [3], stretches, (0.0, 0.0), fits=False)[3]
    assert fixed.slopes == (0.0, 0.0)


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
    assert sum(gaps(references, steps)) == steps


def test_references_before_each_step() -> None:
    earlier, latest = last_two((0, 2, 5), 7)
    assert latest.tolist() == [0, 0, 2, 2, 2, 5, 5]
    assert earlier.tolist() == [-1, -1, 0, 0, 0, 2, 2]
