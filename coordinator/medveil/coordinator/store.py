"""The coordinator's memory: one SQLite file, durable at every commit, safe to kill at any moment.

Sites, invitations (hashes only), certificates, campaigns with everything that happened to them, reports, last
contacts, and what travelled over Flower. The state of a campaign is not stored: it follows from its events.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from medveil.coordinator.campaign import Campaign, Event, Plan, extended
from medveil.models.disk import database_errors
from medveil.models.errors import ConfigurationError, RefusedError, StorageError

__all__ = ["CertificateRow", "Contact", "Delivery", "Round", "Store", "StoredReport"]

_SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS sites (name TEXT PRIMARY KEY, enrolled TEXT, revoked TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS invitations (
    token_hash TEXT PRIMARY KEY, site TEXT NOT NULL REFERENCES sites(name),
    expires TEXT NOT NULL, used TEXT, used_key TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY,                 -- hex: serial numbers have up to 160 bits
    role TEXT NOT NULL, name TEXT NOT NULL, not_after TEXT NOT NULL, revoked TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS campaigns (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, sites TEXT NOT NULL, due TEXT,
    offer BLOB NOT NULL, revision INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS events (
    campaign INTEGER NOT NULL REFERENCES campaigns(number), sequence INTEGER NOT NULL, time TEXT NOT NULL,
    site TEXT, outcome TEXT NOT NULL, reason TEXT NOT NULL, by TEXT NOT NULL, PRIMARY KEY (campaign, sequence)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reports (
    campaign INTEGER NOT NULL REFERENCES campaigns(number), site TEXT NOT NULL REFERENCES sites(name),
    sequence INTEGER NOT NULL, sha256 TEXT NOT NULL, payload BLOB NOT NULL, received TEXT NOT NULL,
    PRIMARY KEY (campaign, site, sequence)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contacts (
    site TEXT PRIMARY KEY REFERENCES sites(name), time TEXT NOT NULL, beat BLOB
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS nodes (
    site TEXT PRIMARY KEY REFERENCES sites(name), key BLOB NOT NULL UNIQUE, bound TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deliveries (
    campaign INTEGER NOT NULL REFERENCES campaigns(number), site TEXT NOT NULL REFERENCES sites(name),
    tried TEXT NOT NULL, attempts INTEGER NOT NULL,  -- since the last acknowledgement
    revision INTEGER NOT NULL, state TEXT NOT NULL, code INTEGER, held_bytes INTEGER NOT NULL, answered TEXT,
    PRIMARY KEY (campaign, site)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rounds (
    number INTEGER PRIMARY KEY AUTOINCREMENT, campaign INTEGER NOT NULL REFERENCES campaigns(number),
    sites TEXT NOT NULL, begun TEXT NOT NULL, beat TEXT NOT NULL, ended TEXT
);
"""


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """A certificate that was signed here."""

    serial: int
    role: str
    name: str
    not_after: datetime
    revoked: bool


@dataclass(frozen=True, slots=True)
class StoredReport:
    """A report as it came, byte for byte."""

    site: str
    sequence: int
    payload: bytes
    received: datetime


@dataclass(frozen=True, slots=True)
class Contact:
    """A site's last accepted message.

    Attributes:
        beat: the last serialised beat; None: it has sent none.
    """

    time: datetime
    beat: bytes | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """How far a campaign's offer and bundle have come to one site over Flower.

    Attributes:
        tried: when an order was last sent.
        attempts: orders sent since the site last answered.
        revision: of the offer that it answered last; 0: it has answered none.
        state: the campaign's state in that offer; empty: none.
        code: its answer (`medveil.protos.fleet.Code`); None: none.
        held_bytes: how much of the bundle it says it holds.
        answered: when it answered last.
    """

    tried: datetime
    attempts: int
    revision: int = 0
    state: str = ""
    code: int | None = None
    held_bytes: int = 0
    answered: datetime | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One short Flower run: bring these sites of this campaign up to date.

    Attributes:
        sites: those that it is not done with yet.
        beat: when whoever runs it last said so.
    """

    number: int
    campaign: int
    sites: tuple[str, ...]
    begun: datetime
    beat: datetime


class Store(AbstractContextManager["Store"]):
    """The open store. Threads of one process may share it; every method is a transaction or joins one."""

    def __init__(self, path: Path) -> None:
        """Open or create the store.

        Raises:
            StorageError: it cannot be created, or another version wrote it.
        """
        self._lock = threading.RLock()
        # Histories only grow, so what was replayed once stays true and only later events are read.
        self._replayed: dict[int, Campaign] = {}
        with _store_errors():
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _SCHEMA_VERSION):
                self._db.close()
                raise StorageError("store-version", "The store was written by another medveil version.")
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was committed is on the disk."""
        with self._lock:
            self._db.close()

    # Sites and their certificates
    # ----------------------------------------------------------------------------------------------

    def invite(self, site: str, token_hash: str, expires: datetime) -> None:
        """Store an invitation; earlier ones of the same site that were not used become void."""
        with self.transaction():
            self._db.execute("INSERT INTO sites (name) VALUES (?) ON CONFLICT DO NOTHING", (site,))
            self._db.execute("DELETE FROM invitations WHERE site = ? AND used IS NULL", (site,))
            self._db.execute(
                "INSERT INTO invitations (token_hash, site, expires) VALUES (?, ?, ?)",
                (token_hash, site, expires.isoformat()),
            )

    def redeem(self, token_hash: str, key_hash: str, now: datetime) -> str:
        """Use up an invitation for one public key and return whose it was.

        The same key may come again, because an answer can be lost on the way; only its holder gains by it.

        Raises:
            RefusedError: ``token-unknown``, ``token-replayed`` or ``token-expired``.
        """
        with self.transaction():
            row = self._one(
                "SELECT site, expires, used_key FROM invitations WHERE token_hash = ?", token_hash
            )
            if row is None:
                raise RefusedError("token-unknown", "This invitation does not exist; ask for a new one.")
            if row[2] not in (None, key_hash):
                raise RefusedError(
                    "token-replayed", "This invitation was used already. If not by you, call the coordinator."
                )
            if datetime.fromisoformat(row[1]) <= now:
                raise RefusedError("token-expired", "This invitation has expired; ask for a new one.")
            time = now.isoformat()
            self._db.execute(
                "UPDATE invitations SET used = ?, used_key = ? WHERE token_hash = ?",
                (time, key_hash, token_hash),
            )
            self._db.execute(
                "UPDATE sites SET enrolled = COALESCE(enrolled, ?), revoked = NULL WHERE name = ?",
                (time, row[0]),
            )
            return str(row[0])

    def enrolled(self, site: str) -> bool:
        """Return whether a site has joined and was not revoked since."""
        row = self._one("SELECT enrolled, revoked FROM sites WHERE name = ?", site)
        return row is not None and row[0] is not None and row[1] is None

    def enrol(self, site: str, now: datetime) -> None:
        """Record that a site joined by file, without an invitation."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO sites (name, enrolled) VALUES (?1, ?2) ON CONFLICT DO UPDATE SET"
                " enrolled = COALESCE(enrolled, excluded.enrolled), revoked = NULL",
                (site, now.isoformat()),
            )

    def add_certificate(self, serial: int, role: str, name: str, not_after: datetime) -> None:
        """Record a certificate that was signed, before it is handed out."""
        with self.transaction():
            if role == "site":
                self._db.execute("INSERT INTO sites (name) VALUES (?) ON CONFLICT DO NOTHING", (name,))
            self._db.execute(
                "INSERT INTO certificates (serial, role, name, not_after) VALUES (?, ?, ?, ?)",
                (f"{serial:x}", role, name, not_after.isoformat()),
            )

    def certificate(self, serial: int) -> CertificateRow | None:
        """Return a certificate by its serial number."""
        row = self._one(
            "SELECT serial, role, name, not_after, revoked FROM certificates WHERE serial = ?", f"{serial:x}"
        )
        return None if row is None else _certificate_row(row)

    def certificates(self, name: str) -> list[CertificateRow]:
        """Return the certificates of a site or operator, the one that lasts longest first."""
        rows = self._all(
            "SELECT serial, role, name, not_after, revoked FROM certificates WHERE name = ?"
            " ORDER BY not_after DESC, serial",
            name,
        )
        return [_certificate_row(row) for row in rows]

    def revoke(self, name: str, now: datetime) -> None:
        """Revoke every certificate and open invitation of a name; its reports stay."""
        with self.transaction():
            self._db.execute(
                "UPDATE certificates SET revoked = ? WHERE name = ? AND revoked IS NULL",
                (now.isoformat(), name),
            )
            self._db.execute("UPDATE sites SET revoked = ? WHERE name = ?", (now.isoformat(), name))
            self._db.execute("DELETE FROM invitations WHERE site = ? AND used IS NULL", (name,))

    # Campaigns
    # ----------------------------------------------------------------------------------------------

    def create_campaign(
        self, name: str, sites: tuple[str, ...], due: datetime | None, offer: bytes
    ) -> Campaign:
        """Store a new draft under the next number.

        Args:
            name: for people; no other campaign has it.
            sites: the names of all that take part.
            due: when a site counts as late; None: never.
            offer: the serialised offer, without number and revision.

        Raises:
            ConfigurationError: ``campaign-exists``, or the plan is refused.
        """
        Campaign.drafted(Plan(0, name, sites, due))
        with self.transaction():
            if self._one("SELECT 1 FROM campaigns WHERE name = ?", name):
                raise ConfigurationError("campaign-exists", "There is a campaign of this name already.")
            for site in sites:
                self._db.execute("INSERT INTO sites (name) VALUES (?) ON CONFLICT DO NOTHING", (site,))
            cursor = self._db.execute(
                "INSERT INTO campaigns (name, sites, due, offer, revision) VALUES (?, ?, ?, ?, 1)",
                (name, json.dumps(sites), None if due is None else due.isoformat(), offer),
            )
            return self.campaign(int(cursor.lastrowid or 0))

    def campaign(self, number: int) -> Campaign:
        """Return a campaign as its events made it.

        Raises:
            ConfigurationError: ``no-campaign``.
        """
        with self._lock:
            known = self._replayed.get(number) or self._drafted(number)
            later = self._all(
                "SELECT time, site, outcome, reason, by FROM events WHERE campaign = ? AND sequence > ?"
                " ORDER BY sequence",
                number,
                len(known.events),
            )
            events = (Event(datetime.fromisoformat(time), *rest) for time, *rest in later)
            campaign = self._replayed[number] = extended(known, events)
            return campaign

    def _drafted(self, number: int) -> Campaign:
        row = self._one("SELECT name, sites, due FROM campaigns WHERE number = ?", number)
        if row is None:
            raise ConfigurationError("no-campaign", "There is no campaign of this number.")
        due = None if row[2] is None else datetime.fromisoformat(row[2])
        return Campaign.drafted(Plan(number, row[0], tuple(json.loads(row[1])), due))

    def campaign_numbers(self) -> list[int]:
        """Return the numbers of all campaigns."""
        return [row[0] for row in self._all("SELECT number FROM campaigns ORDER BY number")]

    def offer(self, number: int) -> tuple[bytes, int]:
        """Return a campaign's serialised offer and its revision."""
        row = self._one("SELECT offer, revision FROM campaigns WHERE number = ?", number)
        if row is None:
            raise ConfigurationError("no-campaign", "There is no campaign of this number.")
        return bytes(row[0]), int(row[1])

    def append(self, campaign: Campaign) -> None:
        """Store the events that a campaign has beyond the stored ones.

        Raises:
            ConfigurationError: ``campaign-moved``: the stored history is not the beginning of this one;
                read the campaign again.
        """
        with self.transaction():
            stored = self.campaign(campaign.plan.number)
            known = len(stored.events)
            if campaign.events[:known] != stored.events:
                raise ConfigurationError("campaign-moved", "The campaign has changed meanwhile; try again.")
            self._db.executemany(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    (campaign.plan.number, sequence, e.time.isoformat(), e.site, e.outcome, e.reason, e.by)
                    for sequence, e in enumerate(campaign.events[known:], known + 1)
                ),
            )

    # What sites send
    # ----------------------------------------------------------------------------------------------

    def add_report(
        self, moved: Campaign, site: str, sequence: int, payload: bytes, received: datetime
    ) -> bool:
        """Store a report and what it changes about its campaign, both or neither.

        Returns:
            False if this report was known already; then nothing changes.

        Raises:
            RefusedError: ``report-conflict``: the same number came with other bytes.
            ConfigurationError: ``campaign-moved``.
        """
        digest = hashlib.sha256(payload).hexdigest()
        number = moved.plan.number
        with self.transaction():
            known = self._one(
                "SELECT sha256 FROM reports WHERE campaign = ? AND site = ? AND sequence = ?",
                number,
                site,
                sequence,
            )
            if known is not None:
                if known[0] != digest:
                    raise RefusedError(
                        "report-conflict",
                        "Another report of this number is stored; send it under the next one.",
                    )
                return False
            self._db.execute(
                "INSERT INTO reports VALUES (?, ?, ?, ?, ?, ?)",
                (number, site, sequence, digest, payload, received.isoformat()),
            )
            self.append(moved)
            return True

    def knows_report(self, number: int, site: str, sequence: int, payload: bytes) -> bool:
        """Return whether exactly this report is stored."""
        row = self._one(
            "SELECT sha256 FROM reports WHERE campaign = ? AND site = ? AND sequence = ?",
            number,
            site,
            sequence,
        )
        return row is not None and row[0] == hashlib.sha256(payload).hexdigest()

    def reports(self, number: int) -> list[StoredReport]:
        """Return all reports of a campaign, by site and sequence."""
        rows = self._all(
            "SELECT site, sequence, payload, received FROM reports WHERE campaign = ? ORDER BY site, sequence",
            number,
        )
        return [StoredReport(r[0], r[1], bytes(r[2]), datetime.fromisoformat(r[3])) for r in rows]

    def record_contact(self, site: str, time: datetime, beat: bytes | None = None) -> None:
        """Remember a site's sign of life; without a beat the last one stays."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO contacts VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET"
                " time = excluded.time, beat = COALESCE(excluded.beat, beat)",
                (site, time.isoformat(), beat),
            )

    def contact(self, site: str) -> Contact | None:
        """Return a site's last sign of life."""
        row = self._one("SELECT time, beat FROM contacts WHERE site = ?", site)
        return None if row is None else Contact(datetime.fromisoformat(row[0]), row[1])

    # What travels over Flower
    # ----------------------------------------------------------------------------------------------

    def bind_node(self, site: str, key: bytes, now: datetime) -> None:
        """Bind a node's public key to the site that showed it; a new key of the same site replaces the old one.

        Raises:
            RefusedError: ``node-key``: it is another site's.
        """
        with self.transaction():
            row = self._one("SELECT site FROM nodes WHERE key = ?", key)
            if row is not None and row[0] != site:
                raise RefusedError("node-key", "This node key belongs to another site; make a new one.")
            self._db.execute(
                "INSERT INTO nodes VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET"
                " key = excluded.key, bound = excluded.bound WHERE key <> excluded.key",
                (site, key, now.isoformat()),
            )

    def node_keys(self) -> dict[bytes, str]:
        """Return every site that has a node, by the node's public key."""
        return {bytes(key): str(site) for key, site in self._all("SELECT key, site FROM nodes")}

    def deliveries(self, number: int) -> dict[str, Delivery]:
        """Return what was delivered of a campaign, by site; a site to which nothing was ever sent is missing."""
        rows = self._all(
            "SELECT site, tried, attempts, revision, state, code, held_bytes, answered"
            " FROM deliveries WHERE campaign = ?",
            number,
        )
        return {row[0]: _delivery(*row[1:]) for row in rows}

    def record_order(self, number: int, site: str, now: datetime) -> None:
        """Remember that an order is on its way."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO deliveries VALUES (?1, ?2, ?3, 1, 0, '', NULL, 0, NULL) ON CONFLICT DO UPDATE SET"
                " tried = excluded.tried, attempts = attempts + 1",
                (number, site, now.isoformat()),
            )

    def record_answer(self, number: int, site: str, answer: Delivery) -> None:
        """Remember what a site answered."""
        last = None if answer.answered is None else answer.answered.isoformat()
        with self.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO deliveries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    site,
                    answer.tried.isoformat(),
                    answer.attempts,
                    answer.revision,
                    answer.state,
                    answer.code,
                    answer.held_bytes,
                    last,
                ),
            )

    def begin_round(self, number: int, sites: tuple[str, ...], now: datetime) -> Round:
        """Remember that a Flower run is about to be asked for."""
        time = now.isoformat()
        with self.transaction():
            cursor = self._db.execute(
                "INSERT INTO rounds (campaign, sites, begun, beat) VALUES (?, ?, ?, ?)",
                (number, json.dumps(sites), time, time),
            )
            return Round(int(cursor.lastrowid or 0), number, sites, now, now)

    def beat_round(self, round_number: int, now: datetime, *, ended: bool = False) -> None:
        """Remember that a round is alive, or that it has ended."""
        time = now.isoformat()
        with self.transaction():
            self._db.execute(
                "UPDATE rounds SET beat = ?, ended = ? WHERE number = ? AND ended IS NULL",
                (time, time if ended else None, round_number),
            )

    def leave_round(self, round_number: int, site: str) -> None:
        """Remember that a round is done with one of its sites, which another round may take now."""
        with self.transaction():
            row = self._one("SELECT sites FROM rounds WHERE number = ?", round_number)
            left = [other for other in json.loads(row[0]) if other != site]
            self._db.execute("UPDATE rounds SET sites = ? WHERE number = ?", (json.dumps(left), round_number))

    def open_rounds(self) -> list[Round]:
        """Return the rounds that have not ended, as far as anyone has said."""
        rows = self._all("SELECT number, campaign, sites, begun, beat FROM rounds WHERE ended IS NULL")
        return [
            Round(r[0], r[1], tuple(json.loads(r[2])), *(datetime.fromisoformat(time) for time in r[3:]))
            for r in rows
        ]

    # ----------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside the block at once, or nothing of it.

        From the first statement on no other thread and no other process can write, so a campaign that is read,
        moved on and stored inside one block cannot be overtaken. Blocks may be nested; the outermost commits.

        Raises:
            StorageError: the disk is full or fails, or another process holds the store for too long.
        """
        with self._lock, _store_errors():
            if self._db.in_transaction:  # part of a larger one
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.rollback()
                self._replayed.clear()  # may hold what was taken back
                raise
            self._db.commit()

    def _one(self, statement: str, *values: object) -> Any:
        with self._lock, _store_errors():
            return self._db.execute(statement, values).fetchone()

    def _all(self, statement: str, *values: object) -> list[Any]:
        with self._lock, _store_errors():
            return self._db.execute(statement, values).fetchall()


def _delivery(
    tried: str, attempts: int, revision: int, state: str, code: int | None, held: int, answered: str | None
) -> Delivery:
    last = None if answered is None else datetime.fromisoformat(answered)
    return Delivery(datetime.fromisoformat(tried), attempts, revision, state, code, held, last)


def _certificate_row(row: Any) -> CertificateRow:
    return CertificateRow(int(row[0], 16), row[1], row[2], datetime.fromisoformat(row[3]), row[4] is not None)


def _store_errors() -> AbstractContextManager[None]:
    return database_errors(
        "store-failed", "The coordinator's store cannot be read or written; check the disk and try again."
    )
