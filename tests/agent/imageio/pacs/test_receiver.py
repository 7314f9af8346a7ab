"""The receive port takes bytes from known senders and from nobody else."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom import uid as uids

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")

from pynetdicom import AE, build_context

from medveil.agent.imageio.pacs import DicomPeer, DimseSender, Inbox, ReceivePort, ReceiveSettings, echo
from medveil.agent.imageio.pacs.content import describe
from medveil.models.errors import ConfigurationError, InputError

MakeObject = Callable[..., Path]
MakeInbox = Callable[..., Inbox]


def statuses(
    port: ReceivePort, paths: list[Path], *, calling: str = "ORTHANC", called: str = "MEDVEIL"
) -> list[int] | str:
    """Send files as a modality would; return the answers, or how the association ended."""
    contexts = sorted({str(pydicom.dcmread(path).file_meta.TransferSyntaxUID) for path in paths})
    entity = AE(calling)
    association = entity.associate(
        "127.0.0.1",
        port.port,
        [build_context(uids.CTImageStorage, syntax) for syntax in contexts],
        ae_title=called,
    )
    if not association.is_established:
        return "rejected" if association.is_rejected else "aborted"
    try:
        return [association.send_c_store(pydicom.dcmread(path)).Status for path in paths]
    finally:
        association.release()


def test_a_known_sender_is_served_and_its_data_set_is_kept_byte_for_byte(
    receive_settings: ReceiveSettings, make_inbox: MakeInbox, make_object: MakeObject
) -> None:
    inbox = make_inbox()
    syntaxes = [uids.ExplicitVRLittleEndian, uids.JPEGLSLossless, uids.RLELossless]
    paths = [make_object(number, syntax=syntax) for number, syntax in enumerate(syntaxes)]
    with ReceivePort(receive_settings, inbox) as port:
        assert statuses(port, paths) == [0, 0, 0]
    assert inbox.collect() == ()
    (complete,) = inbox.complete_series(0)
    for path, kept in zip(paths, sorted(complete.folder.iterdir()), strict=True):
        assert data_set_bytes(kept) == data_set_bytes(path)
        assert (
            pydicom.dcmread(kept).file_meta.TransferSyntaxUID
            == pydicom.dcmread(path).file_meta.TransferSyntaxUID
        )


def data_set_bytes(path: Path) -> bytes:
    """Return what follows the file meta information."""
    stream = BytesIO(path.read_bytes())
    pydicom.filereader.read_preamble(stream, force=False)
    pydicom.filereader._read_file_meta_info(stream)
    return stream.read()


@pytest.mark.parametrize(("calling", "called"), [("STRANGER", "MEDVEIL"), ("ORTHANC", "OTHER")])
def test_an_unknown_title_is_rejected(
    receive_settings: ReceiveSettings,
    make_inbox: MakeInbox,
    make_object: MakeObject,
    calling: str,
    called: str,
) -> None:
    inbox = make_inbox()
    with ReceivePort(receive_settings, inbox) as port:
        assert statuses(port, [make_object()], calling=calling, called=called) == "rejected"
    inbox.collect()
    assert inbox.held() == frozenset()


def test_a_known_title_from_another_address_is_refused(
    receive_settings: ReceiveSettings, make_inbox: MakeInbox, make_object: MakeObject
) -> None:
    elsewhere = receive_settings.senders[0].model_dump() | {"addresses": ("192.0.2.1",)}
    settings = ReceiveSettings.model_validate({"port": 0, "senders": [elsewhere]})
    inbox = make_inbox()
    with ReceivePort(settings, inbox) as port:
        assert statuses(port, [make_object()]) == [0x0124]
        peer = DicomPeer(ae_title="MEDVEIL", host="127.0.0.1", port=port.port, calling_ae_title="ORTHANC")
        with pytest.raises(InputError):
            echo(peer)
    inbox.collect()
    assert inbox.held() == frozenset()


def test_a_full_disk_is_said_to_the_sender_and_the_next_object_is_taken_once_there_is_room(
    receive_settings: ReceiveSettings, make_inbox: MakeInbox, make_object: MakeObject
) -> None:
    free = [10]
    inbox = make_inbox(disk_usage=lambda _: (1000, 100, free[0]))
    with ReceivePort(receive_settings, inbox) as port:
        assert statuses(port, [make_object()]) == [0xA700]
        free[0] = 900
        assert statuses(port, [make_object()]) == [0]
    inbox.collect()
    assert inbox.held() == {"1.2.3.4.1.1"}


def test_nothing_is_parsed_before_the_sender_has_its_answer(
    receive_settings: ReceiveSettings, make_inbox: MakeInbox, make_object: MakeObject
) -> None:
    path = make_object()
    path.write_bytes(path.read_bytes().replace(b"1.2.3.4\0", b"../evil\0"))  # only a parser would notice
    inbox = make_inbox()
    with ReceivePort(receive_settings, inbox) as port:
        assert statuses(port, [path]) == [0]
    assert [item.code for item in inbox.collect()] == ["bad-uid"]


def test_a_port_in_use_is_named(receive_settings: ReceiveSettings, make_inbox: MakeInbox) -> None:
    inbox = make_inbox()
    with ReceivePort(receive_settings, inbox) as port:
        taken = receive_settings.model_copy(update={"port": port.port})
        with pytest.raises(ConfigurationError) as caught, ReceivePort(taken, inbox):
            pytest.fail("two ports on one number")
    assert caught.value.code == "port-in-use"


def test_a_port_that_closes_in_the_middle_is_unreachable(
    receive_settings: ReceiveSettings, make_inbox: MakeInbox, make_object: MakeObject
) -> None:
    """The peer is our own port, closed by the first object that it takes."""
    inbox = make_inbox()
    with ReceivePort(receive_settings, inbox) as port:
        peer = DicomPeer(ae_title="MEDVEIL", host="127.0.0.1", port=port.port, calling_ae_title="ORTHANC")
        outcomes = DimseSender(peer).send([describe(make_object(number)) for number in (1, 2)])
        item, reason = next(outcomes)
        assert (item.instance, reason) == ("1.2.3.4.1.1", None)
        port.__exit__(None, None, None)
        assert next(outcomes)[1] == "no-answer"
        with pytest.raises(InputError) as caught:
            next(outcomes)
    assert caught.value.code == "pacs-unreachable"
