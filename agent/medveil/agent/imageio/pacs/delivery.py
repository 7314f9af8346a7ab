"""Sending protected objects back to the PACS, and believing it only after reading them back.

    queued --send--> sent --read back, equal--> verified
      ^                |---not there-----------> queued again, later
      |                |---there, other content> differs (the PACS kept an older object of that UID)
      +--back-off---- refused by the PACS; after the last attempt: refused

While the PACS cannot be reached nothing counts as an attempt: the queue waits, for days if need be. A kill
between two steps repeats one step: an object that is sent twice has the same UID and the same content.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from medveil.agent.imageio.pacs.content import Outgoing, content_digest, describe
from medveil.agent.imageio.pacs.queue import DeliveryQueue, DeliveryState, Entry
from medveil.models.disk import disk_errors
from medveil.models.errors import ImageError, InputError

__all__ = ["Delivery", "Reader", "Round", "Sender", "backoff_s"]

FIRST_WAIT_S: Final = 5.0
LONGEST_WAIT_S: Final = 3600.0
"""A PACS restarts in a minute and is down for maintenance for hours; our choice."""

MAXIMUM_ATTEMPTS: Final = 12
"""Refusals of one object before a person has to look: two and a half hours of doubling waits. Our choice."""

BATCH: Final = 100
"""Objects of one association or one read-back round; one association carries at most 128 contexts."""


class Sender(Protocol):
    """Delivers objects to the PACS: C-STORE or STOW-RS."""

    def send(self, objects: Sequence[Outgoing]) -> Iterator[tuple[Outgoing, str | None]]:
        """Send objects; yield each with None or the code for which the PACS refused it.

        An object on which the connection breaks is yielded as refused before the error: it may be the cause,
        and must not stand first in the queue for ever.

        Raises:
            InputError: the PACS cannot be reached; what was yielded before stands.
        """
        ...


class Reader(Protocol):
    """Reads objects back from the PACS: C-FIND and C-GET, or QIDO-RS and WADO-RS."""

    def retrieve(self, wanted: Outgoing) -> bytes | None:
        """Return the object as a DICOM file, or None where the PACS does not list it.

        Raises:
            InputError: the PACS cannot be reached.
            ImageError: it cannot deliver this object.
        """
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did.

    Attributes:
        sent: objects that the PACS took.
        verified: objects read back and equal.
        problems: objects that were refused, missing or different.
        outage: code of the reason for which the round ended early and the queue waits; None without one.
    """

    sent: int = 0
    verified: int = 0
    problems: int = 0
    outage: str | None = None


def backoff_s(failures: int) -> float:
    """Return how long to wait after the n-th failure in a row (n >= 1): doubling, up to an hour."""
    return float(min(FIRST_WAIT_S * 2 ** min(failures - 1, 16), LONGEST_WAIT_S))


class Delivery:
    """Works off a queue; one worker per queue, which the queue's lock sees to."""

    def __init__(
        self, queue: DeliveryQueue, sender: Sender, reader: Reader, *, now: Callable[[], float] = time.time
    ) -> None:
        """Connect a queue with a PACS.

        Args:
            queue: the open queue.
            sender: how objects get there.
            reader: how they are read back; not necessarily the same protocol.
            now: clock in seconds since the epoch: waits outlive a restart.
        """
        self._queue = queue
        self._sender = sender
        self._reader = reader
        self._now = now
        self._outages = 0
        self._resume_at = 0.0

    def run(self, stop: threading.Event, *, on_round: Callable[[Round], None] = lambda _: None) -> None:
        """Work until nothing is left to do, or ``stop`` is set.

        Raises:
            StorageError: the queue cannot be written.
        """
        while not stop.is_set() and (wait_s := self.wait_s()) is not None:
            if wait_s > 0:
                stop.wait(wait_s)
            else:
                on_round(self.run_once())

    def wait_s(self) -> float | None:
        """Return the seconds until something is due; 0 means now, None that nothing is left."""
        due_at = self._queue.next_due()
        return None if due_at is None else max(0.0, max(due_at, self._resume_at) - self._now())

    def run_once(self) -> Round:
        """Send what is due, then read back what was sent; an outage ends the round.

        Raises:
            StorageError: the queue cannot be written.
        """
        sent = verified = problems = 0
        try:
            for entry, reason in self._send(self._queue.due(DeliveryState.QUEUED, self._now(), BATCH)):
                if reason is None:
                    self._queue.move(entry, DeliveryState.SENT, due_at=self._now())
                    sent += 1
                else:
                    self._put_off(entry, reason)
                    problems += 1
            for entry in self._queue.due(DeliveryState.SENT, self._now(), BATCH):
                if self._verify(entry):
                    verified += 1
                else:
                    problems += 1
        except InputError as error:
            self._outages += 1
            self._resume_at = self._now() + backoff_s(self._outages)
            return Round(sent, verified, problems, outage=error.code)
        self._outages = 0
        return Round(sent, verified, problems)

    def _send(self, entries: Sequence[Entry]) -> Iterator[tuple[Entry, str | None]]:
        """Send entries whose files are still what was queued; yield each with the reason it was refused."""
        sendable: dict[str, tuple[Entry, Outgoing]] = {}
        for entry in entries:
            try:
                outgoing = describe(entry.path)
            except ImageError as error:
                yield entry, error.code
                continue
            if outgoing.sha256 == entry.sha256:
                sendable[entry.instance] = (entry, outgoing)
            else:
                yield entry, "file-changed"
        if sendable:
            for outgoing, reason in self._sender.send([outgoing for _, outgoing in sendable.values()]):
                yield sendable[outgoing.instance][0], reason

    def _verify(self, entry: Entry) -> bool:
        """Read one object back and compare; return whether it is as it was meant."""
        try:
            wanted = describe(entry.path)
            if wanted.sha256 != entry.sha256:
                raise ImageError("file-changed", "The released file was changed after it was sent.")
            expected = content_digest(entry.path)
            data = self._reader.retrieve(wanted)
        except ImageError as error:
            self._put_off(entry, error.code)
            return False
        except InputError:
            # Behind the others next time, in case the object itself breaks the connection.
            self._queue.move(entry, DeliveryState.SENT, due_at=self._now() + FIRST_WAIT_S)
            raise
        if data is None:
            # Said to be stored, and is not there: some archives answer before they write.
            self._put_off(entry, "not-stored")
            return False
        if _content(data) != expected:
            self._queue.move(entry, DeliveryState.DIFFERS, reason="content-differs")
            return False
        self._queue.move(entry, DeliveryState.VERIFIED)
        return True

    def _put_off(self, entry: Entry, reason: str) -> None:
        attempts = entry.attempts + 1
        if attempts >= MAXIMUM_ATTEMPTS:
            self._queue.move(entry, DeliveryState.REFUSED, reason=reason, attempts=attempts)
        else:
            due_at = self._now() + backoff_s(attempts)
            self._queue.move(entry, DeliveryState.QUEUED, reason=reason, attempts=attempts, due_at=due_at)


def _content(data: bytes) -> str:
    """Return the content digest of a file in memory; of damaged bytes their own, which equals none."""
    with disk_errors(), tempfile.TemporaryDirectory(prefix="medveil-") as folder:
        path = Path(folder, "object.dcm")
        path.write_bytes(data)
        try:
            return content_digest(path)
        except ImageError:
            return hashlib.sha256(data).hexdigest()
