"""What the status says about deliveries: only what a site has confirmed."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from medveil.coordinator.store import Delivery
from medveil.coordinator.watch import as_screen, status_value
from medveil.protos.fleet import Code


def shown(coordinator: Any) -> tuple[dict[str, Any], str]:
    value = status_value(coordinator.store, 1, coordinator.clock())
    console = Console(width=240, record=True, file=None)
    with console.capture() as captured:
        console.print(as_screen(value))
    (site,) = value["sites"]
    return site, captured.get()


def test_what_was_only_sent_is_not_claimed(coordinator: Any) -> None:
    coordinator.join("a")
    coordinator.campaign("a")
    coordinator.store.record_order(1, "a", coordinator.clock())
    site, screen = shown(coordinator)
    assert (site["confirmed_state"], site["bundle_held"], site["refusal"]) == (None, None, None)
    assert "100%" not in screen


@pytest.mark.parametrize(
    ("code", "held", "refusal", "text"),
    [
        (Code.DONE, 6, None, "100%"),
        (Code.DONE, 3, None, "50%"),
        (Code.BUNDLE_SIGNATURE, 0, "bundle-signature", "0%"),
    ],
)
def test_an_answer_is_shown_with_what_is_held_and_why_not(
    coordinator: Any, code: Code, held: int, refusal: str | None, text: str
) -> None:
    coordinator.join("a")
    coordinator.campaign("a", bundle=b"bundle")
    now = coordinator.clock()
    coordinator.store.record_answer(1, "a", Delivery(now, 0, 1, "offered", int(code), held, now))
    site, screen = shown(coordinator)
    assert (site["confirmed_state"], site["bundle_held"], site["refusal"]) == ("offered", held / 6, refusal)
    assert text in screen
    assert (refusal or "-") in screen
