"""What arrives is kept as it came, sorted by what it says, and handed over when the series is complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")

from medveil.agent.imageio.pacs import Inbox
from medveil.models.errors import ImageError, StorageError

MakeObject = Callable[..., Path]
MakeInbox = Callable[..., Inbox]

BAD_UIDS = [
    "",
    "../../etc/passwd",
    "1.2/3",
    "1.2\\3",
    "1..2",
    ".1",
    "1.",
    "1.2.x",
    "1.2\n",
    "1.2\0",
    "٣.1",
    "1" * 65,
]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("uid", BAD_UIDS)
def test_an_identifier_that_is_no_uid_never_becomes_a_file_name(
    make_inbox: MakeInbox, tmp_path: Path, uid: str
) -> None:
    inbox = make_inbox()
    with pytest.raises(ImageError) as caught:
        inbox.accept(uid, b"data")
    assert caught.value.code == "bad-uid"
    assert names(tmp_path / "inbox") == []


@pytest.mark.parametrize("uid", ["../../../evil", "1.2/3"])
def test_a_header_cannot_lead_out_of_the_inbox(
    make_inbox: MakeInbox, make_object: MakeObject, tmp_path: Path, uid: str
) -> None:
    inbox = make_inbox()
    path = make_object()
    data = path.read_bytes().replace(b"1.2.3.4.1\0", (uid + "\0" * 10)[:10].encode())
    inbox.accept("1.2.3.4.1.1", data)
    assert [item.code for item in inbox.collect()] == ["bad-uid"]
    assert not (tmp_path / "evil").exists()
    assert [name.split("/")[0] for name in names(tmp_path / "inbox")] == ["rejected"]


def test_bytes_are_kept_as_received(make_inbox: MakeInbox, make_object: MakeObject) -> None:
    data = make_object().read_bytes()
    assert make_inbox().accept("1.2.3.4.1.1", data).read_bytes() == data


def test_a_series_is_handed_over_after_its_quiet_period_and_not_before(
    make_inbox: MakeInbox, make_object: MakeObject
) -> None:
    clock = [1000.0]
    inbox = make_inbox(now=lambda: clock[0])
    for number, arrival in ((1, 1000.0), (2, 1050.0)):
        os.utime(inbox.accept(f"1.2.3.4.1.{number}", make_object(number).read_bytes()), (arrival, arrival))
    assert inbox.collect() == ()
    for clock[0] in (1059.0, 1061.0, 1109.9):
        assert inbox.complete_series(60) == ()
    clock[0] = 1110.0
    (complete,) = inbox.complete_series(60)
    assert (complete.series, complete.instances) == ("1.2.3.4.1", 2)
    assert complete.folder == inbox.ready / "1.2.3.4" / "1.2.3.4.1"
    assert names(complete.folder) == ["1.2.3.4.1.1.dcm", "1.2.3.4.1.2.dcm"]
    assert inbox.complete_series(60) == ()


def test_a_late_image_makes_the_series_complete_once_more(
    make_inbox: MakeInbox, make_object: MakeObject
) -> None:
    inbox = make_inbox()
    for number in (1, 2):
        inbox.accept(f"1.2.3.4.1.{number}", make_object(number).read_bytes())
        inbox.collect()
        (complete,) = inbox.complete_series(0)
        assert complete.instances == 1
    assert inbox.held() == {"1.2.3.4.1.1", "1.2.3.4.1.2"}
    assert len(names(inbox.ready)) == 2


def test_the_same_object_sent_twice_is_one_object(make_inbox: MakeInbox, make_object: MakeObject) -> None:
    inbox = make_inbox()
    for _ in range(2):
        inbox.accept("1.2.3.4.1.1", make_object().read_bytes())
        assert inbox.collect() == ()
        inbox.complete_series(0)
    assert len(names(inbox.ready)) == 1


def test_two_associations_may_send_one_object_at_the_same_time(
    make_inbox: MakeInbox, make_object: MakeObject, tmp_path: Path
) -> None:
    inbox, data = make_inbox(), make_object().read_bytes()
    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(lambda _: inbox.accept("1.2.3.4.1.1", data), range(40)))
    assert len(set(kept)) == 1
    assert len(names(tmp_path / "inbox")) == 1


def test_of_two_objects_with_one_uid_the_first_is_kept_and_the_other_named(
    make_inbox: MakeInbox, make_object: MakeObject, tmp_path: Path
) -> None:
    inbox = make_inbox()
    first = make_object(seed=1).read_bytes()
    inbox.accept("1.2.3.4.1.1", first)
    inbox.collect()
    inbox.accept("1.2.3.4.1.1", make_object(seed=2).read_bytes())
    (rejected,) = inbox.collect()
    assert rejected.code == "duplicate-uid"
    assert rejected.path is not None
    assert rejected.path.is_file()
    (complete,) = inbox.complete_series(0)
    assert (complete.folder / "1.2.3.4.1.1.dcm").read_bytes() == first


def test_our_own_copy_that_the_pacs_routes_back_is_named_and_not_kept(
    make_inbox: MakeInbox, make_object: MakeObject, tmp_path: Path
) -> None:
    ours, other = Dataset(), Dataset()
    ours.Manufacturer, ours.ManufacturerModelName = "medveil", "medveil site agent"
    other.Manufacturer = "ACME"
    inbox = make_inbox()
    inbox.accept("1.2.3.4.1.1", make_object(1, ContributingEquipmentSequence=[other, ours]).read_bytes())
    inbox.accept("1.2.3.4.1.2", make_object(2, ContributingEquipmentSequence=[other]).read_bytes())
    assert [(one.code, one.path) for one in inbox.collect()] == [("already-protected", None)]
    assert [Path(name).name for name in names(tmp_path / "inbox")] == ["1.2.3.4.1.2.dcm"]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda data: b"not DICOM at all", "not-dicom"),
        (lambda data: data[:140], "missing-attribute"),
        (lambda data: data[:132] + b"\xff" * 200, "missing-attribute"),
    ],
    ids=["text", "cut", "noise"],
)
def test_a_damaged_arrival_is_named_and_stops_nothing(
    make_inbox: MakeInbox, make_object: MakeObject, damage: Callable[[bytes], bytes], code: str
) -> None:
    inbox = make_inbox()
    inbox.accept("1.2.3.4.1.1", damage(make_object(1).read_bytes()))
    inbox.accept("1.2.3.4.1.2", make_object(2).read_bytes())
    assert [item.code for item in inbox.collect()] == [code]
    assert inbox.held() == {"1.2.3.4.1.2"}


def test_an_object_that_is_not_the_announced_one_is_rejected(
    make_inbox: MakeInbox, make_object: MakeObject
) -> None:
    inbox = make_inbox()
    inbox.accept("9.9.9", make_object().read_bytes())
    assert [item.code for item in inbox.collect()] == ["uid-mismatch"]


@pytest.mark.parametrize(
    ("usage", "room"),
    [((1000, 899, 101), True), ((1000, 901, 99), False), ((1000, 901, 500), False), ((1000, 10, 99), False)],
)
def test_nothing_is_taken_beyond_either_watermark(
    make_inbox: MakeInbox, make_object: MakeObject, tmp_path: Path, usage: tuple[int, int, int], room: bool
) -> None:
    inbox = make_inbox(disk_usage=lambda _: usage)
    if room:
        inbox.accept("1.2.3.4.1.1", make_object().read_bytes())
        return
    with pytest.raises(StorageError) as caught:
        inbox.accept("1.2.3.4.1.1", make_object().read_bytes())
    assert caught.value.code == "disk-watermark"
    assert names(tmp_path / "inbox") == []


def test_what_a_killed_run_left_half_written_is_removed_and_the_rest_goes_on(
    make_inbox: MakeInbox, make_object: MakeObject, tmp_path: Path
) -> None:
    make_inbox().accept("1.2.3.4.1.1", make_object().read_bytes())
    (tmp_path / "inbox" / "arriving" / ".medveil-part-1234").write_bytes(b"half")
    inbox = make_inbox()
    assert inbox.collect() == ()
    assert inbox.held() == {"1.2.3.4.1.1"}
    assert len(names(tmp_path / "inbox")) == 1
