"""A conversation brings one site up to date, goes on where it broke off, and stores every answer as it comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from medveil.coordinator import operations
from medveil.coordinator.campaign import CampaignState
from medveil.coordinator.fleet import bundles
from medveil.coordinator.fleet.conversation import bring_up_to_date
from medveil.models.errors import StorageError
from medveil.protos.fleet import Ack, Code, Order, Step
from medveil.protos.v1 import campaign_pb2

BUNDLE = bytes(range(256)) * 4
PART = 300


@dataclass
class Site:
    """A site that keeps what it is sent; answers may be replaced or swallowed by the test."""

    held: bytes = b""
    orders: list[Order] = field(default_factory=list)
    silent_after: int = 10**9
    code: Code = Code.DONE

    def ask(self, site: str, order: Order, part: bytes | None) -> Ack | None:
        self.orders.append(order)
        if len(self.orders) > self.silent_after:
            return None
        code = self.code
        if part is not None and code is Code.DONE:
            code = Code.DONE if order.offset == len(self.held) else Code.OFFSET
            self.held += part if code is Code.DONE else b""
        return Ack(order.campaign, order.revision, code, len(self.held))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "PART_BYTES", PART)


def talk(coordinator: Any, site: Site, number: int = 1) -> None:
    bring_up_to_date(coordinator.store, site, coordinator.bundles, number, "a", coordinator.clock)


def test_the_offer_comes_first_and_the_bundle_whole(coordinator: Any) -> None:
    coordinator.join("a")
    coordinator.campaign("a", bundle=BUNDLE)
    site = Site()
    talk(coordinator, site)
    assert [order.step for order in site.orders] == [Step.STATE, *[Step.BUNDLE] * 4]
    offer = campaign_pb2.Offer.FromString(site.orders[0].offer)
    assert (offer.name, offer.campaign, offer.state) == ("chest", 1, campaign_pb2.CAMPAIGN_STATE_OFFERED)
    assert site.held == BUNDLE
    delivery = coordinator.store.deliveries(1)["a"]
    assert (delivery.held_bytes, delivery.state, delivery.code) == (len(BUNDLE), "offered", Code.DONE)


def test_a_site_that_holds_the_bundle_is_sent_nothing_of_it(coordinator: Any) -> None:
    coordinator.join("a")
    coordinator.campaign("a", bundle=BUNDLE)
    site = Site(held=BUNDLE)
    talk(coordinator, site)
    assert [order.step for order in site.orders] == [Step.STATE]


def test_a_broken_transfer_goes_on_where_the_site_stands(coordinator: Any) -> None:
    coordinator.join("a")
    coordinator.campaign("a", bundle=BUNDLE)
    site = Site(silent_after=3)
    talk(coordinator, site)
    assert coordinator.store.deliveries(1)["a"].attempts == 1
    assert len(site.held) == 2 * PART

    site.silent_after = 10**9
    site.orders.clear()
    talk(coordinator, site)
    assert [order.offset for order in site.orders[1:]] == [2 * PART, 3 * PART]
    assert site.held == BUNDLE


def test_a_refusal_ends_the_conversation_and_is_stored(coordinator: Any) -> None:
    coordinator.join("a")
    coordinator.campaign("a", bundle=BUNDLE)
    site = Site(code=Code.POLICY)
    talk(coordinator, site)
    assert len(site.orders) == 1
    assert coordinator.store.deliveries(1)["a"].code == Code.POLICY


def test_a_site_that_takes_a_part_without_keeping_it_is_not_sent_it_for_ever(coordinator: Any) -> None:
    class Forgetful(Site):
        def ask(self, site: str, order: Order, part: bytes | None) -> Ack | None:
            self.orders.append(order)
            return Ack(order.campaign, order.revision, Code.DONE, 0)

    coordinator.join("a")
    coordinator.campaign("a", bundle=BUNDLE)
    site = Forgetful()
    talk(coordinator, site)
    assert len(site.orders) == 2
    assert coordinator.store.deliveries(1)["a"].code == Code.UNEXPECTED


def test_a_campaign_that_ends_meanwhile_ends_the_transfer(coordinator: Any) -> None:
    class Aborting(Site):
        def ask(self, site: str, order: Order, part: bytes | None) -> Ack | None:
            if len(self.orders) == 1:
                operations.move_campaign(
                    coordinator.store, 1, CampaignState.ABORTED, coordinator.clock(), "enough"
                )
            return super().ask(site, order, part)

    coordinator.join("a")
    coordinator.campaign("a", bundle=BUNDLE)
    site = Aborting()
    talk(coordinator, site)
    assert len(site.orders) == 2
    assert len(site.held) == PART


def test_a_bundle_that_is_gone_is_named(coordinator: Any) -> None:
    coordinator.join("a")
    coordinator.campaign("a", bundle=BUNDLE)
    for kept in Path(coordinator.bundles).iterdir():
        kept.unlink()
    with pytest.raises(StorageError, match="bundle-missing"):
        talk(coordinator, Site())
