"""What a generator says is gated, bounded and joined by our code, whatever it says, in two and three dimensions."""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
import pytest

from medveil.agent.imageio import FullRange, Image
from medveil.agent.segmentation.label_map import LabelMap
from medveil.models.errors import ImageError, InputError
from medveil.models.methods.segmentation import MaskedBatch


def image_of(pixels: np.ndarray, frame: int = 0) -> Image:
    return Image(pixels, FullRange(255), PurePosixPath("a.png"), frame)


@pytest.fixture
def masked(picture, disc) -> tuple[Image, LabelMap]:
    return image_of(picture(40, 36)), LabelMap(disc())


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_nothing_moves_outside_the_gate_and_nothing_further_than_epsilon(value, perturber, says, masked):
    image, mask = masked
    plus = perturber(generator=says(value), band_radius=2)
    delta = plus.wanted([image], [mask])
    batch = MaskedBatch(
        (image.pixels / np.float32(255))[None, None].astype(np.float32),
        mask.classes[None].astype(np.int64),
        (b"",),
    )
    gate = plus.method.gate(batch, plus.settings)
    assert delta.shape == (1, 1, 40, 36)
    assert 0 < np.abs(delta).max() <= 4 / 255
    assert not delta[~gate].any()
    assert gate.any()
    assert not gate.all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.5])
def test_a_hostile_generator_is_refused(value, perturber, says, masked):
    with pytest.raises(InputError):
        perturber(generator=says(value)).wanted([masked[0]], [masked[1]])


def test_a_rounding_error_of_the_runtime_is_no_hostility(perturber, says, masked):
    beyond = float(np.nextafter(np.float32(1), np.float32(2)))
    found = perturber(generator=says(beyond)).wanted([masked[0]], [masked[1]])
    np.testing.assert_array_equal(found, perturber(generator=says(1.0)).wanted([masked[0]], [masked[1]]))


def test_an_image_gets_the_same_change_in_any_company(perturber, picture, disc):
    pairs = [(image_of(picture(40, 36)), LabelMap(disc(radius=r))) for r in (6, 9, 12)]
    together = perturber().wanted([image for image, _ in pairs], [mask for _, mask in pairs])
    for (image, mask), expected in zip(pairs, together, strict=True):
        np.testing.assert_array_equal(perturber().wanted([image], [mask])[0], expected)


def test_the_size_of_the_tiles_leaves_no_seam(perturber, masked):
    small, large = (perturber(tile=tile).wanted([masked[0]], [masked[1]]) for tile in ((12, 16), (40, 36)))
    np.testing.assert_allclose(small, large, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("colour", "channels"), [(False, 3), (True, 1), (True, 3)])
def test_grey_and_colour_images_meet_grey_and_colour_generators(colour, channels, perturber, picture, disc):
    image = image_of(picture(40, 36, 3) if colour else picture(40, 36))
    delta = perturber(channels=channels).wanted([image], [LabelMap(disc())])
    assert delta.shape == (1, 3 if colour else 1, 40, 36)
    assert delta.any()


@pytest.fixture
def volume(rng, disc) -> tuple[list[Image], list[LabelMap]]:
    pixels = rng.integers(30, 220, (37, 20, 24), np.uint8)
    maps = [disc(20, 24, radius=r) if 5 < r < 9 else np.zeros((20, 24), np.uint8) for r in range(37)]
    return [image_of(p, frame) for frame, p in enumerate(pixels)], [LabelMap(m) for m in maps]


class Counted:
    """The slices of a volume, and which of them were read in the last moment."""

    def __init__(self, images: list[Image]) -> None:
        self._images = images
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, frame: int) -> Image:
        self.read.append(frame)
        return self._images[frame]


@pytest.mark.parametrize("method", ["voxshield", "umed", "grating-volume"])
@pytest.mark.parametrize("depth", [8, 12, 40])
def test_a_volume_made_in_slabs_is_the_volume_made_whole(method, depth, perturber, volume):
    images, maps = volume
    made = perturber(method, tile=(depth, 16, 16), band_radius=2)
    slabs = made.of_volume(images, lambda image: maps[image.frame])
    found = np.stack([slabs.of_slice(frame) for frame in range(len(images))], axis=1)
    shown = np.stack([image.pixels for image in images])[None, None].astype(np.float32) / np.float32(255)
    labels = np.stack([m.classes for m in maps])[None].astype(np.int64)
    answers = perturber(method, tile=(40, 20, 24), band_radius=2).answers(shown)
    whole = made.method.perturb(MaskedBatch(shown, labels, (b"",)), answers, made.settings)
    np.testing.assert_allclose(found, whole[0], rtol=0, atol=1e-6)
    assert found.any()


def test_slices_in_any_order_and_after_an_interruption_are_the_same(perturber, volume):
    images, maps = volume
    fresh = perturber("voxshield", tile=(8, 16, 16)).of_volume(images, lambda image: maps[image.frame])
    resumed = perturber("voxshield", tile=(8, 16, 16)).of_volume(images, lambda image: maps[image.frame])
    expected = [fresh.of_slice(frame) for frame in range(len(images))]
    for frame in (8, 6, 36, 7):
        np.testing.assert_array_equal(resumed.of_slice(frame), expected[frame])


def test_tiles_without_any_structure_are_not_asked_about(perturber, volume, local_contrast):
    """Slices 6 to 8 of 37 hold a disc of the middle; the noise is that of asking about everything."""
    images, maps = volume
    ask, all_of_it = local_contrast(), local_contrast()
    found = perturber("voxshield", ask, tile=(8, 16, 16)).of_volume(images, lambda i: maps[i.frame])
    marked = [frame for frame in range(37) if maps[frame].classes.any()]
    for frame in range(37):
        assert found.of_slice(frame).any() == (frame in marked)
    shown = np.stack([image.pixels for image in images])[None, None].astype(np.float32) / np.float32(255)
    perturber("voxshield", all_of_it, tile=(8, 16, 16)).answers(shown)
    asked, possible = (sum(shape[0] for shape in one.shapes) for one in (ask, all_of_it))
    assert 0 < asked < possible / 3


def test_a_slice_in_which_nothing_is_marked_asks_nobody(perturber, local_contrast, masked):
    ask = local_contrast()
    blank = LabelMap(np.zeros((40, 36), np.uint8))
    assert not perturber(generator=ask).wanted([masked[0]], [blank]).any()
    assert not ask.shapes


def test_a_slab_reads_its_own_slices_only(perturber, volume):
    images, maps = volume
    frames = Counted(images)
    perturber("voxshield", tile=(8, 16, 16)).of_volume(frames, lambda i: maps[i.frame]).of_slice(20)
    assert max(frames.read) - min(frames.read) < 8 + 2


def test_single_images_are_refused_where_generators_look_across_slices(perturber, masked):
    with pytest.raises(ImageError) as refused:
        perturber("voxshield", tile=(8, 16, 16)).wanted([masked[0]], [masked[1]])
    assert refused.value.code == "volume-needed"
