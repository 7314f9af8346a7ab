"""``pacs run``, a real process, killed without warning while it receives, protects and pushes."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")

from medveil.agent.imageio.pacs import DeliveryState, delivery_counts, inbox_counts
from medveil.agent.imageio.pacs.content import content_digest
from medveil.agent.ledger import ImageState, Ledger

STUDY = "1.2.3.4"
SLICES = 12
SIDES = (24, 30, 36, 42)
"""Sizes of the slices: images of one size make a batch, so protecting takes several steps."""

PATIENCE_S = 180.0
"""For one stage, on a loaded machine; alone each takes some seconds."""

STRUCK_AT = 3
"""Objects that had their turn in a stage when the process is killed in it."""


def kill_when(service: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Kill a process as soon as a condition holds that it brings about."""
    end = time.monotonic() + PATIENCE_S
    while not reached():
        assert service.poll() is None, "the service ended by itself"
        assert time.monotonic() < end
        time.sleep(0.002)
    service.send_signal(signal.SIGKILL)
    assert service.wait(timeout=60) == -signal.SIGKILL


def image_states(ledger: Path) -> Counter[str]:
    """Return the number of images in each state, as an onlooker sees them."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as database:
        return Counter(state for (state,) in database.execute("SELECT state FROM images"))
    return Counter()


def copies_by_source(orthanc: Any, folder: Path) -> dict[str, list[str]]:
    """Return the content digests of the protected copies that the PACS holds, by the UID of their source."""
    folder.mkdir(exist_ok=True)
    found: dict[str, list[str]] = {}
    for uid, dataset in orthanc.objects(folder).items():
        if not uid.startswith(STUDY):
            source = str(dataset.SourceImageSequence[0].ReferencedSOPInstanceUID)
            found.setdefault(source, []).append(content_digest(Path(dataset.filename)))
    return found


def test_killed_in_every_stage_the_service_loses_nothing_and_sends_nothing_twice(
    orthanc: Any,
    make_object: Callable[..., Path],
    policy: Callable[..., Path],
    start_service: Callable[[Path], subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    for number in range(1, SLICES + 1):
        side = SIDES[number % len(SIDES)]
        pixels = np.random.default_rng(number).integers(0, 4096, (side, side), np.uint16)
        orthanc.put(make_object(number, Rows=side, Columns=side, PixelData=pixels.tobytes()))
    originals = set(orthanc.instances())
    rules = policy(orthanc, "dicom", "receive", quiet_s=1)
    door = tmp_path / "door"
    ledger = door / "releases" / f"{STUDY}.private" / "ledger.sqlite"

    def received() -> int:
        counts = inbox_counts(door / "inbox")
        return counts["arriving"] + counts["open"] + counts["ready"]

    def delivered(*states: DeliveryState) -> int:
        counts = delivery_counts(door / "delivery.sqlite")
        return sum(counts[state] for state in states)

    # Killed while it receives: the PACS learns that not everything was taken, and sends again.
    service = start_service(rules)
    sending = threading.Thread(target=orthanc.send_to_agent)
    sending.start()
    kill_when(service, lambda: received() >= STRUCK_AT)
    sending.join()
    assert received() < SLICES, "the blow came too late"

    # Killed while it protects: the noise of some images is made, others weren't looked at yet.
    service = start_service(rules)
    assert orthanc.send_to_agent()
    kill_when(service, lambda: {ImageState.PROTECTED, ImageState.FOUND} <= set(image_states(ledger)))
    assert image_states(ledger)[ImageState.FOUND], "the blow came too late"

    # Killed while it pushes: the PACS has objects that were not read back yet.
    service = start_service(rules)
    kill_when(service, lambda: delivered(DeliveryState.SENT) >= STRUCK_AT)
    assert delivered(DeliveryState.VERIFIED) < SLICES, "the blow came too late"
    before = copies_by_source(orthanc, tmp_path / "before")
    assert len(before) >= STRUCK_AT

    # Left alone it brings all to its end, and goes on with what comes next.
    service = start_service(rules)
    kill_when(service, lambda: delivered(DeliveryState.VERIFIED) == SLICES)
    orthanc.put(make_object(SLICES + 1))
    service = start_service(rules)
    assert orthanc.send_to_agent()
    kill_when(service, lambda: delivered(DeliveryState.VERIFIED) == SLICES + 1)

    after = copies_by_source(orthanc, tmp_path / "after")
    assert set(after) == originals | {f"{STUDY}.1.{SLICES + 1}"}
    assert {len(copies) for copies in after.values()} == {1}, "no original has two copies"
    assert all(after[source] == copies for source, copies in before.items())
    assert delivered(*DeliveryState) == SLICES + 1
    counts = inbox_counts(door / "inbox")
    assert (counts["arriving"], counts["rejected"]) == (0, 0)
    released = (door / "releases" / STUDY).rglob("*.dcm")
    assert sorted(content_digest(path) for path in released) == sorted(
        digest for copies in after.values() for digest in copies
    )
    with Ledger(ledger) as book:
        assert book.first_changed_line() is None
        verified = Counter(line.subject for line in book.log_lines() if line.event == "verified")
        assert set(verified.values()) == {1}
        assert len(verified) == SLICES + 1
