"""What lies beside the protected copies: the manifest of the release, and labels where a CSV gave them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import PurePosixPath

from medveil.agent.job import Job
from medveil.agent.ledger import FileRow, FileState, Ledger
from medveil.agent.workspace import LABELS_NAME, MANIFEST_NAME, Workspace
from medveil.models.disk import write_atomically

__all__ = ["publish_lists"]


def publish_lists(job: Job, workspace: Workspace, ledger: Ledger, *, with_labels: bool) -> None:
    """Write the release's manifest, and its labels if they came from a CSV. Nothing private goes in."""
    released = [file for file in ledger.files(FileState.DONE) if file.output_sha256 is not None]
    if not released:
        return
    with ledger.transaction():
        ledger.set_meta("released", "1")
    totals = ledger.totals()
    manifest = {
        "format": "medveil release 1",
        "settings": dict(job.settings),
        "images": totals.images,
        "verified": totals.verified,
        "not_protectable": totals.not_protectable,
        "quarantined": sum(totals.quarantined.values()),
        "epsilon_max": totals.epsilon_max,
        "psnr_db": totals.psnr_db_median,
        "files": [{"path": str(file.target), "sha256": file.output_sha256} for file in released],
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    write_atomically(workspace.output(PurePosixPath(MANIFEST_NAME)), text.encode())
    if with_labels:
        write_atomically(
            workspace.output(PurePosixPath(LABELS_NAME)),
            _labels(released, ledger, job.taxonomy.names).encode(),
        )


def _labels(released: Sequence[FileRow], ledger: Ledger, names: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["file", "label"])
    for file in released:
        receipts = [image.receipt for image in ledger.images(file.id)]
        if receipts and receipts[0] is not None:
            writer.writerow([str(file.target), names[receipts[0].class_index]])
    return buffer.getvalue()
