from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from medveil.coordinator.campaign import CampaignState, SiteState, moved, reported, site_moved, waived
from medveil.coordinator.store import Store
from medveil.models.errors import ConfigurationError, RefusedError, StorageError

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as opened:
        yield opened


def running(store: Store) -> None:
    campaign = store.create_campaign("chest", ("a", "b"), NOW + timedelta(days=7), b"offer")
    campaign = moved(campaign, CampaignState.OFFERED, NOW, "ready")
    for state in (SiteState.JOINED, SiteState.OFFERED, SiteState.ACCEPTED):
        campaign = site_moved(campaign, "a", state, NOW, "step")
    store.append(moved(campaign, CampaignState.RUNNING, NOW, "a accepted"))


def test_a_campaign_is_read_back_as_it_was_with_times_and_reasons(store: Store, tmp_path: Path) -> None:
    running(store)
    campaign = waived(store.campaign(1), "b", "Dr B", NOW, "closed")
    store.append(campaign)
    with Store(tmp_path / "store.sqlite") as other:
        assert other.campaign(1) == campaign
        assert other.campaign_numbers() == [1]


def test_two_writers_cannot_both_win(store: Store) -> None:
    running(store)
    first, second = store.campaign(1), store.campaign(1)
    store.append(moved(first, CampaignState.PAUSED, NOW, "night"))
    with pytest.raises(ConfigurationError) as refused:
        store.append(moved(second, CampaignState.ABORTED, NOW, "stop"))
    assert refused.value.code == "campaign-moved"
    assert store.campaign(1).state is CampaignState.PAUSED


def test_many_at_once_move_their_sites_and_nobody_is_overtaken(store: Store, tmp_path: Path) -> None:
    names = tuple(f"site-{number}" for number in range(24))
    store.create_campaign("many", names, None, b"")
    with Store(tmp_path / "store.sqlite") as other_process:

        def join(site: str, through: Store) -> None:
            with through.transaction():
                through.append(site_moved(through.campaign(1), site, SiteState.JOINED, NOW, "r"))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(join, names, [store, other_process] * 12))
    assert {standing.state for standing in store.campaign(1).sites.values()} == {SiteState.JOINED}
    assert len(store.campaign(1).events) == len(names)


def test_a_report_counts_once_and_its_bytes_are_kept(store: Store) -> None:
    running(store)
    after = reported(store.campaign(1), "a", NOW, finished=True)
    assert store.add_report(after, "a", 1, b"\0report", NOW)
    assert not store.add_report(after, "a", 1, b"\0report", NOW)
    with pytest.raises(RefusedError) as refused:
        store.add_report(after, "a", 1, b"another", NOW)
    assert refused.value.code == "report-conflict"
    assert [(r.site, r.sequence, r.payload) for r in store.reports(1)] == [("a", 1, b"\0report")]
    assert store.campaign(1) == after


def test_a_report_and_its_transition_are_stored_together_or_not_at_all(store: Store) -> None:
    running(store)
    stale = reported(store.campaign(1), "a", NOW, finished=True)
    store.append(moved(store.campaign(1), CampaignState.PAUSED, NOW, "night"))
    with pytest.raises(ConfigurationError):
        store.add_report(stale, "a", 1, b"report", NOW)
    assert not store.reports(1)


def test_a_token_is_used_up_once_and_only_its_hash_is_on_the_disk(store: Store, tmp_path: Path) -> None:
    store.invite("a", "hash-1", NOW + timedelta(days=7))
    assert store.redeem("hash-1", "key-1", NOW) == "a"
    assert store.redeem("hash-1", "key-1", NOW) == "a"
    for token, key, now, code in (
        ("hash-1", "key-2", NOW, "token-replayed"),
        ("hash-1", "key-1", NOW + timedelta(days=8), "token-expired"),
        ("hash-2", "key-1", NOW, "token-unknown"),
    ):
        with pytest.raises(RefusedError) as refused:
            store.redeem(token, key, now)
        assert refused.value.code == code


def test_a_new_invitation_voids_the_one_that_was_not_used(store: Store) -> None:
    store.invite("a", "lost", NOW + timedelta(days=7))
    store.invite("a", "fresh", NOW + timedelta(days=7))
    with pytest.raises(RefusedError):
        store.redeem("lost", "key", NOW)
    assert store.redeem("fresh", "key", NOW) == "a"


def test_certificates_are_found_by_serial_and_revoked_by_name(store: Store) -> None:
    serial = 2**150 + 1
    store.add_certificate(serial, "site", "a", NOW + timedelta(days=365))
    row = store.certificate(serial)
    assert row is not None
    assert (row.name, row.revoked) == ("a", False)
    store.revoke("a", NOW)
    assert [c.revoked for c in store.certificates("a")] == [True]
    assert store.certificate(1) is None


def test_the_last_beat_stays_when_a_report_comes(store: Store) -> None:
    store.invite("a", "h", NOW)
    store.record_contact("a", NOW, b"beat")
    store.record_contact("a", NOW + timedelta(seconds=5))
    contact = store.contact("a")
    assert contact is not None
    assert (contact.time, contact.beat) == (NOW + timedelta(seconds=5), b"beat")


def test_a_store_of_another_version_or_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StorageError) as refused:
        Store(path)
    assert refused.value.code == "store-version"


def _invite_for_ever(path: Path) -> None:
    with Store(path) as store:
        for number in range(10**9):
            store.invite(f"site-{number}", f"hash-{number}", NOW)
            store.record_contact(f"site-{number}", NOW, b"x" * 200)


def test_a_kill_leaves_a_store_that_opens_and_holds_whole_transactions(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    child = multiprocessing.get_context("spawn").Process(target=_invite_for_ever, args=(path,))
    child.start()
    wal = path.with_name("store.sqlite-wal")
    while not wal.exists() or wal.stat().st_size < 800_000:
        assert child.is_alive()
        time.sleep(0.005)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    child.close()
    with Store(path):
        pass
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    sites = {row[0] for row in db.execute("SELECT name FROM sites")}
    invited = {row[0] for row in db.execute("SELECT site FROM invitations")}
    contacted = {row[0] for row in db.execute("SELECT site FROM contacts")}
    db.close()
    assert len(sites) > 5
    assert sites == invited
    assert len(sites - contacted) <= 1
