"""The demo's scenes: what the seed decides, and what captions say."""

from collections import Counter

import numpy
import pytest
from PIL import ImageChops, ImageStat

from grat_cli.demo import vocabulary
from grat_cli.demo.drawing import COLOURS
from grat_cli.demo.places import PLACES
from grat_cli.demo.scenes import draw_scene, known_words
from grat_cli.demo.subjects import SUBJECTS

SEEDS = range(400)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(seed, 32) for seed in SEEDS]


def test_the_seed_decides_the_scene() -> None:
    first, again, other = draw_scene(7, 64), draw_scene(7, 64), draw_scene(8, 64)
    assert (first.caption, first.picture.tobytes()) == (again.caption, again.picture.tobytes())
    assert first.picture.tobytes() != other.picture.tobytes()


def test_a_scene_is_the_same_at_every_side() -> None:
    small, large = draw_scene(7, 64), draw_scene(7, 256)
    assert small.caption == large.caption
    difference = ImageChops.difference(large.picture.resize((64, 64)), small.picture)
    # Edges fall on other pixels; 16 of 255 on average is less than an eighth of the pixels turning black to white.
    assert max(ImageStat.Stat(difference).mean) < 16


def test_captions_use_known_words_and_at_most_one_made_up(scenes) -> None:
    known = set(known_words())
    unknown = Counter(len(set(scene.caption.replace(",", "").split()) - known) for scene in scenes)
    assert set(unknown) <= {0, 1}
    # 7% of captions are meant to hold a made-up word; 15% is six standard deviations of 400 draws away.
    assert 0 < unknown[1] < 0.15 * len(scenes)


def test_captions_say_what_is_drawn(scenes) -> None:
    for scene in scenes:
        assert scene.subject in scene.caption
        named = set(scene.caption.replace(",", "").split()) & set(COLOURS)
        if named - {"blue"}:  # a blue sky is not a blue subject
            assert scene.colour in named
        elif not named:
            assert scene.colour in SUBJECTS[scene.subject].natural


def test_every_subject_colour_and_place_is_drawn(scenes) -> None:
    assert {scene.subject for scene in scenes} == set(SUBJECTS)
    assert {scene.colour for scene in scenes} == set(COLOURS)
    assert {scene.place for scene in scenes} == set(PLACES)


def test_the_mask_covers_a_large_subject_in_its_colour() -> None:
    for seed in range(40):
        scene = draw_scene(seed, 64)
        covered = ImageStat.Stat(scene.mask).mean[0] / 255
        assert 0.08 < covered < 0.6, scene.caption
        pixels = numpy.asarray(scene.picture)[numpy.asarray(scene.mask) == 255]
        painted = (pixels == COLOURS[scene.colour]).all(-1)
        assert painted.mean() > 0.1, scene.caption


def test_the_vocabulary_lists_the_words_by_kind() -> None:
    words = vocabulary()
    assert {"fox", "boat"} <= set(words["subjects"])
    assert {"red", "blue"} <= set(words["colours"])
    assert {"in the snow", "at night"} <= set(words["places"])
    assert set(known_words()) == {word for kind in words.values() for phrase in kind for word in phrase.split()}
