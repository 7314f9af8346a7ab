"""The round trip with a real PACS: Orthanc on loopback."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")

from medveil.agent.imageio.pacs import (
    Delivery,
    DeliveryQueue,
    DeliveryState,
    DicomPeer,
    DimseReader,
    DimseSender,
    Inbox,
    KnownSender,
    ReceivePort,
    ReceiveSettings,
    WebPacs,
    echo,
    find_instances,
    pull_by_move,
    pull_by_wado,
)
from medveil.agent.imageio.pacs.content import Outgoing, describe
from medveil.models.errors import InputError

MakeObject = Callable[..., Path]
MakeInbox = Callable[..., Inbox]

SYNTAXES = (uids.ExplicitVRLittleEndian, uids.JPEGLSLossless, uids.JPEG2000Lossless, uids.RLELossless)


@pytest.fixture
def mixed_series(make_object: MakeObject) -> list[Path]:
    """One series in four transfer syntaxes."""
    return [make_object(number, syntax=syntax) for number, syntax in enumerate(SYNTAXES, start=1)]


@pytest.fixture(params=["dimse", "web", "store-and-wado"])
def ends(request: pytest.FixtureRequest, orthanc: Any) -> Iterator[tuple[Any, Any]]:
    """Sender and reader, in the three combinations that hospitals have."""
    with WebPacs(orthanc.web) as web:
        sender = web if request.param == "web" else DimseSender(orthanc.dicom)
        yield sender, DimseReader(orthanc.dicom) if request.param == "dimse" else web


def receive_from(orthanc: Any) -> ReceiveSettings:
    return ReceiveSettings(
        port=orthanc.agent_port, senders=(KnownSender(ae_title="ORTHANC", addresses=("127.0.0.1",)),)
    )


def same_objects(folder: Path, sources: Sequence[Path]) -> None:
    """Check that a folder holds the sources: same UID, same transfer syntax, same pixel values."""
    received = {path.stem: pydicom.dcmread(path) for path in folder.iterdir()}
    assert len(received) == len(sources)
    for source in map(pydicom.dcmread, sources):
        copy = received[str(source.SOPInstanceUID)]
        assert copy.file_meta.TransferSyntaxUID == source.file_meta.TransferSyntaxUID
        assert copy.PixelData == source.PixelData
        np.testing.assert_array_equal(copy.pixel_array, source.pixel_array)


def test_the_pacs_knows_us_and_not_a_stranger(orthanc: Any) -> None:
    echo(orthanc.dicom)
    with pytest.raises(InputError) as caught:
        echo(orthanc.dicom.model_copy(update={"ae_title": "NOBODY"}))
    assert caught.value.code == "pacs-rejected"


# pynetdicom 3.0.4 shuts a socket down that could not connect, and leaves closing it to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_absent_pacs_is_unreachable(orthanc: Any) -> None:
    nobody = DicomPeer(ae_title="ORTHANC", host="127.0.0.1", port=orthanc.agent_port)
    with pytest.raises(InputError) as caught:
        echo(nobody)
    assert caught.value.code == "pacs-unreachable"
    del caught
    gc.collect()


def test_c_move_brings_every_object_in_its_own_transfer_syntax(
    orthanc: Any, mixed_series: list[Path], make_inbox: MakeInbox
) -> None:
    for path in mixed_series:
        orthanc.put(path)
    inbox = make_inbox()
    with ReceivePort(receive_from(orthanc), inbox):
        pulled = pull_by_move(orthanc.dicom, inbox, "1.2.3.4", "1.2.3.4.1", destination="MEDVEIL")
    assert (len(pulled.expected), pulled.missing, pulled.rejected) == (4, frozenset(), ())
    (complete,) = inbox.complete_series(0)
    same_objects(complete.folder, mixed_series)


def test_wado_brings_every_object_in_its_own_transfer_syntax(
    orthanc: Any, mixed_series: list[Path], make_inbox: MakeInbox
) -> None:
    for path in mixed_series:
        orthanc.put(path)
    inbox = make_inbox()
    with WebPacs(orthanc.web) as web:
        pulled = pull_by_wado(web, inbox, "1.2.3.4", "1.2.3.4.1")
    assert (len(pulled.expected), pulled.missing, pulled.rejected) == (4, frozenset(), ())
    (complete,) = inbox.complete_series(0)
    same_objects(complete.folder, mixed_series)


def test_a_series_that_is_not_there_is_no_success(orthanc: Any, make_inbox: MakeInbox) -> None:
    with pytest.raises(InputError) as caught:
        pull_by_move(orthanc.dicom, make_inbox(), "1.2.3", "1.2.3.9", destination="MEDVEIL")
    assert caught.value.code == "no-such-series"


def test_a_move_to_a_port_that_the_pacs_does_not_know_is_named(
    orthanc: Any, mixed_series: list[Path], make_inbox: MakeInbox
) -> None:
    orthanc.put(mixed_series[0])
    with pytest.raises(InputError) as caught:
        pull_by_move(orthanc.dicom, make_inbox(), "1.2.3.4", "1.2.3.4.1", destination="ELSEWHERE")
    assert caught.value.code == "pacs-move-failed"


def test_pushed_objects_and_companions_are_verified_and_arrive_untranscoded(
    ends: tuple[Any, Any], orthanc: Any, mixed_series: list[Path], make_object: MakeObject, tmp_path: Path
) -> None:
    paths = [*mixed_series, make_object(9, series=2, companion=True)]
    with DeliveryQueue(tmp_path / "queue.db") as queue:
        for path in paths:
            queue.add(path)
        result = Delivery(queue, *ends).run_once()
        assert (result.sent, result.verified, result.problems, result.outage) == (5, 5, 0, None)
        assert queue.counts()[DeliveryState.VERIFIED] == 5
    with WebPacs(orthanc.web) as web:
        for item in map(describe, mixed_series):
            data = web.fetch(item.study, item.series, item.instance)
            assert data is not None
            stored = pydicom.dcmread(pydicom.filebase.DicomBytesIO(data))
            assert stored.file_meta.TransferSyntaxUID == item.syntax


def test_an_older_object_in_the_pacs_is_not_taken_for_ours(
    ends: tuple[Any, Any], orthanc: Any, make_object: MakeObject, tmp_path: Path
) -> None:
    orthanc.put(make_object(seed=99))
    with DeliveryQueue(tmp_path / "queue.db") as queue:
        queue.add(make_object())
        assert Delivery(queue, *ends).run_once().verified == 0
        assert queue.counts()[DeliveryState.DIFFERS] == 1


def test_a_kind_that_the_pacs_does_not_take_is_refused_and_the_rest_goes_through(
    orthanc: Any, make_object: MakeObject, tmp_path: Path
) -> None:
    odd = make_object(1, SOPClassUID="1.2.3.4.5.6.7.8")
    with DeliveryQueue(tmp_path / "queue.db") as queue:
        queue.add(odd)
        queue.add(make_object(2))
        Delivery(queue, DimseSender(orthanc.dicom), DimseReader(orthanc.dicom)).run_once()
        assert [(entry.state, entry.reason) for entry in queue.entries()] == [
            (DeliveryState.QUEUED, "kind-not-accepted"),
            (DeliveryState.VERIFIED, None),
        ]


class KillsItself:
    """A sender whose PACS loses power after the second object."""

    def __init__(self, orthanc: Any) -> None:
        self._orthanc = orthanc
        self._sender = DimseSender(orthanc.dicom)

    def send(self, objects: Sequence[Outgoing]) -> Iterator[tuple[Outgoing, str | None]]:
        for number, outcome in enumerate(self._sender.send(objects), start=1):
            if number == 2 and self._orthanc.process is not None:
                self._orthanc.stop(signal.SIGKILL)
            yield outcome


def test_a_pacs_that_dies_in_the_middle_costs_nothing_once_it_is_back(
    mortal_orthanc: Any, make_object: MakeObject, tmp_path: Path
) -> None:
    clock = [1000.0]
    with DeliveryQueue(tmp_path / "queue.db") as queue:
        for number in range(1, 6):
            queue.add(make_object(number))
        delivery = Delivery(
            queue, KillsItself(mortal_orthanc), DimseReader(mortal_orthanc.dicom), now=lambda: clock[0]
        )
        assert delivery.run_once().outage == "pacs-unreachable"
        assert queue.counts()[DeliveryState.VERIFIED] == 0
        mortal_orthanc.start()
        second = Delivery(
            queue, DimseSender(mortal_orthanc.dicom), DimseReader(mortal_orthanc.dicom), now=lambda: clock[0]
        )
        while (wait_s := second.wait_s()) is not None:
            clock[0] += wait_s
            assert second.run_once().outage is None
        assert queue.counts()[DeliveryState.VERIFIED] == 5
    assert mortal_orthanc.instances() == [f"1.2.3.4.1.{number}" for number in range(1, 6)]


WORKER = """
import sys, threading
from pathlib import Path
from medveil.agent.imageio.pacs import Delivery, DeliveryQueue, DicomPeer, DimseReader, DimseSender

peer = DicomPeer(ae_title="ORTHANC", host="127.0.0.1", port=int(sys.argv[2]))

class Talks(DimseSender):
    def send(self, objects):
        for outcome in super().send(objects):
            print("sent", flush=True)
            yield outcome

with DeliveryQueue(Path(sys.argv[1])) as queue:
    Delivery(queue, Talks(peer), DimseReader(peer)).run(threading.Event())
"""


def test_a_killed_worker_is_taken_over_and_no_object_is_lost_or_doubled(
    orthanc: Any, make_object: MakeObject, tmp_path: Path
) -> None:
    database = tmp_path / "queue.db"
    with DeliveryQueue(database) as queue:
        for number in range(1, 21):
            queue.add(make_object(number))
    command = [sys.executable, "-c", WORKER, str(database), str(orthanc.dicom_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as worker:
        assert worker.stdout is not None
        for _ in range(5):
            assert worker.stdout.readline() == b"sent\n"
        worker.kill()
    with DeliveryQueue(database) as queue:
        assert queue.counts()[DeliveryState.VERIFIED] < 20
        assert queue.counts()[DeliveryState.SENT] >= 4
        with WebPacs(orthanc.web) as web:
            Delivery(queue, DimseSender(orthanc.dicom), web).run(threading.Event())
        assert queue.counts()[DeliveryState.VERIFIED] == 20
    assert orthanc.instances() == sorted(f"1.2.3.4.1.{number}" for number in range(1, 21))


def test_what_storescu_sends_arrives(orthanc: Any, mixed_series: list[Path], make_inbox: MakeInbox) -> None:
    if not Path("/usr/bin/storescu").exists():
        reason = "dcmtk is not installed (apt-get install dcmtk)"
        if os.environ.get("MEDVEIL_REQUIRE_PACS"):
            pytest.fail(f"{reason}, and this run requires it")
        pytest.skip(reason)
    inbox = make_inbox()
    with ReceivePort(receive_from(orthanc), inbox) as port:
        subprocess.run(
            [
                "storescu",
                "-xt",
                "-aet",
                "ORTHANC",
                "-aec",
                "MEDVEIL",
                "127.0.0.1",
                str(port.port),
                *mixed_series[1:2],
            ],
            check=True,
            timeout=60,
        )
    inbox.collect()
    assert inbox.held() == {"1.2.3.4.1.2"}


def test_find_lists_one_series_only(orthanc: Any, make_object: MakeObject) -> None:
    orthanc.put(make_object(1, series=1))
    orthanc.put(make_object(1, series=2))
    assert find_instances(orthanc.dicom, "1.2.3.4", "1.2.3.4.2") == {"1.2.3.4.2.1"}
