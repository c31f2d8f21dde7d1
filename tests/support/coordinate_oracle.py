"""Span attention from the coordinates of tokens alone, in float64 and NumPy: it knows nothing of the package it judges.

Image tokens are in raster order here, ahead of them or behind them text, as a model has them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Place = tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """What attends what.

    Attributes:
        shape: image tokens on each axis.
        group: tokens of a group on each axis.
        near: which groups are attended token by token, by any of these: `("full",)`, `("b", radius on each axis)`,
            `("x", coordinates to share)`, `("sta", window on each axis)`.
        far: distances beyond which groups are attended through means of blocks, and the blocks, nearest first.
        text: text tokens.
        text_first: whether they are ahead of the image tokens.
    """

    shape: Place
    group: Place
    near: tuple[tuple, ...]
    far: tuple[tuple[int, Place], ...] = ()
    text: int = 0
    text_first: bool = True

    @property
    def tokens(self) -> int:
        """Image and text tokens."""
        return math.prod(self.shape) + self.text

    @property
    def first(self) -> int:
        """Position of the first image token."""
        return self.text if self.text_first else 0


@dataclass(frozen=True)
class Answer:
    """Output of attention, and how far off rounding may bring it: each `[N, D]`, of one head of one sample."""

    output: Array
    error: Array


def attended(near: tuple, a: Place, b: Place, groups: Place) -> bool:
    """Whether group `a` attends group `b` token by token, of so many groups on each axis."""
    kind, *settings = near
    if kind == "full":
        return True
    if kind == "b":
        return all(abs(x - y) <= radius for x, y, radius in zip(a, b, settings[0], strict=True))
    if kind == "x":
        return sum(x == y for x, y in zip(a, b, strict=True)) >= settings[0]
    assert kind == "sta"
    for x, y, window, count in zip(a, b, settings[0], groups, strict=True):
        windows = [range(first, first + window) for first in range(max(1, count - window + 1))]
        # The window whose middle is nearest to the query.
        if y not in min(windows, key=lambda one: abs(one[window // 2] - x)):
            return False
    return True


def level(scene: Scene, a: Place, b: Place) -> int | None:
    """0 where group `a` attends group `b` token by token, n where through means of the n-th level, else None."""
    groups = tuple(-(-extent // side) for extent, side in zip(scene.shape, scene.group, strict=True))
    if any(attended(near, a, b, groups) for near in scene.near):
        return 0
    distance = max(abs(x - y) for x, y in zip(a, b, strict=True))
    beyond = [number for number, (near, _) in enumerate(scene.far, start=1) if distance > near]
    return beyond[-1] if beyond else None


def attend(
    scene: Scene, query: Array, key: Array, value: Array, valid: int, scale: float, dtype: npt.DTypeLike
) -> Answer:
    """Attention of one head of one sample.

    Args:
        scene: what attends what.
        query: `[N, D]`.
        key: `[N, D]`.
        value: `[N, D]`.
        valid: text tokens that are attended.
        scale: factor on the scores.
        dtype: of what is judged: its inputs and outputs, and the weights that it multiplies values by.
    """
    places = list(itertools.product(*map(range, scene.shape)))
    first = scene.first
    text = np.arange(scene.text) + (0 if scene.text_first else len(places))
    # Keys are all tokens, then the means of each block of each level; each token lies in some of them.
    shares = [np.eye(scene.tokens)]
    seen = np.zeros((scene.tokens, scene.tokens), bool)
    seen[text, first : first + len(places)] = True
    seen[:, text[:valid]] = True
    group_of = [cell(place, scene.group) for place in places]
    level_of = {pair: level(scene, *pair) for pair in itertools.product(sorted(set(group_of)), repeat=2)}
    levels = np.array([[-1 if level_of[a, b] is None else level_of[a, b] for b in group_of] for a in group_of])
    seen[first : first + len(places), first : first + len(places)] = levels == 0
    for number, (_, block) in enumerate(scene.far, start=1):
        block_of = [cell(place, block) for place in places]
        for one in sorted(set(block_of)):
            members = np.array([at for at, other in enumerate(block_of) if other == one])
            share, column = np.zeros((1, scene.tokens)), np.zeros((scene.tokens, 1), bool)
            share[0, first + members] = 1 / len(members)
            column[first : first + len(places), 0] = levels[:, members[0]] == number
            shares.append(share)
            seen = np.concatenate([seen, column], axis=1)
    return _softmax(query, key, value, np.concatenate(shares), seen, scale, dtype)


def cell(place: Place, size: Place) -> Place:
    """Coordinates of the group or block that a token lies in."""
    return tuple(at // side for at, side in zip(place, size, strict=True))


def _softmax(
    query: Array,
    key: Array,
    value: Array,
    shares: Array,
    seen: npt.NDArray[np.bool_],
    scale: float,
    dtype: npt.DTypeLike,
) -> Answer:
    """Attention to means of tokens, of which `shares` `[keys, N]` are made; zeros where nothing is seen.

    A mean of c tokens has log c added to its score. The error is derived as follows. Let u be the unit roundoff of
    fp32, in which scores and sums are computed, and w that of the dtype. A score of D products is off by at most
    D·u·scale·Σ|q||k| (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); scaling, the logarithm and
    the difference to the highest score, in base 2, add some u of the largest score or logarithm, and c·u + w of the
    same sum the mean, which is rounded. With δ the largest such error of a query, a weight p comes to lie between
    p·exp(-2δ) and p·exp(2δ); no weight exceeds 1, and what the largest one loses or gains, the others gain or lose.
    Weights are rounded to the dtype, the smallest to multiples of its least number; means of values are off as those of
    keys are, the sum over n keys adds n·u, and the output is rounded.
    """
    single, own = np.finfo(np.float32), np.finfo(dtype)
    u, w = single.eps / 2, own.eps / 2
    counts = (shares > 0).sum(1)
    biases, of_mean = np.log(counts), np.where(counts > 1, counts * u + w, 0)
    scores = np.where(seen, scale * query @ (shares @ key).T + biases, -np.inf)
    some = seen.any(1, keepdims=True)
    highest = np.where(some, scores.max(1, keepdims=True), 0)
    log_weights = scores - highest
    log_weights = log_weights - np.log(
        np.exp(log_weights).sum(1, keepdims=True), where=some, out=np.zeros_like(highest)
    )
    weights = np.exp(log_weights)
    output = weights @ (shares @ value)

    products = scale * np.abs(query) @ (shares @ np.abs(key)).T
    of_score = ((query.shape[1] + 16) * u + of_mean) * products + 16 * u * biases
    delta = np.where(seen, of_score, 0).max(1, keepdims=True)
    raised = np.exp(np.minimum(0, log_weights + 2 * delta)) - weights
    off = np.maximum(raised, -np.expm1(-2 * delta) * weights)
    largest = weights.argmax(1)[:, None]
    others = off.sum(1, keepdims=True) - np.take_along_axis(off, largest, 1)
    np.put_along_axis(off, largest, np.minimum(np.take_along_axis(off, largest, 1), others), 1)
    rounded = ((len(shares) + 16) * u + 2 * w + of_mean) * (weights + off) + seen * float(own.smallest_subnormal)
    return Answer(output, (off + rounded) @ (shares @ np.abs(value)) + float(own.smallest_subnormal))
