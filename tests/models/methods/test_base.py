"""The values at the door: batches and keyed randomness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medveil.models.errors import InputError
from medveil.models.methods import Batch
from medveil.models.methods.randomness import generator_for

GOOD = np.full((2, 1, 3, 3), 0.5, np.float32)
LABELS = np.array([0, 1])
KEYS = (b"a", b"b")


@pytest.mark.parametrize(
    ("images", "labels", "keys", "code"),
    [
        (GOOD.astype(np.float64), LABELS, KEYS, "batch-shape"),
        (GOOD[:, 0], LABELS, KEYS, "batch-shape"),
        (GOOD[:, :, :0], LABELS, KEYS, "batch-shape"),
        (GOOD, LABELS[:1], KEYS, "batch-shape"),
        (GOOD, LABELS.astype(np.float32), KEYS, "batch-shape"),
        (GOOD, LABELS - 1, KEYS, "batch-shape"),
        (GOOD, LABELS, KEYS[:1], "batch-shape"),
        (GOOD * 255, LABELS, KEYS, "batch-range"),
        (GOOD - 1, LABELS, KEYS, "batch-range"),
        (GOOD * np.float32(np.nan), LABELS, KEYS, "batch-range"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(
    images: Any, labels: Any, keys: Any, code: str
) -> None:
    with pytest.raises(InputError) as refused:
        Batch(images, labels, keys)
    assert refused.value.code == code


def test_an_editable_area_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError):
        Batch(GOOD, LABELS, KEYS, np.ones((2, 3, 3), bool))


def test_selected_images_keep_label_key_and_area() -> None:
    editable = np.array([True, False])[:, None, None, None] & np.ones((2, 1, 3, 3), bool)
    one = Batch(GOOD, LABELS, KEYS, editable).select(np.array([1]))
    assert (one.labels.tolist(), one.keys, len(one)) == ([1], (b"b",), 1)
    assert one.editable is not None
    assert not one.editable.any()


def test_a_generator_belongs_to_key_seed_and_purpose() -> None:
    def draw(*triple: Any) -> int:
        return int(generator_for(*triple).integers(2**60))

    assert draw(b"key", 1, "mask") == draw(b"key", 1, "mask")
    others = [(b"kez", 1, "mask"), (b"key", 2, "mask"), (b"key", 1, "ar"), (b"key|1", 1, "mask")]
    assert len({draw(b"key", 1, "mask"), *(draw(*other) for other in others)}) == 5


def test_no_two_triples_hash_the_same_bytes() -> None:
    assert generator_for(b"a|1", 1, "x").random() != generator_for(b"a", 1, "1|x").random()


def test_the_stream_of_a_key_does_not_change_between_releases() -> None:
    # A change here changes every protected image: it needs a new version of the methods.
    assert generator_for(b"medveil", 0, "mask").integers(0, 1000, 4).tolist() == [464, 824, 64, 901]


def test_room_of_another_shape_is_refused_and_a_selection_keeps_its_own() -> None:
    down, up = -np.arange(18, dtype=np.float32).reshape(GOOD.shape), np.ones(GOOD.shape, np.float32)
    with pytest.raises(InputError):
        Batch(GOOD, LABELS, KEYS, room=(down, up[:, :, :1]))
    one = Batch(GOOD, LABELS, KEYS, room=(down, up)).select(np.array([1]))
    assert one.room is not None
    assert np.array_equal(one.room[0], down[1:])
