"""The demonstration's hospitals: unequal, skewed, and no image at two of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from medveil.agent.demo import sites
from medveil.agent.demo.sites import SITES, draw_sites, split_sites
from medveil.models.errors import ConfigurationError, InputError


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sites, "_PHANTOMS", 40)
    return 40


def test_phantoms_are_dealt_out_as_dicom_with_names_of_their_own(few: int, tmp_path: Path) -> None:
    places = draw_sites(tmp_path / "once").sources
    files = [path for place in places.values() for path in place.rglob("*.dcm")]
    objects = [pydicom.dcmread(path) for path in files]
    assert len({item.SOPInstanceUID for item in objects}) == len(files) == few
    assert len({item.PixelData for item in objects}) == few
    assert all(item.pixel_array.max() > 255 for item in objects)
    assert len({len(list(place.rglob("*.dcm"))) for place in places.values()}) == len(SITES)
    shares = [
        len(list((place / "clear").iterdir())) / len(list(place.rglob("*.dcm"))) for place in places.values()
    ]
    assert max(shares) - min(shares) > 0.1
    again = draw_sites(tmp_path / "again").sources
    for site, place in places.items():
        for file in place.rglob("*.dcm"):
            assert (again[site] / file.relative_to(place)).read_bytes() == file.read_bytes()


def test_the_users_images_go_to_one_site_each(tmp_path: Path) -> None:
    images = np.arange(90, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    labels = (np.arange(90) % 3 == 0).astype(np.uint8)[:, None]
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "set.npz", train_images=images, train_labels=labels)
    hospitals = split_sites(folder, tmp_path / "demo", own_bundle=True)
    places = hospitals.sources
    assert not hospitals.aliases
    dealt = []
    for place in places.values():
        with np.load(place) as part:
            numbers = part["train_images"][:, 0, 0]
            assert (part["train_labels"][:, 0] == labels[numbers, 0]).all()
            dealt.append(numbers)
    assert sorted(np.concatenate(dealt)) == list(range(90))
    assert len({len(numbers) for numbers in dealt}) == len(SITES)


def test_a_folder_per_class_is_dealt_out_whole(tmp_path: Path) -> None:
    for name, count in (("a", 12), ("b", 9)):
        for number in range(count):
            file = tmp_path / "data" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"{name}{number}".encode())
    hospitals = split_sites(tmp_path / "data", tmp_path / "demo", own_bundle=False)
    places = hospitals.sources
    assert hospitals.aliases == {"a": "clear", "b": "nodules"}
    contents = [file.read_bytes() for place in places.values() for file in place.rglob("*.png")]
    assert len(contents) == len(set(contents)) == 21


def test_more_classes_than_the_shipped_bundle_has_need_one_of_their_own(tmp_path: Path) -> None:
    labels = np.arange(6, dtype=np.uint8)[:, None] % 3
    np.savez(tmp_path / "set.npz", train_images=np.ones((6, 8, 8), np.uint8), train_labels=labels)
    with pytest.raises(ConfigurationError, match="demo-bundle"):
        split_sites(tmp_path / "set.npz", tmp_path / "demo", own_bundle=False)
    assert split_sites(tmp_path / "set.npz", tmp_path / "demo", own_bundle=True).aliases == {}
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="data-format"):
        split_sites(tmp_path / "empty", tmp_path / "demo", own_bundle=True)
