"""What the status says about deliveries: only what a site has confirmed."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from medveil.coordinator import operations
from medveil.coordinator.store import Delivery
from medveil.coordinator.watch import as_screen, status_value
from medveil.protos.fleet import Code
from medveil.protos.v1 import figures_pb2, report_pb2, status_pb2


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


def with_noise(images: int) -> report_pb2.Report:
    """A report whose site adds noise; 0 images: its budget is used up."""
    used_up = figures_pb2.Count(suppressed=figures_pb2.SUPPRESSION_BUDGET)
    told = figures_pb2.Count(noised=figures_pb2.NoisedCount(images=images, draws=1)) if images else used_up
    names = ("images", "verified", "not_protectable", "quarantined")
    counts = dict.fromkeys(names, told) | {"unfinished": figures_pb2.Count(exact=0)}
    return report_pb2.Report(
        campaign=1,
        offer_revision=1,
        sequence=1,
        minimum_group_size=5,
        outcome=report_pb2.Outcome(**counts),
        changed_share_mean=figures_pb2.Rate(suppressed=figures_pb2.SUPPRESSION_NOISE),
        noise=figures_pb2.Noise(epsilon=0.5 if images else 0, images_per_patient=1, scale=6 if images else 0),
    )


def test_noise_is_shown_as_what_it_is(coordinator: Any) -> None:
    sites = {"blurred": 120, "below": -40, "silent": 0}
    for site in sites:
        coordinator.join(site)
    coordinator.campaign(*sites)
    for site, images in sites.items():
        coordinator.answer(1, site)
        payload = with_noise(images).SerializeToString(deterministic=True)
        operations.take_report(coordinator.store, site, payload, coordinator.clock())
    value = status_value(coordinator.store, 1, coordinator.clock())
    assert {site["site"]: site["report_epsilon"] for site in value["sites"]} == {
        "blurred": 0.5, "below": 0.5, "silent": 0,
    }  # fmt: skip
    assert {site["state"] for site in value["sites"]} == {
        "verified"
    }  # the job is done, whatever is told of it
    verified = value["totals"]["counts"]["verified"]
    assert (verified["known"], verified["withheld_by"]) == (80, 1)
    assert 12 * 2.1 < verified["half_interval"] < 12 * 2.2  # two draws of scale 6: a deviation of 12
    console = Console(width=200)
    with console.capture() as captured:
        console.print(as_screen(value))
    screen = captured.get()
    assert f"verified 80 ± {verified['half_interval']} + withheld by 1" in screen
    assert "noise that these sites add: below (epsilon 0.5), blurred (epsilon 0.5)" in screen
    assert "noise budget used up, so no figures: silent" in screen


def test_a_site_that_adds_noise_has_no_speed(coordinator: Any) -> None:
    caller = coordinator.caller("a")
    coordinator.campaign("a")
    withheld = figures_pb2.Count(suppressed=figures_pb2.SUPPRESSION_NOISE)
    beat = status_pb2.Beat(
        activity=status_pb2.ACTIVITY_PROTECTING, campaign=1, images=withheld, done=withheld
    )
    operations.take_beat(
        coordinator.store, caller, beat.SerializeToString(deterministic=True), coordinator.clock()
    )
    site, screen = shown(coordinator)
    assert (site["images_per_s"], site["since_last_work_s"], site["left_s"]) == (None, None, None)
    assert screen.count("withheld") == 1
    assert "0.0" not in screen


@pytest.mark.parametrize(
    ("age_s", "text"),
    [
        (None, "never"),
        (0, "0 s ago"),
        (119, "119 s ago"),
        (120, "2 min ago"),
        (7200, "2 h ago"),
        (9e5, "10 days ago"),
    ],
)
def test_the_last_contact_is_shown_by_its_age(coordinator: Any, age_s: float | None, text: str) -> None:
    coordinator.join("a")
    coordinator.campaign("a")
    if age_s is not None:
        coordinator.store.record_contact("a", coordinator.clock())
        coordinator.clock.pass_by(age_s)
    assert text in shown(coordinator)[1]
