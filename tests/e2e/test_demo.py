"""The demonstration: on drawn phantoms with the bundle shipped here, or on one's own images."""

from __future__ import annotations

import shutil
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.models.bundle import open_bundle

LARGEST_BYTES = 400_000  # what may travel in every installation


def test_it_protects_what_it_draws_and_says_what_it_did_not_show(agent, home, tmp_path):
    shown = agent("demo", "--out", tmp_path / "demo")
    assert shown.code == 0, shown.stderr
    for place in ("demo/release", "demo/release.private", "contact_sheet.png", "demo/phantoms"):
        assert place in shown.stdout
    assert "No model was trained on these copies" in shown.stdout
    assert "trusted by the policy" in shown.stdout
    originals = sorted((tmp_path / "demo/phantoms").rglob("*.png"))
    assert {path.parent.name for path in originals} == {"clear", "nodules"}
    for original in originals:
        clean = np.asarray(PillowImage.open(original)).astype(int)
        copy = tmp_path / "demo/release" / original.relative_to(tmp_path / "demo/phantoms")
        change = np.abs(np.asarray(PillowImage.open(copy)).astype(int) - clean)
        assert 0 < change.max() <= 8
    assert not home.exists()  # the site's own key is none of a demonstration's business

    few, shipped = tmp_path / "few/clear", tmp_path / "demo/phantom.medveil"
    few.mkdir(parents=True)
    shutil.copy(originals[0], few)
    doctor = agent("doctor", few.parent, "--bundle", shipped, "--out", tmp_path, "--format", "json")
    assert doctor.code == 0
    assert any("2 of them a golden vector" in check["detail"] for check in doctor.json["checks"])

    again = agent("demo", "--out", tmp_path / "demo", "--format", "json")
    assert (again.code, again.json["finished_now"], again.json["source_is_drawn"]) == (0, 0, True)


def test_the_shipped_bundle_is_small_and_was_shown_to_work_on_victims():
    shipped = files("medveil.agent.demo") / "phantom.medveil"
    signer = (files("medveil.agent.demo") / "phantom.fingerprint").read_text().strip()
    assert len(shipped.read_bytes()) < LARGEST_BYTES
    bundle = open_bundle(shipped, trusted=(signer,))
    assert bundle.manifest.proxy_check is not None
    assert bundle.manifest.proxy_check.effective


@pytest.mark.parametrize("kind", ["folders", "labels file", "npz"])
def test_images_of_other_classes_need_a_bundle_of_their_own(kind, agent, bundle, source, tmp_path):
    if kind == "labels file":
        (source / "labels.csv").write_text("file,label\nNORMAL/0.png,healthy\n")
    elif kind == "npz":
        np.savez(
            tmp_path / "set.npz", train_images=np.ones((2, 8, 8), np.uint8), train_labels=np.ones((2, 1))
        )
        source = tmp_path / "set.npz"
    refused = agent("demo", "--data", source, "--out", tmp_path / "demo", "--format", "json")
    assert (refused.code, refused.json["error"]["code"]) == (2, "demo-bundle")
    assert "medveil-coordinator train" in refused.json["error"]["message"]
    assert not (tmp_path / "demo").exists()


def test_with_a_bundle_it_takes_ones_own_images(agent, bundle, source, tmp_path):
    line = ("demo", "--data", source, "--bundle", bundle.path, "--out", tmp_path / "demo", "--format", "json")
    done = agent(*line)
    assert (done.code, done.json["verified"], done.json["source_is_drawn"]) == (0, 6, False)
    assert done.json["source"] == str(source)
