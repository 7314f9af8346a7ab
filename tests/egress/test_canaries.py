"""Plant a patient's name, a path and a UID wherever a site keeps text, and search every byte that leaves."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import grpc
import pytest

from medveil.agent.egress import Door, report
from medveil.agent.ledger import FileEntry, ImageState, Ledger, Receipt
from medveil.agent.reporting import beat, figures_of
from medveil.agent.reporting_log import EgressLog, sent_messages
from medveil.agent.reporting_policy import ReportingPolicy
from medveil.models.errors import ImageError, MedveilError
from medveil.protos.v1 import services_pb2, status_pb2
from medveil.protos.v1.conventions import methods

CALLS = methods("CampaignService")
POLICY = ReportingPolicy(minimum_group_size=5)


@pytest.fixture
def secret_job(tmp_path: Path, canaries: Any) -> Ledger:
    """A job whose every free text is a canary."""
    ledger = Ledger(tmp_path / f"{canaries.uid}.sqlite")
    paths = [PurePosixPath(f"{canaries.name}/{canaries.uid}.{number}.dcm") for number in range(40)]
    with ledger.transaction():
        for path in paths:
            ledger.register(FileEntry(path, path, canaries.name, 1, 100, 1))
    with ledger.transaction():
        for row in ledger.files():
            if row.id % 4 == 0:
                sentence = f"cannot read {tmp_path}/{row.relative}"
                ledger.mark_left_out(
                    row.id, 0, ImageState.QUARANTINED, str(row.relative), canaries.name, sentence
                )
                continue
            receipt = Receipt(canaries.pixels.hex() * 4, 1, 34.0, 8.0, 0.3)
            ledger.mark_read(row.id, 0, receipt.digest, 1)
            ledger.mark_protected(row.id, 0, receipt, None)
            ledger.mark_verified(row.id, 0, str(row.relative))
    return ledger


class Tap:
    """A loopback proxy that keeps every byte of both directions."""

    def __init__(self, target: int) -> None:
        self.upstream = bytearray()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        server = socket.create_connection(("127.0.0.1", self._target))
        back = threading.Thread(target=self._pump, args=(server, client, None))
        back.start()
        self._pump(client, server, self.upstream)
        back.join()
        client.close()
        server.close()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, kept: bytearray | None) -> None:
        try:
            while block := source.recv(65536):
                if kept is not None:
                    kept += block
                sink.sendall(block)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self._listener.close()
        self._threads[0].join(10)


class Recorder:
    """A coordinator without TLS that keeps what it is sent, headers included."""

    def __init__(self) -> None:
        self.headers: list[str] = []
        self.payloads: list[bytes] = []
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(self._take)
            for name, m in CALLS.items()
            if not m.streams
        }
        full_name = services_pb2.DESCRIPTOR.services_by_name["CampaignService"].full_name
        self.server = grpc.server(ThreadPoolExecutor(2))
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(full_name, handlers),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def _take(self, payload: bytes, context: Any) -> bytes:
        self.headers += [f"{key}: {value}" for key, value in context.invocation_metadata()]
        self.payloads.append(payload)
        return b""


@pytest.fixture
def wire() -> Iterator[tuple[Recorder, Tap]]:
    recorder = Recorder()
    tap = Tap(recorder.port)
    yield recorder, tap
    recorder.server.stop(0).wait()
    tap.close()


def test_no_canary_is_in_any_byte_that_leaves(
    secret_job: Ledger, tmp_path: Path, wire: tuple[Recorder, Tap], canaries: Any
) -> None:
    recorder, tap = wire
    message = report(figures_of(secret_job), POLICY, campaign=1, offer_revision=1, sequence=1)
    assert message.outcome.verified.exact == 30
    alive = beat(POLICY, activity=status_pb2.ACTIVITY_STOPPED, trouble=status_pb2.TROUBLE_OTHER, images=40)
    log_path = tmp_path / "egress.jsonl"
    with EgressLog(log_path) as log, grpc.insecure_channel(f"127.0.0.1:{tap.port}") as channel:
        door = Door(channel, log)
        door.send(CALLS["SubmitReport"], message)
        door.send(CALLS["SendBeat"], alive)
    secret_job.close()
    captured = bytes(tap.upstream)
    sent = [m.payload for m in sent_messages(log_path)]
    assert sent == recorder.payloads  # the log holds exactly what arrived
    assert all(payload in captured for payload in sent)  # and the tap saw it
    searched = captured + "\n".join(recorder.headers).encode() + b"".join(sent)
    for form in canaries.forms(str(tmp_path), tmp_path.name):
        assert form not in searched, form


def test_the_search_finds_a_canary_that_is_sent(
    tmp_path: Path, wire: tuple[Recorder, Tap], canaries: Any
) -> None:
    _, tap = wire
    with grpc.insecure_channel(f"127.0.0.1:{tap.port}") as channel:
        channel.unary_unary(CALLS["SendBeat"].path)(f"x{canaries.name}".encode(), timeout=10)
    assert any(form in bytes(tap.upstream) for form in canaries.forms(str(tmp_path), tmp_path.name))


def test_an_error_with_a_patients_name_cannot_go_through_the_door(tmp_path: Path, canaries: Any) -> None:
    """Flower sends the text of an exception; here there is no message that could take it."""
    error = ImageError("truncated", f"{canaries.name} is truncated", private=str(tmp_path))
    with EgressLog(tmp_path / "egress.jsonl") as log, grpc.insecure_channel("127.0.0.1:1") as channel:
        for thing in (
            error,
            str(error),
            {"error": str(error)},
            services_pb2.JoinRequest(token=canaries.name),
        ):
            with pytest.raises(MedveilError) as refused:
                Door(channel, log).send(CALLS["SubmitReport"], thing)
            assert refused.value.code == "not-this-message"
    assert not (tmp_path / "egress.jsonl").read_bytes()


def test_a_quarantine_code_that_nobody_listed_leaves_as_other(secret_job: Ledger) -> None:
    figures = figures_of(secret_job)
    secret_job.close()
    assert dict(figures.by_reason) == {6: 10}
    assert figures.verified == sum(figures.psnr_bins) == sum(figures.by_class.values()) == 30
