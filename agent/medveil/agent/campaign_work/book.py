"""The site's record of campaigns: one row each, written by whoever learns something, read by all.

Several processes use it at once (the client app, ``run``, the worker, the steward's commands); each change is one
transaction. What the coordinator says is kept as its newest offer; what the site did is kept beside it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from medveil.agent.reporting_policy import NoisePolicy
from medveil.models.disk import database_errors, make_private_folder
from medveil.models.errors import ConfigurationError, RefusedError
from medveil.protos.v1 import campaign_pb2

__all__ = ["Answer", "Book", "Campaign", "Stage", "WorkState", "book_path"]

_WAIT_S: Final = 30.0
"""How long one process waits for another's transaction; each takes milliseconds."""
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS campaigns (
    number INTEGER PRIMARY KEY,
    offer BLOB NOT NULL,
    received TEXT NOT NULL,
    answer TEXT,
    answered_by TEXT,
    answer_sent INTEGER NOT NULL DEFAULT 0,
    bundle_trouble TEXT NOT NULL DEFAULT '',
    work TEXT NOT NULL DEFAULT 'none',
    work_trouble TEXT NOT NULL DEFAULT '',
    report BLOB,
    report_sequence INTEGER NOT NULL DEFAULT 0,
    report_sent INTEGER NOT NULL DEFAULT 0,
    report_trouble TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS history (
    time TEXT NOT NULL,
    number INTEGER NOT NULL,
    event TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS noise_spent (
    time TEXT NOT NULL,
    number INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    epsilon TEXT NOT NULL
);
"""


class Answer(StrEnum):
    """The steward's word on an offer."""

    ACCEPTED = "accepted"
    DECLINED = "declined"


class WorkState(StrEnum):
    """How far the job over the site's images is; how many images, the job's own ledger says."""

    NONE = "none"
    RUNNING = "running"
    STOPPED = "stopped"
    """It ended with an error and is tried again."""
    DONE = "done"
    """Every image has reached its final state."""


class Stage(StrEnum):
    """What a campaign waits for at this site; each follows from the row alone."""

    WAITING_FOR_STEWARD = "waiting-for-steward"
    DECLINED = "declined"
    WAITING_FOR_COORDINATOR = "waiting-for-coordinator"
    """Accepted; its bundle, or the word to start, is still to come."""
    BUNDLE_REFUSED = "bundle-refused"
    READY = "ready"
    PROTECTING = "protecting"
    STOPPED = "stopped"
    REPORTING = "reporting"
    REPORTED = "reported"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Campaign:
    """One row.

    Attributes:
        offer: the newest, with the campaign's state as the coordinator has it.
        received: when the newest revision came, ISO 8601, UTC.
        answer: None: the steward has not answered this revision.
        answered_by: ``steward`` or ``policy``.
        answer_sent: whether the coordinator has it.
        bundle_trouble: why the bundle was refused (a code); empty: it was not.
        work_trouble: why the job stopped (a code); empty: it did not.
        report: serialised, once the work is done; sent again byte for byte until it is accepted.
        report_trouble: why the coordinator did not take it (a code).
    """

    number: int
    offer: campaign_pb2.Offer
    received: str
    answer: Answer | None
    answered_by: str | None
    answer_sent: bool
    bundle_trouble: str
    work: WorkState
    work_trouble: str
    report: bytes | None
    report_sequence: int
    report_sent: bool
    report_trouble: str

    @property
    def is_over(self) -> bool:
        """Whether the coordinator has ended it."""
        return self.offer.state in (campaign_pb2.CAMPAIGN_STATE_SEALED, campaign_pb2.CAMPAIGN_STATE_ABORTED)

    def may_begin(self, *, bundle_held: bool) -> bool:
        """Return whether the job may begin: accepted, told to start, bundle here, and not finished before."""
        running = self.offer.state == campaign_pb2.CAMPAIGN_STATE_RUNNING
        return self.answer is Answer.ACCEPTED and running and bundle_held and self.work is not WorkState.DONE

    def stage(self, *, bundle_held: bool) -> Stage:
        """Return what the campaign waits for here."""
        match self.answer, self.work:
            case (Answer.ACCEPTED, WorkState.DONE):
                return Stage.REPORTED if self.report_sent else Stage.REPORTING
            case _ if self.is_over:
                return Stage.OVER
            case (None, _):
                return Stage.BUNDLE_REFUSED if self.bundle_trouble else Stage.WAITING_FOR_STEWARD
            case (Answer.DECLINED, _):
                return Stage.DECLINED
            case (_, WorkState.RUNNING):
                return Stage.PROTECTING
            case (_, WorkState.STOPPED):
                return Stage.STOPPED
        if self.bundle_trouble:
            return Stage.BUNDLE_REFUSED
        return Stage.READY if self.may_begin(bundle_held=bundle_held) else Stage.WAITING_FOR_COORDINATOR


def book_path(federation: Path) -> Path:
    """Return where the book lies in the site's federation folder."""
    return federation / "campaigns.sqlite"


class Book(AbstractContextManager["Book"]):
    """The open book; for one thread."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Open or create the book.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._now = now
        make_private_folder(path.parent)
        with _book_errors():
            self._db = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        with _book_errors():
            path.chmod(0o600)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    # Reading

    def campaigns(self) -> list[Campaign]:
        """Return every campaign, by number."""
        with _book_errors():
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM campaigns ORDER BY number").fetchall()  # noqa: S608
        return [_campaign(row) for row in rows]

    def campaign(self, number: int) -> Campaign | None:
        """Return one campaign, or None if it was never offered."""
        return next((c for c in self.campaigns() if c.number == number), None)

    def history(self, number: int) -> list[tuple[str, str]]:
        """Return time and event of all that happened to a campaign here, oldest first."""
        with _book_errors():
            rows = self._db.execute(
                "SELECT time, event FROM history WHERE number = ? ORDER BY rowid", (number,)
            ).fetchall()
        return [(str(time), str(event)) for time, event in rows]

    def noise_spent(self) -> Decimal:
        """Return the privacy loss of all reports that were ever made here, sent or not."""
        with _book_errors():
            rows = self._db.execute("SELECT epsilon FROM noise_spent").fetchall()
        return sum((Decimal(epsilon) for (epsilon,) in rows), Decimal(0))

    # What the coordinator says

    def offered(self, offer: campaign_pb2.Offer) -> bool:
        """Take an offer, or the newer state of a known one; return whether anything changed.

        An older revision than the known one is late mail and changes nothing. A newer one is a new question:
        what was answered and done for the old one doesn't count for it.
        """
        with self._transaction():
            known = self.campaign(offer.campaign)
            payload = offer.SerializeToString(deterministic=True)
            if known is None or offer.revision > known.offer.revision:
                self._db.execute("DELETE FROM campaigns WHERE number = ?", (offer.campaign,))
                self._db.execute(
                    "INSERT INTO campaigns (number, offer, received, report_sequence) VALUES (?, ?, ?, ?)",
                    (offer.campaign, payload, self._time(), 0 if known is None else known.report_sequence),
                )
                self._note(offer.campaign, f"offered, revision {offer.revision}")
                return True
            if offer.revision < known.offer.revision or payload == known.offer.SerializeToString(
                deterministic=True
            ):
                return False
            self._set(offer.campaign, offer=payload)
            if offer.state != known.offer.state:
                name = campaign_pb2.CampaignState.Name(offer.state).removeprefix("CAMPAIGN_STATE_").lower()
                self._note(offer.campaign, f"the coordinator says: {name}")
            return True

    def bundle_refused(self, number: int, code: str) -> None:
        """Record why the bundle cannot be used."""
        with self._transaction():
            self._set(number, bundle_trouble=code)
            self._note(number, f"bundle refused: {code}")

    # What the steward says

    def answer(self, number: int, answer: Answer, by: Literal["steward", "policy"]) -> Campaign:
        """Record the answer to the newest revision. Accepting also asks for a refused bundle once more.

        Raises:
            ConfigurationError: ``no-campaign``, or ``answered``: it was answered otherwise and the coordinator knows.
        """
        with self._transaction():
            known = self.campaign(number)
            if known is None:
                raise ConfigurationError(
                    "no-campaign", "No such campaign was offered here; `medveil-agent status` lists them."
                )
            if known.answer is not None and known.answer is not answer and known.answer_sent:
                raise ConfigurationError(
                    "answered", f"This campaign was {known.answer} and the coordinator knows; call them."
                )
            sent = known.answer is answer and known.answer_sent
            self._set(number, answer=str(answer), answered_by=by, answer_sent=int(sent), bundle_trouble="")
            self._note(number, f"{answer} by the {by}")
        changed = self.campaign(number)
        assert changed is not None  # noqa: S101
        return changed

    def answer_sent(self, number: int) -> None:
        """Record that the coordinator has the answer."""
        with self._transaction():
            self._set(number, answer_sent=1)
            self._note(number, "answer sent")

    # What was done

    def work_is(self, number: int, state: WorkState, trouble: str = "") -> None:
        """Record how the job stands."""
        with self._transaction():
            self._set(number, work=str(state), work_trouble=trouble)
            self._note(number, f"work {state}" + (f": {trouble}" if trouble else ""))

    def report_ready(
        self, number: int, sequence: int, report: bytes, *, noise: NoisePolicy | None = None
    ) -> None:
        """Keep the report that is to be sent; from here on it is repeated, not made anew.

        Args:
            number: the campaign's.
            sequence: the report's.
            report: serialised.
            noise: what the policy asks for, if the report's figures have noise. Their privacy loss is spent in the
                same transaction: no report can be sent that isn't paid for, and none is paid for twice.

        Raises:
            RefusedError: ``noise-budget``: it isn't enough for this report; nothing was kept.
        """
        with self._transaction():
            if noise is not None:
                self._spend(number, sequence, noise)
            self._set(number, report=report, report_sequence=sequence, report_sent=0, report_trouble="")
            self._note(number, f"report {sequence} ready")

    def report_taken(self, number: int) -> None:
        """Record that the coordinator has the report."""
        with self._transaction():
            self._set(number, report_sent=1, report_trouble="")
            self._note(number, "report accepted by the coordinator")

    def report_refused(self, number: int, code: str) -> None:
        """Record why the coordinator did not take the report."""
        with self._transaction():
            self._set(number, report_trouble=code)
            self._note(number, f"report refused: {code}")

    # ------------------------------------------------------------------------------------------------

    def _spend(self, number: int, sequence: int, noise: NoisePolicy) -> None:
        if not noise.affords(self.noise_spent()):
            raise RefusedError(
                "noise-budget", "The site's noise budget doesn't allow another report with figures."
            )
        self._db.execute(
            "INSERT INTO noise_spent VALUES (?, ?, ?, ?)",
            (self._time(), number, sequence, str(noise.epsilon_per_report)),
        )

    def _set(self, number: int, **values: object) -> None:
        names = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE campaigns SET {names} WHERE number = ?", (*values.values(), number))  # noqa: S608

    def _note(self, number: int, event: str) -> None:
        self._db.execute("INSERT INTO history VALUES (?, ?, ?)", (self._time(), number, event))

    def _time(self) -> str:
        return self._now().isoformat(timespec="seconds")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _book_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


_COLUMNS: Final = (
    "number, offer, received, answer, answered_by, answer_sent, bundle_trouble, work, work_trouble, report,"
    " report_sequence, report_sent, report_trouble"
)


def _campaign(row: tuple[Any, ...]) -> Campaign:
    return Campaign(
        number=row[0],
        offer=campaign_pb2.Offer.FromString(row[1]),
        received=row[2],
        answer=None if row[3] is None else Answer(row[3]),
        answered_by=row[4],
        answer_sent=bool(row[5]),
        bundle_trouble=row[6],
        work=WorkState(row[7]),
        work_trouble=row[8],
        report=row[9],
        report_sequence=row[10],
        report_sent=bool(row[11]),
        report_trouble=row[12],
    )


def _book_errors() -> AbstractContextManager[None]:
    return database_errors(
        "book-damaged",
        "The site's record of campaigns cannot be written; free some space on its disk, or restore a backup.",
    )
