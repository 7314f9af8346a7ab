"""Talking to the PACS in DIMSE: find, move, get and store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import pydicom
from pydicom.dataset import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from medveil.agent.imageio.dicom_header import READABLE, quiet
from medveil.agent.imageio.pacs.content import Outgoing
from medveil.agent.imageio.pacs.inbox import Inbox, valid_uid
from medveil.agent.imageio.pacs.pulled import Pulled, require_listed
from medveil.agent.imageio.pacs.web import peer_context
from medveil.agent.pacs_policy import DicomPeer
from medveil.models.errors import ImageError, InputError

__all__ = ["DimseReader", "DimseSender", "echo", "find_instances", "pull_by_move"]

CONNECT_TIMEOUT_S: Final = 10.0
RESPONSE_TIMEOUT_S: Final = 60.0
"""Between two messages. A C-MOVE from tape may stay silent longer; it is then asked for again. Our choice."""

MAXIMUM_KINDS: Final = 127
"""Kinds of objects on one association: 128 contexts (PS3.8 9.3.2.2: odd numbers to 255), one for C-ECHO."""

NO_ANSWER: Final = "no-answer"

SUCCESS: Final = 0x0000
PENDING: Final = (0xFF00, 0xFF01)
WARNINGS: Final = range(0xB000, 0xC000)
"""C-STORE: stored, with an attribute coerced or ignored (PS3.4 B.2.3). The read-back decides."""


@dataclass(frozen=True, slots=True)
class DimseSender:
    """Sends by C-STORE, each object in its own transfer syntax; see ``delivery.Sender``."""

    peer: DicomPeer

    def send(self, objects: Sequence[Outgoing]) -> Iterator[tuple[Outgoing, str | None]]:
        """Send objects over as few associations as their kinds allow.

        One context per (SOP class, transfer syntax): with several syntaxes in one context the PACS would
        choose one of them, and the others would have to be transcoded.

        Raises:
            InputError: ``pacs-unreachable`` or ``pacs-rejected``.
        """
        kinds = sorted({(item.sop_class, item.syntax) for item in objects})
        for start in range(0, len(kinds), MAXIMUM_KINDS):
            chosen = kinds[start : start + MAXIMUM_KINDS]
            contexts = [build_context(sop_class, syntax) for sop_class, syntax in chosen]
            # Always accepted: a PACS that takes none of the kinds is told from one that does not answer.
            contexts.append(build_context(Verification))
            with _association(self.peer, contexts) as association:
                accepted = {
                    (str(context.abstract_syntax), str(context.transfer_syntax[0]))
                    for context in association.accepted_contexts
                }
                for item in objects:
                    kind = (item.sop_class, item.syntax)
                    if kind not in chosen:
                        continue
                    reason = _store(association, item) if kind in accepted else "kind-not-accepted"
                    yield item, reason
                    if reason == NO_ANSWER:
                        raise _unreachable("no answer to C-STORE")


@dataclass(frozen=True, slots=True)
class DimseReader:
    """Reads back by C-FIND and C-GET; see ``delivery.Reader``.

    C-GET comes back over the association that we opened: what is read back never mixes with what the
    receive port takes in. A PACS may transcode on the way, which the comparison allows for.
    """

    peer: DicomPeer

    def retrieve(self, wanted: Outgoing) -> bytes | None:
        """Return the object as the PACS holds it, or None.

        Raises:
            InputError: the PACS cannot be reached or refuses the query.
            ImageError: ``pacs-get-failed``: it refuses to send this object.
        """
        if wanted.instance not in find_instances(
            self.peer, wanted.study, wanted.series, instance=wanted.instance
        ):
            return None
        received: list[bytes] = []

        def keep(event: Event) -> int:
            received.append(event.encoded_dataset())
            return SUCCESS

        # One context per transfer syntax: the PACS may choose the one in which it holds the object.
        contexts = [build_context(wanted.sop_class, syntax) for syntax in sorted(READABLE)]
        contexts.append(build_context(StudyRootQueryRetrieveInformationModelGet))
        role = build_role(wanted.sop_class, scp_role=True)
        with _association(self.peer, contexts, roles=[role], on_store=keep) as link:
            level = _identifier("IMAGE", wanted.study, wanted.series, wanted.instance)
            for _ in _finish(
                link.send_c_get(level, StudyRootQueryRetrieveInformationModelGet),
                "pacs-get-failed",
                kind=ImageError,
            ):
                pass
        return received[0] if received else None


def echo(peer: DicomPeer) -> None:
    """Check that the PACS answers and knows us.

    Raises:
        InputError: ``pacs-unreachable`` or ``pacs-rejected``.
    """
    with _association(peer, [build_context(Verification)]) as association:
        if association.send_c_echo().get("Status") != SUCCESS:
            raise _unreachable("no answer to C-ECHO")


def find_instances(peer: DicomPeer, study: str, series: str, *, instance: str = "") -> frozenset[str]:
    """Return the SOP Instance UIDs that the PACS lists for a series (or the one asked for).

    Raises:
        InputError: the PACS cannot be reached, or refuses the query (``pacs-query-failed``).
        ImageError: ``bad-uid``: it answers with something that is no UID.
    """
    found = set()
    with _association(peer, [build_context(StudyRootQueryRetrieveInformationModelFind)]) as association:
        answers = association.send_c_find(
            _identifier("IMAGE", study, series, instance), StudyRootQueryRetrieveInformationModelFind
        )
        for identifier in _finish(answers, "pacs-query-failed"):
            found.add(valid_uid(str(identifier.get("SOPInstanceUID") or "")))
    return frozenset(found)


def pull_by_move(peer: DicomPeer, inbox: Inbox, study: str, series: str, *, destination: str) -> Pulled:
    """Have the PACS send a series to our receive port, which has to be open and fill ``inbox``.

    Args:
        peer: the PACS.
        inbox: where the receive port puts what comes.
        study: Study Instance UID.
        series: Series Instance UID.
        destination: AE title of our receive port, as the PACS knows it.

    Raises:
        InputError: the PACS cannot be reached, lists nothing, or refuses to send (``pacs-move-failed``).
    """
    expected = require_listed(find_instances(peer, valid_uid(study), valid_uid(series)))
    with _association(peer, [build_context(StudyRootQueryRetrieveInformationModelMove)]) as association:
        answers = association.send_c_move(
            _identifier("SERIES", study, series), destination, StudyRootQueryRetrieveInformationModelMove
        )
        for _ in _finish(answers, "pacs-move-failed"):
            pass
    rejected = inbox.collect()
    return Pulled(expected, expected - inbox.held(), rejected)


@contextmanager
def _association(
    peer: DicomPeer,
    contexts: list[PresentationContext],
    *,
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    on_store: Callable[[Event], int] | None = None,
) -> Iterator[Association]:
    """Open an association and release it at the end of the block; abort it when the block fails.

    Raises:
        InputError: ``pacs-unreachable`` or ``pacs-rejected``.
        ConfigurationError: ``pacs-tls``.
    """
    rejections = []

    def note_rejection(event: Event) -> None:
        if isinstance(event.pdu, A_ASSOCIATE_RJ):
            rejections.append(event.pdu)

    # pynetdicom 3.0.4 reports a rejection as an abort where the peer closes the connection at once
    # (6 of 60 against Orthanc), so we look at what was received.
    handlers: list[Any] = [(evt.EVT_PDU_RECV, note_rejection)]
    if on_store is not None:
        handlers.append((evt.EVT_C_STORE, on_store))
    entity = AE(peer.calling_ae_title)
    entity.connection_timeout = entity.acse_timeout = CONNECT_TIMEOUT_S
    entity.dimse_timeout = entity.network_timeout = RESPONSE_TIMEOUT_S
    tls = None if peer.tls is None else (peer_context(peer.tls), peer.tls.server_name or peer.host)
    association = entity.associate(
        peer.host,
        peer.port,
        contexts,
        ae_title=peer.ae_title,
        ext_neg=list(roles),
        evt_handlers=handlers,
        tls_args=tls,
    )
    if rejections:
        raise InputError(
            "pacs-rejected",
            "The PACS refused the association; check both AE titles and that it knows this site agent.",
        )
    if not association.is_established:
        # Also where every context was refused: there is nothing to talk about.
        raise _unreachable("association not established")
    try:
        yield association
        association.release()
    except RuntimeError as exc:  # what pynetdicom raises for a request on an association that was lost
        raise _unreachable("association lost") from exc
    finally:
        if association.is_established:
            association.abort()


def _store(association: Association, item: Outgoing) -> str | None:
    """Send one object; return None or the code of its refusal."""
    if not association.is_established:
        return NO_ANSWER
    try:
        with quiet():
            status = association.send_c_store(pydicom.dcmread(item.path))
    except ValueError:
        return "not-encodable"
    code = cast("int | None", status.get("Status"))
    if code is None:
        return NO_ANSWER
    return None if code == SUCCESS or code in WARNINGS else f"status-{code:04x}"


def _finish(
    answers: Iterator[tuple[Dataset, Dataset | None]], code: str, *, kind: type[InputError] = InputError
) -> Iterator[Dataset]:
    """Yield the identifiers of pending answers and judge the last one.

    Raises:
        InputError: ``pacs-unreachable``, or an error of ``kind`` and ``code`` for a refusal.
    """
    last: int | None = None
    for status, identifier in answers:
        last = cast("int | None", status.get("Status"))
        if last in PENDING and identifier is not None:
            yield identifier
    if last is None:
        raise _unreachable("connection lost or timed out")
    if last != SUCCESS and last not in WARNINGS:
        raise kind(
            code, "The PACS refused the request; check what it allows this AE title.", private=f"{last:04x}"
        )


def _identifier(level: str, study: str, series: str, instance: str | None = None) -> Dataset:
    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    identifier.StudyInstanceUID = study
    identifier.SeriesInstanceUID = series
    if instance is not None:
        identifier.SOPInstanceUID = instance
    return identifier


def _unreachable(private: str) -> InputError:
    return InputError(
        "pacs-unreachable",
        "The PACS does not answer; check its address, its certificate if it has one, and the network; try again.",
        private=private,
    )
