"""Nothing is called verified that was not read back, and nothing is lost on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pydicom
import pytest
from pydicom import uid as uids

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")

from medveil.agent.imageio.pacs import Delivery, DeliveryQueue, DeliveryState
from medveil.agent.imageio.pacs.content import Outgoing, content_digest
from medveil.agent.imageio.pacs.delivery import MAXIMUM_ATTEMPTS, backoff_s
from medveil.models.errors import BusyError, ImageError, InputError, StorageError

MakeObject = Callable[..., Path]


class FakePacs:
    """An archive in memory that misbehaves on request."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.down = False
        self.refuse: dict[str, str] = {}
        self.breaks_on: set[str] = set()
        self.forgets = False
        self.withholds: set[str] = set()
        self.sent: list[str] = []

    def send(self, objects: Sequence[Outgoing]) -> Iterator[tuple[Outgoing, str | None]]:
        if self.down:
            raise InputError("pacs-unreachable", "down")
        for item in objects:
            if item.instance in self.breaks_on:
                yield item, "no-answer"
                raise InputError("pacs-unreachable", "broke")
            self.sent.append(item.instance)
            reason = self.refuse.get(item.instance)
            if reason is None and not self.forgets:
                self.held.setdefault(item.instance, item.path.read_bytes())
            yield item, reason

    def retrieve(self, wanted: Outgoing) -> bytes | None:
        if self.down:
            raise InputError("pacs-unreachable", "down")
        if wanted.instance in self.withholds:
            raise ImageError("pacs-get-failed", "no")
        return self.held.get(wanted.instance)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[DeliveryQueue]:
    with DeliveryQueue(tmp_path / "queue.db") as queue:
        yield queue


def worked_off(delivery: Delivery, clock: Clock, rounds: int = 100) -> None:
    """Run until nothing is left, letting the clock jump over the waits."""
    for _ in range(rounds):
        wait_s = delivery.wait_s()
        if wait_s is None:
            return
        clock.now += wait_s
        delivery.run_once()
    pytest.fail("the queue never came to an end")


def states(queue: DeliveryQueue) -> dict[str, tuple[str, str | None]]:
    return {entry.instance: (entry.state, entry.reason) for entry in queue.entries()}


def test_objects_are_verified_after_they_were_read_back(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    pacs, clock = FakePacs(), Clock()
    for number in (1, 2, 3):
        assert queue.add(make_object(number))
    result = Delivery(queue, pacs, pacs, now=clock).run_once()
    assert (result.sent, result.verified, result.problems, result.outage) == (3, 3, 0, None)
    assert queue.counts()[DeliveryState.VERIFIED] == 3


def test_an_archive_that_says_stored_and_stores_nothing_never_verifies(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    pacs, clock = FakePacs(), Clock()
    pacs.forgets = True
    queue.add(make_object())
    worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
    assert states(queue) == {"1.2.3.4.1.1": (DeliveryState.REFUSED, "not-stored")}
    assert len(pacs.sent) == MAXIMUM_ATTEMPTS


def test_an_older_object_under_the_same_uid_is_named_and_not_retried(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    pacs, clock = FakePacs(), Clock()
    pacs.held["1.2.3.4.1.1"] = make_object(seed=99).read_bytes()
    queue.add(make_object())
    worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
    assert states(queue) == {"1.2.3.4.1.1": (DeliveryState.DIFFERS, "content-differs")}
    assert pacs.sent == ["1.2.3.4.1.1"]


def test_damaged_bytes_read_back_are_different_bytes(queue: DeliveryQueue, make_object: MakeObject) -> None:
    pacs, clock = FakePacs(), Clock()
    path = make_object()
    pacs.held["1.2.3.4.1.1"] = path.read_bytes()[:-100]
    queue.add(path)
    worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
    assert queue.counts()[DeliveryState.DIFFERS] == 1


def test_an_outage_of_days_costs_no_object_an_attempt(queue: DeliveryQueue, make_object: MakeObject) -> None:
    pacs, clock = FakePacs(), Clock()
    pacs.down = True
    queue.add(make_object())
    delivery = Delivery(queue, pacs, pacs, now=clock)
    waits = []
    for _ in range(5 * MAXIMUM_ATTEMPTS):
        assert delivery.run_once().outage == "pacs-unreachable"
        waits.append(delivery.wait_s() or 0.0)
        clock.now += waits[-1]
    assert waits[:4] == [5, 10, 20, 40]
    assert max(waits) == 3600
    assert [entry.attempts for entry in queue.entries()] == [0]
    pacs.down = False
    assert delivery.run_once().verified == 1


def test_back_off_doubles_up_to_an_hour() -> None:
    assert [backoff_s(failures) for failures in (1, 2, 3, 10, 11, 10_000)] == [5, 10, 20, 2560, 3600, 3600]


def test_a_refused_object_holds_up_no_other_and_can_be_retried(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    pacs, clock = FakePacs(), Clock()
    pacs.refuse["1.2.3.4.1.1"] = "status-a900"
    for number in (1, 2):
        queue.add(make_object(number))
    worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
    assert states(queue) == {
        "1.2.3.4.1.1": (DeliveryState.REFUSED, "status-a900"),
        "1.2.3.4.1.2": (DeliveryState.VERIFIED, None),
    }
    pacs.refuse.clear()
    assert queue.retry() == 1
    worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
    assert queue.counts()[DeliveryState.VERIFIED] == 2


def test_an_object_that_breaks_the_connection_does_not_stand_first_for_ever(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    pacs, clock = FakePacs(), Clock()
    pacs.breaks_on = {"1.2.3.4.1.1"}
    for number in (1, 2, 3):
        queue.add(make_object(number))
    worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
    assert states(queue)["1.2.3.4.1.1"] == (DeliveryState.REFUSED, "no-answer")
    assert queue.counts()[DeliveryState.VERIFIED] == 2


def test_an_object_that_the_pacs_will_not_send_back_is_never_verified_and_holds_up_no_other(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    pacs, clock = FakePacs(), Clock()
    pacs.withholds = {"1.2.3.4.1.1"}
    for number in (1, 2):
        queue.add(make_object(number))
    assert Delivery(queue, pacs, pacs, now=clock).run_once().verified == 1
    worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
    assert states(queue)["1.2.3.4.1.1"] == (DeliveryState.REFUSED, "pacs-get-failed")


def test_an_object_whose_read_back_breaks_the_connection_goes_behind_the_others(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    class Breaks(FakePacs):
        def retrieve(self, wanted: Outgoing) -> bytes | None:
            if wanted.instance == "1.2.3.4.1.1":
                raise InputError("pacs-unreachable", "broke")
            return super().retrieve(wanted)

    pacs, clock = Breaks(), Clock()
    for number in (1, 2):
        queue.add(make_object(number))
    delivery = Delivery(queue, pacs, pacs, now=clock)
    assert delivery.run_once().outage == "pacs-unreachable"
    clock.now += delivery.wait_s() or 0
    assert delivery.run_once().verified == 1


def test_a_file_that_changed_after_it_was_queued_is_not_sent(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    pacs, clock = FakePacs(), Clock()
    path = make_object()
    queue.add(path)
    path.write_bytes(make_object(seed=5).read_bytes())
    worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
    assert states(queue) == {"1.2.3.4.1.1": (DeliveryState.REFUSED, "file-changed")}
    assert pacs.sent == []


def test_a_file_that_is_gone_is_named_and_holds_up_no_other(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    pacs, clock = FakePacs(), Clock()
    gone = make_object(1)
    queue.add(gone)
    queue.add(make_object(2))
    gone.unlink()
    worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
    assert states(queue)["1.2.3.4.1.1"] == (DeliveryState.REFUSED, "unreadable")
    assert queue.counts()[DeliveryState.VERIFIED] == 1


def test_queueing_again_changes_nothing_and_another_content_under_one_uid_is_refused(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    assert queue.add(make_object(seed=1))
    assert not queue.add(make_object(seed=1))
    with pytest.raises(ImageError) as caught:
        queue.add(make_object(seed=2))
    assert caught.value.code == "duplicate-uid"
    assert len(queue.entries()) == 1


def test_a_restart_goes_on_where_the_last_run_stopped(tmp_path: Path, make_object: MakeObject) -> None:
    pacs, clock = FakePacs(), Clock()
    with DeliveryQueue(tmp_path / "q.db") as queue:
        for number in (1, 2, 3, 4):
            queue.add(make_object(number))
        killed = Delivery(queue, pacs, pacs, now=clock)._send(queue.due(DeliveryState.QUEUED, clock(), 100))
        entry, _ = next(killed)  # sent, recorded
        queue.move(entry, DeliveryState.SENT)
        next(killed)  # sent, and killed before it was recorded
    with DeliveryQueue(tmp_path / "q.db") as queue:
        assert queue.counts()[DeliveryState.QUEUED] == 3
        worked_off(Delivery(queue, pacs, pacs, now=clock), clock)
        assert queue.counts()[DeliveryState.VERIFIED] == 4
    assert sorted(pacs.sent) == [f"1.2.3.4.1.{n}" for n in (1, 2, 2, 3, 4)]


def test_waits_outlive_a_restart(tmp_path: Path, make_object: MakeObject) -> None:
    pacs, clock = FakePacs(), Clock()
    pacs.refuse["1.2.3.4.1.1"] = "status-a700"
    with DeliveryQueue(tmp_path / "q.db") as queue:
        queue.add(make_object())
        Delivery(queue, pacs, pacs, now=clock).run_once()
    with DeliveryQueue(tmp_path / "q.db") as queue:
        assert Delivery(queue, pacs, pacs, now=clock).wait_s() == 5


def test_a_second_worker_is_refused_and_the_lock_goes_with_its_holder(tmp_path: Path) -> None:
    with DeliveryQueue(tmp_path / "q.db"), pytest.raises(BusyError):
        DeliveryQueue(tmp_path / "q.db")
    with DeliveryQueue(tmp_path / "q.db") as queue:
        assert queue.next_due() is None


def test_a_damaged_queue_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "q.db").write_bytes(b"no database" * 100)
    with pytest.raises(StorageError) as caught:
        DeliveryQueue(tmp_path / "q.db")
    assert caught.value.code == "queue-failed"
    (tmp_path / "q.db").unlink()
    with DeliveryQueue(tmp_path / "q.db") as queue:  # the refused one let go of the lock
        assert queue.entries() == ()


def test_the_worker_ends_when_nothing_is_left_and_when_it_is_told_to(
    queue: DeliveryQueue, make_object: MakeObject
) -> None:
    pacs, stop = FakePacs(), threading.Event()
    queue.add(make_object())
    rounds: list[int] = []
    Delivery(queue, pacs, pacs).run(stop, on_round=lambda result: rounds.append(result.verified))
    assert rounds == [1]
    pacs.down = True
    queue.add(make_object(2))
    Delivery(queue, pacs, pacs).run(stop, on_round=lambda result: stop.set())
    assert queue.counts()[DeliveryState.QUEUED] == 1


@pytest.mark.parametrize(
    "syntax", [uids.JPEGLSLossless, uids.JPEG2000Lossless, uids.RLELossless], ids=["jpegls", "j2k", "rle"]
)
def test_lossless_transcoding_and_a_corrected_name_leave_the_content_equal(
    make_object: MakeObject, syntax: str
) -> None:
    stored = make_object(syntax=syntax, PatientName="Corrected^Name")
    assert content_digest(stored) == content_digest(make_object())


def test_one_changed_pixel_or_identifier_is_another_content(make_object: MakeObject) -> None:
    path = make_object()
    before = content_digest(path)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = bytes([dataset.PixelData[0] ^ 1]) + dataset.PixelData[1:]
    pydicom.dcmwrite(path, dataset)
    assert content_digest(path) != before
    assert content_digest(make_object(SeriesInstanceUID="1.2.3.4.77")) != before


def test_companions_are_compared_element_by_element_in_any_transfer_syntax(make_object: MakeObject) -> None:
    path = make_object(companion=True)
    before = content_digest(path)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian
    pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True)
    assert content_digest(path) == before
    dataset.ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.3.4.1.2"
    pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True)
    assert content_digest(path) != before
