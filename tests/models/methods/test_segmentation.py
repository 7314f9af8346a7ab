"""What every segmentation method promises, whatever its generators say; and the pieces of UMed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from medveil.models.errors import ConfigurationError, InputError
from medveil.models.methods import contour, grating, texture
from medveil.models.methods.base import IntArray
from medveil.models.methods.oracle import FloatArray
from medveil.models.methods.segmentation import (
    SEGMENTATION_METHODS,
    MaskedBatch,
    SegmentationMethod,
    SegmentationSettings,
    get_segmentation,
)
from medveil.models.quality import blurred

EPSILON = 4 / 255
PLANES, VOLUMES = (17, 14), (6, 11, 10)
SHAPES = [(1, *PLANES), (3, *PLANES)]
GENERATED = [name for name, method in SEGMENTATION_METHODS.items() if method.generators]
MakeMasked = Callable[..., MaskedBatch]


@pytest.fixture
def make_masked() -> MakeMasked:
    """Draw images full of 0s, 1s and values between, with two touching organs, keyed by their own bytes."""

    def make(count: int = 5, shape: tuple[int, ...] = (1, *PLANES), seed: int = 3) -> MaskedBatch:
        rng = np.random.default_rng(seed)
        images = np.clip(rng.normal(0.5, 0.4, (count, *shape)), 0, 1).astype(np.float32)
        labels = np.zeros((count, *shape[1:]), np.int64)
        labels[..., 4:12, 1:6] = 1
        labels[..., 4:12, 6:9] = 2
        return MaskedBatch(images, labels, tuple(hashlib.sha256(i.tobytes()).digest() for i in images))

    return make


def wild_answers(method: SegmentationMethod, batch: MaskedBatch, seed: int = 0) -> dict[str, FloatArray]:
    """Answers at the very borders of what a generator may say."""
    rng = np.random.default_rng(seed)
    drawn = rng.uniform(-3, 3, (len(method.generators), *batch.images.shape))
    return {
        part: np.clip(field, -1, 1).astype(np.float32)
        for part, field in zip(method.generators, drawn, strict=True)
    }


def cases() -> list[object]:
    volumes = [name for name in SEGMENTATION_METHODS if not name.startswith("seg-")]
    flat = [(name, shape) for name in SEGMENTATION_METHODS for shape in SHAPES]
    deep: list[tuple[str, tuple[int, ...]]] = [(name, (1, *VOLUMES)) for name in volumes]
    return [
        pytest.param(name, shape, id=f"{name}-{len(shape)}d-{shape[0]}") for name, shape in [*flat, *deep]
    ]


@pytest.mark.parametrize(("name", "shape"), cases())
def test_noise_keeps_budget_range_and_gate(
    make_masked: MakeMasked, name: str, shape: tuple[int, ...]
) -> None:
    method, batch = get_segmentation(name), make_masked(4, shape)
    settings = SegmentationSettings(epsilon=EPSILON, band_radius=1)
    delta = method.perturb(batch, wild_answers(method, batch), settings)
    assert delta.shape == batch.images.shape
    assert delta.dtype == np.float32
    assert float(np.abs(delta).max()) <= EPSILON
    released = batch.images + delta
    assert released.min() >= 0
    assert released.max() <= 1
    gate = np.broadcast_to(method.gate(batch, settings), delta.shape)
    assert not delta[~gate].any()
    assert delta[gate].any()


@pytest.mark.parametrize("name", [n for n in SEGMENTATION_METHODS if not n.startswith("seg-")])
def test_far_from_every_mask_nothing_moves(make_masked: MakeMasked, name: str) -> None:
    method, batch = get_segmentation(name), make_masked()
    delta = method.perturb(batch, wild_answers(method, batch), SegmentationSettings(band_radius=2))
    far = np.broadcast_to(~contour.band(batch.labels, 2)[:, None] & (batch.labels == 0)[:, None], delta.shape)
    assert far.any()
    assert not delta[far].any()


@pytest.mark.parametrize("name", [n for n in SEGMENTATION_METHODS if not n.startswith("seg-")])
def test_an_image_without_foreground_stays_as_it_is(make_masked: MakeMasked, name: str) -> None:
    method, batch = get_segmentation(name), make_masked(2)
    empty = MaskedBatch(batch.images, np.zeros_like(batch.labels), batch.keys)
    assert not method.perturb(empty, wild_answers(method, empty), SegmentationSettings()).any()


@pytest.mark.parametrize("name", SEGMENTATION_METHODS)
def test_an_image_gets_the_same_noise_twice_and_in_any_company(make_masked: MakeMasked, name: str) -> None:
    method, batch = get_segmentation(name), make_masked(5)
    settings = SegmentationSettings()
    said = wild_answers(method, batch)
    whole = method.perturb(batch, said, settings)
    assert method.perturb(batch, said, settings).tobytes() == whole.tobytes()
    for i in range(5):
        index = np.array([i])
        alone = method.perturb(batch.select(index), {p: a[index] for p, a in said.items()}, settings)
        assert alone.tobytes() == whole[index].tobytes()


@pytest.mark.parametrize("name", ["roi-random", "seg-lsp", "seg-ar"])
def test_drawn_noise_belongs_to_the_key_and_the_seed(make_masked: MakeMasked, name: str) -> None:
    method, batch = get_segmentation(name), make_masked(2)
    same = MaskedBatch(np.full_like(batch.images, 0.5), batch.labels, batch.keys)
    first, second = method.perturb(same, None, SegmentationSettings())
    assert not np.array_equal(first, second)
    other = method.perturb(same, None, SegmentationSettings(seed=1))
    assert not np.array_equal(other[0], first)


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda a: np.full_like(a, np.nan), "not-finite"),
        (lambda a: np.full_like(a, np.inf), "not-finite"),
        (lambda a: np.full_like(a, 1.001), "generator-range"),
        (lambda a: a[..., :-1], "batch-shape"),
    ],
    ids=["nan", "inf", "range", "shape"],
)
def test_a_generator_that_answers_nonsense_is_refused(
    make_masked: MakeMasked, name: str, spoil: Callable[[FloatArray], FloatArray], code: str
) -> None:
    method, batch = get_segmentation(name), make_masked(2)
    said = wild_answers(method, batch)
    part = method.generators[-1]
    with pytest.raises(InputError) as refused:
        method.perturb(batch, said | {part: spoil(said[part])}, SegmentationSettings())
    assert refused.value.code == code


@pytest.mark.parametrize("name", GENERATED)
def test_a_missing_generator_is_refused(make_masked: MakeMasked, name: str) -> None:
    method, batch = get_segmentation(name), make_masked(1)
    with pytest.raises(ConfigurationError) as refused:
        method.perturb(batch, {}, SegmentationSettings())
    assert refused.value.code == "generator-missing"


def test_the_texture_bound_only_narrows(make_masked: MakeMasked) -> None:
    method, batch = get_segmentation("umed"), make_masked()
    bound, free = (SegmentationSettings(band_radius=1, texture_bound=on) for on in (True, False))
    said = wild_answers(method, batch)
    narrow, wide = (np.abs(method.perturb(batch, said, s)) for s in (bound, free))
    assert (narrow <= wide).all()
    assert (narrow < wide).any()


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ConfigurationError, match="umed, umed-plus, umed-targeted, voxshield") as refused:
        get_segmentation("salm")
    assert refused.value.code == "unknown-method"


@pytest.mark.parametrize("name", SEGMENTATION_METHODS)
def test_every_method_says_what_a_screen_needs(name: str) -> None:
    info = SEGMENTATION_METHODS[name].info
    assert info.name == name
    assert info.title
    assert info.source
    assert info.task == "segmentation"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"images": np.full((1, 1, 4, 4), np.nan, np.float32)}, "batch-range"),
        ({"images": np.full((1, 1, 4, 4), 1.5, np.float32)}, "batch-range"),
        ({"images": np.zeros((1, 1, 4, 4))}, "batch-shape"),
        ({"labels": np.zeros((1, 4, 5), np.int64)}, "batch-shape"),
        ({"labels": np.full((1, 4, 4), -1, np.int64)}, "batch-shape"),
        ({"keys": ()}, "batch-shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, object], code: str) -> None:
    fitting: dict[str, object] = {
        "images": np.zeros((1, 1, 4, 4), np.float32),
        "labels": np.zeros((1, 4, 4), np.int64),
        "keys": (b"k",),
    }
    with pytest.raises(InputError) as refused:
        MaskedBatch(**{**fitting, **change})  # type: ignore[arg-type]
    assert refused.value.code == code


# --- contour ------------------------------------------------------------------------------------------------


def disc(side: int = 21, radius: int = 6) -> IntArray:
    rows, columns = np.mgrid[:side, :side] - side // 2
    return (rows**2 + columns**2 <= radius**2).astype(np.int64)[None]


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_the_band_reaches_its_radius_to_both_sides_of_a_straight_border(radius: int) -> None:
    labels = np.zeros((1, 20, 20), np.int64)
    labels[:, :, 10:] = 1
    columns = np.flatnonzero(contour.band(labels, radius)[0].any(axis=0))
    assert columns.tolist() == list(range(10 - radius, 10 + radius))


def test_two_organs_that_touch_have_a_band_between_them() -> None:
    labels = np.zeros((1, 20, 20), np.int64)
    labels[:, 4:16, 4:10], labels[:, 4:16, 10:16] = 1, 2
    union = (labels > 0).astype(np.int64)
    assert contour.band(labels, 1)[0, 10, 9:11].all()
    assert not contour.band(union, 1)[0, 10, 9:11].any()


def test_the_images_own_edge_is_no_border() -> None:
    assert not contour.band(np.ones((1, 9, 9), np.int64), 2).any()


def test_band_and_interior_cover_the_foreground_once() -> None:
    labels = disc()
    around, inside = contour.band(labels, 2), contour.interior(labels, 2)
    assert not (around & inside).any()
    assert ((around | inside) >= (labels > 0)).all()
    assert not contour.band(labels, 0).any()
    assert (contour.interior(labels, 0) == (labels > 0)).all()


def test_a_volumes_band_is_a_box_in_three_dimensions() -> None:
    labels = np.zeros((1, 9, 9, 9), np.int64)
    labels[0, 4, 4, 4] = 1
    assert contour.band(labels, 1).sum() == 27


# --- texture ------------------------------------------------------------------------------------------------


def test_flat_regions_peaks_and_pits_have_their_shares() -> None:
    image = np.full((1, 1, 7, 7), 0.5, np.float32)
    image[0, 0, 3, 3] = 0.9
    share = texture.local_binary_share(image)
    assert share[0, 0, 3, 3] == 1  # nobody is brighter than a peak
    assert share[0, 0, 3, 4] == 7 / 8  # its neighbours have one brighter neighbour
    assert share[0, 0, 0, 0] == 1
    image[0, 0, 3, 3] = 0.1
    assert texture.local_binary_share(image)[0, 0, 3, 3] == 0


def test_channels_are_read_as_grey_and_volumes_by_their_faces(rng: np.random.Generator) -> None:
    colour = rng.random((2, 3, 8, 8), np.float32)
    grey = colour.mean(axis=1, keepdims=True)
    assert np.array_equal(texture.local_binary_share(colour), texture.local_binary_share(grey))
    volume = np.zeros((1, 1, 5, 5, 5), np.float32)
    volume[0, 0, 2, 2, 2] = 0.5
    share = texture.local_binary_share(volume)
    assert share[0, 0, 2, 2, 3] == np.float32(5 / 6)
    assert share[0, 0, 2, 3, 3] == 1  # a diagonal neighbour shares no face


# --- gratings -------------------------------------------------------------------------------------------------

GRATINGS = ["grating", "grating-coarse"]


def graded(shape: tuple[int, ...], labels: IntArray) -> MaskedBatch:
    """Mid-grey images: no change is cut by the range."""
    images = np.full((len(labels), *shape), 0.5, np.float32)
    return MaskedBatch(images, labels, tuple(bytes([i]) * 32 for i in range(len(labels))))


@pytest.mark.parametrize("name", GRATINGS)
def test_a_grating_uses_the_whole_budget_on_every_pixel_of_a_class(name: str) -> None:
    labels = np.zeros((1, 12, 12), np.int64)
    labels[:, 2:9, 3:10] = 1
    delta = get_segmentation(name).perturb(
        graded((3, 12, 12), labels), None, SegmentationSettings(band_radius=0)
    )
    inside = np.broadcast_to(labels[:, None] == 1, delta.shape)
    np.testing.assert_allclose(np.abs(delta[inside]), EPSILON, rtol=1e-5)
    assert not delta[~inside].any()
    assert np.array_equal(delta[:, 0], delta[:, 1])


@pytest.mark.parametrize("name", GRATINGS)
def test_no_two_classes_share_a_grating_nor_is_one_the_other_turned(name: str) -> None:
    everywhere = [np.full((1, 24, 24), label, np.int64) for label in (1, 2, 3, 4)]
    settings = SegmentationSettings(band_radius=0)
    waves = [
        get_segmentation(name).perturb(graded((1, 24, 24), one), None, settings)[0, 0] for one in everywhere
    ]
    for number, wave in enumerate(waves):
        for other in waves[number + 1 :]:
            for turned in (other, -other, other.T, -other.T):
                assert not np.array_equal(wave, turned)


@pytest.mark.parametrize("name", GRATINGS)
def test_every_image_and_every_slice_has_the_same_grating(name: str) -> None:
    method, settings = get_segmentation(name), SegmentationSettings(band_radius=0)
    planes = method.perturb(graded((1, 16, 16), np.ones((2, 16, 16), np.int64)), None, settings)
    volume = method.perturb(graded((1, 3, 16, 16), np.ones((1, 3, 16, 16), np.int64)), None, settings)
    assert np.array_equal(planes[0], planes[1])
    for slice_number in range(3):
        assert np.array_equal(volume[0, 0, slice_number], planes[0, 0])


def test_a_volumes_grating_turns_from_slice_to_slice_and_no_two_classes_share_one() -> None:
    method, settings = get_segmentation("grating-volume"), SegmentationSettings(band_radius=0)

    def wave(label: int) -> np.ndarray:
        labels = np.full((1, 16, 24, 24), label, np.int64)
        return method.perturb(graded((1, 16, 24, 24), labels), None, settings)[0, 0]

    waves = [wave(label) for label in (1, 2, 3, 4)]
    first = waves[0]
    assert np.array_equal(first[1:], -first[:-1])
    assert np.array_equal(first[:, 1:], -first[:, :-1])
    assert np.array_equal(first[..., 1:], -first[..., :-1])
    for number, one in enumerate(waves):
        np.testing.assert_allclose(np.abs(one), EPSILON, rtol=1e-5)
        for other in waves[number + 1 :]:
            for turned in (other, other.swapaxes(1, 2)):
                assert abs((one * turned).mean()) < 1e-9, "one tells nothing of the other"


def test_where_a_volume_is_cut_makes_no_difference_to_its_grating(rng: np.random.Generator) -> None:
    method, settings = get_segmentation("grating-volume"), SegmentationSettings(band_radius=0)
    whole = graded((1, 9, 8, 8), rng.integers(0, 5, (1, 9, 8, 8)))
    expected = method.perturb(whole, None, settings)
    for first in (1, 2, 3):
        part = MaskedBatch(whole.images[:, :, first:], whole.labels[:, first:], whole.keys, first_slice=first)
        assert np.array_equal(method.perturb(part, None, settings), expected[:, :, first:])
        assert part.select(np.array([0])).first_slice == first


def test_a_grating_grows_into_the_background_of_its_slice_and_into_no_other_class() -> None:
    labels = np.zeros((1, 3, 9, 9), np.int64)
    labels[0, 1, 4, 2:4], labels[0, 1, 4, 4:6] = 1, 2
    reached = grating.grown(labels, 2)
    assert not reached[0, [0, 2]].any()
    assert (reached[0, 1, 2:7, 0:8] > 0).all()
    assert np.array_equal(reached[labels > 0], labels[labels > 0])
    assert reached[0, 1].max() == 2
    assert not reached[0, 1, :, 8].any()
    assert np.array_equal(grating.grown(labels, 0), labels)


def test_a_blur_takes_a_fine_grating_away_and_leaves_of_a_coarse_one() -> None:
    left = {}
    for name in GRATINGS:
        batch = graded((1, 32, 32), np.ones((1, 32, 32), np.int64))
        delta = get_segmentation(name).perturb(batch, None, SegmentationSettings(band_radius=0))
        left[name] = float(np.abs(blurred(delta)[..., 8:24, 8:24]).max() / EPSILON)
    assert left["grating"] < 0.01
    assert left["grating-coarse"] > 0.2
