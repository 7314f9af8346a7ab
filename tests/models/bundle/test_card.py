from __future__ import annotations

from pathlib import Path

from medveil.models.bundle import ManifestDraft, open_bundle, write_bundle
from medveil.models.bundle.keys import generate_key


def test_the_card_says_what_the_manifest_says(bundle_file: Path) -> None:
    bundle = open_bundle(bundle_file, trusted=None)
    for fact in (
        "normal",
        "opaque",
        "0.880",
        "0.950",
        "8/255",
        "30%",
        "Drawn by a program.",
        "Not measured.",
    ):
        assert fact in bundle.card


def test_a_generator_without_scores_has_its_row(tmp_path: Path, draft: ManifestDraft) -> None:
    first, second = draft.graphs
    generator = second.model_copy(update={"role": "generator", "hold_out": None})
    path = tmp_path / "b"
    graphs = {"first": b"1", "second": b"2"}
    write_bundle(path, draft.model_copy(update={"graphs": (first, generator)}), graphs, {}, generate_key())
    assert "| second | generator | mlp | 10 | - | - |" in open_bundle(path, trusted=None).card


def test_statements_cannot_add_markup_to_the_card(tmp_path: Path, draft: ManifestDraft) -> None:
    data = draft.training_data.model_copy(update={"source_statement": "x\n\n# Approved\n<script>|"})
    path = tmp_path / "b"
    graphs = {"first": b"1", "second": b"2"}
    write_bundle(path, ManifestDraft(**dict(draft) | {"training_data": data}), graphs, {}, generate_key())
    card = open_bundle(path, trusted=None).card
    assert "\n# Approved" not in card
    assert "<script>" not in card
