"""Stored values and names become classes of the bundle, or a named refusal; nothing is guessed."""

from __future__ import annotations

import numpy as np
import pytest

from medveil.agent.imageio import Taxonomy
from medveil.agent.segmentation.label_map import ClassMap, LabelMap, check_tells_apart, merged
from medveil.models.errors import ConfigurationError, ImageError

VESSEL = Taxonomy(("background", "vessel"), (0, 1))
CELL = Taxonomy(("background", "cytoplasm", "nucleus"), (0, 1, 2))


@pytest.mark.parametrize("foreground", [1, 255, 65535])
def test_one_structure_may_be_written_in_every_usual_way(foreground):
    found = ClassMap(VESSEL).of_values(np.array([[0, foreground]], np.uint16))
    assert found.tolist() == [[0, 1]]
    assert found.dtype == np.uint8


def test_yes_means_the_class_that_a_name_says_unless_a_class_has_that_value():
    stored = np.array([[0, 1, 255]], np.uint8)
    assert ClassMap(CELL).of_values(stored, yes=2).tolist() == [[0, 1, 2]]
    assert ClassMap(VESSEL).of_values(stored).tolist() == [[0, 1, 1]]


def test_values_stand_for_the_classes_that_store_them():
    classes = ClassMap(Taxonomy(("background", "cytoplasm", "nucleus"), (0, 128, 255)))
    assert classes.of_values(np.array([[255, 0], [128, 255]], np.uint8)).tolist() == [[2, 0], [1, 2]]


def test_whole_numbers_stored_as_floats_are_labels():
    assert ClassMap(CELL).of_values(np.array([[0.0, 2.0]], np.float32)).tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (np.array([[3]], np.uint8), "unknown-class"),
        (np.array([[255]], np.uint8), "unknown-class"),
        (np.array([[-1]], np.int16), "unknown-class"),
        (np.array([[0.5]], np.float32), "mask-type"),
        (np.array([[np.nan]], np.float32), "mask-type"),
        (np.array([[1j]]), "mask-type"),
    ],
)
def test_a_value_that_stands_for_no_class_is_refused_by_name(values, code):
    with pytest.raises(ImageError) as refused:
        ClassMap(CELL).of_values(values)
    assert refused.value.code == code


def test_the_site_may_say_what_its_names_and_values_mean():
    classes = ClassMap(CELL, {"Kern": "nucleus", "7": "cytoplasm", "External": "background"})
    assert classes.of_name("kern ") == 2
    assert classes.of_name("EXTERNAL") == 0
    assert classes.of_values(np.array([[7, 0]], np.uint8)).tolist() == [[1, 0]]


def test_the_first_known_of_several_names_counts():
    assert ClassMap(CELL).of_name("Segment 1", "Nucleus") == 2
    with pytest.raises(ImageError, match="cytoplasm"):
        ClassMap(CELL).of_name("Segment 1", "Liver")


def test_an_alias_for_no_class_of_the_bundle_is_a_mistake_in_the_policy():
    with pytest.raises(ConfigurationError, match="alias"):
        ClassMap(CELL, {"GTV": "tumour"})


@pytest.mark.parametrize(("value", "code"), [(0, "empty-mask"), (2, "full-mask")])
def test_a_mask_of_one_class_all_over_says_nothing(value, code):
    with pytest.raises(ImageError) as refused:
        check_tells_apart(np.full((3, 3), value, np.uint8))
    assert refused.value.code == code


def test_two_structures_that_fill_the_image_tell_something_apart():
    check_tells_apart(np.array([[1, 2]], np.uint8))


def test_where_masks_overlap_the_inner_class_wins():
    organ, tumour = np.array([[1, 1, 0]], np.uint8), np.array([[0, 2, 2]], np.uint8)
    for order in ([organ, tumour], [tumour, organ]):
        assert merged(order).classes.tolist() == [[1, 2, 2]]


def test_the_main_class_is_the_largest_structure_never_background():
    assert LabelMap(np.array([[0, 0, 0, 0, 2, 2, 1]], np.uint8)).main_class == 2
    assert LabelMap(np.zeros((2, 2), np.uint8)).main_class == 0


def test_a_label_map_can_not_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        LabelMap(np.zeros((2, 2), np.uint8)).classes[0, 0] = 1
