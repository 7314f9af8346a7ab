"""The contact sheet: private, the same at every run, every class on it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.agent.contact_sheet import chosen_examples, write_contact_sheet
from medveil.agent.imageio import raster_formats
from medveil.agent.ledger import Ledger
from medveil.agent.protect import protect


@pytest.fixture
def drawn(analytic, npz_source, tmp_path):
    outcome = protect(analytic.make_job(npz_source, tmp_path / "out"))
    with Ledger(outcome.workspace.ledger_path) as ledger:
        yield outcome.workspace, ledger, npz_source.parent


def test_the_sheet_lies_in_the_private_folder_for_its_owner_only(drawn, analytic):
    workspace, ledger, root = drawn
    assert write_contact_sheet(workspace, ledger, root, raster_formats(), analytic.CLASSES)
    assert workspace.contact_sheet.parent == workspace.private
    assert workspace.contact_sheet.stat().st_mode & 0o077 == 0
    with PillowImage.open(workspace.contact_sheet) as sheet:
        assert sheet.height > 8 * 150


def test_the_sheet_is_the_same_at_every_run(drawn, analytic):
    workspace, ledger, root = drawn
    sheets = []
    for _ in range(2):
        write_contact_sheet(workspace, ledger, root, raster_formats(), analytic.CLASSES)
        sheets.append(workspace.contact_sheet.read_bytes())
    assert sheets[0] == sheets[1]


def test_examples_show_what_was_released_beside_its_own_original(drawn, analytic):
    workspace, ledger, root = drawn
    examples = chosen_examples(workspace, ledger, root, raster_formats(), analytic.CLASSES)
    assert len(examples) == 8
    assert {example.caption.split("\n")[0] for example in examples} == set(analytic.CLASSES)
    for example in examples:
        change = example.protected.astype(int) - example.image.pixels
        assert 0 < np.abs(change).max() <= 8


def test_without_a_verified_image_there_is_no_sheet(analytic, folder_source, tmp_path):
    outcome = protect(analytic.make_job(folder_source, tmp_path / "out", epsilon=0.5))
    with Ledger(outcome.workspace.ledger_path) as ledger:
        assert not write_contact_sheet(
            outcome.workspace, ledger, folder_source, raster_formats(), analytic.CLASSES
        )
    assert not outcome.workspace.contact_sheet.exists()
