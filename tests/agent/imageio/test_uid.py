from __future__ import annotations

import uuid

import pytest

from medveil.agent.imageio.uid import DerivedUids

KEY = bytes(range(32))
SOURCE = "1.2.840.113619.2.55.3.1"


def uids(key: bytes = KEY, campaign: str = "chest-2026", policy: str = "p1") -> DerivedUids:
    return DerivedUids(key, campaign, policy)


def test_the_same_source_always_gets_the_same_uid() -> None:
    assert uids().instance(SOURCE) == uids().instance(SOURCE)


@pytest.mark.parametrize("other", [uids(key=bytes(32)), uids(campaign="other"), uids(policy="p2")])
def test_key_campaign_and_policy_all_change_the_uid(other: DerivedUids) -> None:
    assert other.instance(SOURCE) != uids().instance(SOURCE)
    assert other.series(SOURCE) != uids().series(SOURCE)


def test_an_instance_and_a_series_of_one_source_uid_differ() -> None:
    assert uids().instance(SOURCE) != uids().series(SOURCE)


def test_fields_cannot_run_into_each_other() -> None:
    assert uids(campaign="ab", policy="c").instance(SOURCE) != uids(campaign="a", policy="bc").instance(
        SOURCE
    )


def test_the_uid_is_a_valid_uuid_uid() -> None:
    new = uids().instance(SOURCE)
    number = uuid.UUID(int=int(new.removeprefix("2.25.")))
    assert number.version == 8
    assert number.variant == uuid.RFC_4122
    assert len(new) <= 64


def test_the_key_is_never_printed() -> None:
    assert "site_key" not in repr(uids())


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        uids(key=b"short")
