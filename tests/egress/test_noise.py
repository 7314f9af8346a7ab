"""Counts with noise: how it is distributed, that it hides one patient, and that nothing exact stays beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chisquare

from medveil.agent.egress import report
from medveil.agent.policy import load_policy
from medveil.agent.reporting import beat
from medveil.agent.reporting_figures import CheckFigures, Figures
from medveil.agent.reporting_noise import discrete_laplace, secret_draw
from medveil.agent.reporting_policy import NoisePolicy, ReportingPolicy
from medveil.coordinator.campaign import Noised, aggregate
from medveil.coordinator.reports import figures as figures_told
from medveil.coordinator.reports import parse_report
from medveil.models.errors import ConfigurationError, InputError
from medveil.protos.v1 import figures_pb2, report_pb2, status_pb2
from medveil.protos.v1.conventions import PSNR_EDGES_DB

BINS = len(PSNR_EDGES_DB) + 1
CLASSES = 3
COUNTED = 3  # a verified image: in outcomes, classes and PSNR


def noise(**changes: Any) -> NoisePolicy:
    return NoisePolicy.model_validate({"epsilon_per_report": 0.5, "epsilon_total": 2, **changes})


def policy(least: int = 5, **changes: Any) -> ReportingPolicy:
    return ReportingPolicy(minimum_group_size=least, **{"noise": noise(), **changes})


def job(
    verified: tuple[int, int, int] = (50, 40, 30), bins: dict[int, int] | None = None, **changes: Any
) -> Figures:
    psnr = [(bins or {7: 60, 8: 60}).get(place, 0) for place in range(BINS)]
    values: dict[str, Any] = {
        "not_protectable": 20,
        "unfinished": 0,
        "by_reason": {1: 12, 3: 9},
        "changed_share_mean": 0.25,
        "victim_check": CheckFigures(100, 0.9, 0.5, 0.6, 0.05),
        **changes,
    }
    return Figures(
        verified=sum(verified),
        by_class={index: count for index, count in enumerate(verified) if count},
        classes=CLASSES,
        psnr_bins=tuple(psnr),
        **values,
    )


def told(figures: Figures, rules: ReportingPolicy, draw: Any) -> report_pb2.Report:
    return report(figures, rules, campaign=1, offer_revision=1, sequence=1, draw=draw)


def seeded(seed: int) -> Any:
    source = Random(seed)
    return lambda scale: discrete_laplace(scale, source)


# The draw
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [Fraction(1, 3), Fraction(1), Fraction(7, 3), Fraction(12)], ids=str)
def test_a_draw_is_as_likely_as_the_distribution_says(scale: Fraction) -> None:
    draws, source = 20_000, Random(20)
    counts = Counter(discrete_laplace(scale, source) for _ in range(draws))
    ratio = math.exp(-1 / scale)

    def expected(n: int) -> float:
        return draws * (1 - ratio) / (1 + ratio) * ratio ** abs(n)

    middle = [n for n in range(-200, 201) if expected(n) >= 20]
    seen = [counts[n] for n in middle]
    rest = draws - sum(seen), draws - sum(map(expected, middle))
    wanted = [*map(expected, middle), rest[1]]
    assert (
        chisquare([*seen, rest[0]], wanted).pvalue > 0.001
    )  # one seed, so it either holds for ever or never


def test_nobody_can_repeat_the_sites_own_draws() -> None:
    first, second = ([secret_draw(Fraction(1000)) for _ in range(20)] for _ in range(2))
    assert first != second


# What one patient can change
# ------------------------------------------------------------------------------------------------


def without_one(figures: Figures, place: str) -> Figures:
    """Return the figures without one image of one outcome."""
    less = {"verified": (49, 40, 30), "bins": {7: 59, 8: 60}} if place == "verified" else {}
    other = {"not_protectable": 19} if place == "not_protectable" else {}
    reasons = {"by_reason": {1: 11, 3: 9}} if place == "quarantined" else {}
    return job(**less, **other, **reasons)


def cells(message: report_pb2.Report) -> Iterator[int]:
    """Yield every count that has one draw of its own; all others are sums of these."""
    counts = [
        message.outcome.verified,
        message.outcome.not_protectable,
        message.outcome.quarantined,
        *(entry.images for entry in message.quarantined_by_reason),
        *(entry.verified for entry in message.verified_by_class),
        *message.psnr.bins,
    ]
    yield from (count.noised.images for count in counts if count.noised.draws == 1)


@pytest.mark.parametrize("place", ["verified", "not_protectable", "quarantined"])
@pytest.mark.parametrize("withhold", [(), ("reasons",), ("psnr",), ("psnr", "by_class")], ids=str)
def test_one_patient_changes_no_more_than_the_noise_covers(place: str, withhold: tuple[str, ...]) -> None:
    """The likelihood of what is told changes by at most exp(sum of changes / scale), which must be exp(epsilon)."""
    rules = policy(least=1, withhold=withhold, noise=noise(images_per_patient=1))
    before, after = (told(f, rules, lambda scale: 0) for f in (job(), without_one(job(), place)))
    change = sum(abs(a - b) for a, b in zip(cells(before), cells(after), strict=True))
    assert 0 < change / before.noise.scale <= 0.5
    assert before.noise == after.noise


def test_withholding_a_table_sharpens_the_others() -> None:
    choices = ((), ("reasons",), ("psnr",), ("by_class", "psnr"), ("reasons", "by_class", "psnr"))
    scales = [told(job(), policy(withhold=withhold), seeded(1)).noise.scale for withhold in choices]
    assert scales == [6, 6, 4, 4, 2]


def test_a_patient_with_several_images_is_covered_by_more_noise() -> None:
    scales = [told(job(), policy(noise=noise(images_per_patient=n)), seeded(1)).noise.scale for n in (1, 20)]
    assert scales == [pytest.approx(COUNTED / 0.5), pytest.approx(20 * COUNTED / 0.5)]


def test_which_figures_are_there_says_nothing_about_the_images() -> None:
    shapes = []
    for figures in (job(), job((0, 0, 1), {0: 1}, by_reason={}, not_protectable=0, victim_check=None)):
        message = told(figures, policy(), lambda scale: 10**6)
        text = "".join(letter for letter in str(message) if not letter.isdigit())
        shapes.append(text)
    assert shapes[0] == shapes[1]


def test_nothing_exact_stays_beside_the_noise() -> None:
    message = told(job(), policy(), seeded(3))
    assert message.outcome.unfinished.exact == 0  # the job is done, which is no figure of the images
    message.outcome.ClearField("unfinished")
    assert "exact" not in str(message)
    assert message.changed_share_mean.suppressed == figures_pb2.SUPPRESSION_NOISE
    assert not message.HasField("victim_check")


def test_how_many_images_are_unfinished_is_not_told() -> None:
    message = told(job(unfinished=17), policy(), seeded(3))
    assert message.outcome.unfinished.suppressed == figures_pb2.SUPPRESSION_NOISE


# What the coordinator makes of it
# ------------------------------------------------------------------------------------------------


@given(
    st.tuples(*[st.integers(0, 60)] * CLASSES), st.integers(0, 60), st.integers(1, 30), st.integers(0, 2**32)
)
def test_the_coordinator_accepts_every_report_with_noise_and_no_small_count_is_in_it(
    verified: tuple[int, int, int], reasons: int, least: int, seed: int
) -> None:
    figures = job(verified, {3: sum(verified)}, by_reason={2: reasons} if reasons else {})
    message = told(figures, policy(least), seeded(seed))
    payload = message.SerializeToString(deterministic=True)
    assert parse_report(payload, minimum_group_size=least) == message
    outcome = message.outcome
    every = [*outcome.ListFields(), *((None, entry.images) for entry in message.quarantined_by_reason)]
    assert not any(0 < count.noised.images < least for _, count in every)


def test_sums_over_many_reports_are_unbiased_and_their_interval_holds() -> None:
    """60 campaigns of four sites; at a minimum group size of 1 no count of 120 is ever withheld."""
    draw, rules, hits, errors = seeded(4), policy(least=1), 0, []
    for campaign in range(60):
        reports = [told(job(), rules, draw) for _ in range(4)]
        total = aggregate(figures_told(f"{campaign}-{n}", r) for n, r in enumerate(reports)).counts[
            "verified"
        ]
        hits += abs(total.known - 4 * 120) <= total.half_interval
        errors.append(total.known - 4 * 120)
        assert total.half_interval == math.ceil(math.log(20) / math.sqrt(2) * math.sqrt(total.variance))
    deviation = math.sqrt(total.variance / len(errors))
    assert abs(sum(errors) / len(errors)) < 3 * deviation
    assert 0.9 * len(errors) <= hits < len(errors)


def test_the_variance_is_that_of_the_noise() -> None:
    message = told(job(), policy(), seeded(5))
    counts = figures_told("a", message).counts
    verified, images = counts["verified"], counts["images"]
    assert isinstance(verified, Noised)
    assert isinstance(images, Noised)
    assert verified.variance == pytest.approx(2 * 6**2, rel=0.01)  # of a Laplace distribution of scale 6
    assert images.variance == pytest.approx(3 * verified.variance)  # the sum of three outcomes


def spoiled(message: report_pb2.Report, how: str) -> report_pb2.Report:
    outcome = message.outcome
    match how:
        case "an exact count beside noise":
            outcome.verified.exact = 50
        case "an exact rate beside noise":
            message.changed_share_mean.exact = 0.2
        case "noise without its scale":
            message.noise.scale = 0
        case "noise without an epsilon":
            message.noise.epsilon = math.nan
        case "a scale that breaks the arithmetic":
            message.noise.scale = 1e300
        case "noise that is not announced":
            message.ClearField("noise")
        case "a count without a draw":
            outcome.verified.noised.draws = 0
        case "unfinished images":
            outcome.unfinished.exact = 9
        case "figures after the budget":
            message.noise.epsilon = message.noise.scale = 0
        case "a small count":
            outcome.verified.noised.images = 3
    return message


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("an exact count beside noise", "noise"),
        ("an exact rate beside noise", "noise"),
        ("noise without its scale", "noise"),
        ("noise without an epsilon", "noise"),
        ("a scale that breaks the arithmetic", "noise"),
        ("noise that is not announced", "noise"),
        ("a count without a draw", "noise"),
        ("unfinished images", "noise"),
        ("figures after the budget", "noise"),
        ("a small count", "group-size"),
    ],
)
def test_the_coordinator_refuses_noise_that_is_not_what_it_says(how: str, code: str) -> None:
    message = spoiled(told(job(), policy(), seeded(6)), how)
    with pytest.raises(InputError) as refused:
        parse_report(message.SerializeToString(deterministic=True), minimum_group_size=5)
    assert refused.value.code == code


# When there is none, or none is left
# ------------------------------------------------------------------------------------------------

EXACT = (
    "08011001180120052a150a0308a101120208781a020814220208152a020800320608011202080c32060803120208093a"
    "04120208323a060801120208283a0608021202081e42500a0208000a0208000a0208000a0208000a0208000a0208000a"
    "0208000a02083c0a02083c0a0208000a0208000a0208000a0208000a0208000a0208000a0208000a0208000a0208000a"
    "0208000a020800520909000000000000d03f5a300a020864120909cdccccccccccec3f1a0909000000000000e03f2209"
    "09333333333333e33f2a09099a9999999999a93f"
)
"""A report over `job()` as it was before there was noise."""


def test_without_a_table_in_the_policy_reports_are_what_they_always_were() -> None:
    message = told(job(), ReportingPolicy(minimum_group_size=5), None)
    assert message.SerializeToString(deterministic=True).hex() == EXACT


def test_when_the_budget_is_used_up_not_one_number_leaves() -> None:
    message = told(job(), policy(), None)
    parse_report(message.SerializeToString(deterministic=True), minimum_group_size=5)
    withheld = {
        str(count).strip() for field, count in message.outcome.ListFields() if field.name != "unfinished"
    }
    assert withheld == {"suppressed: SUPPRESSION_BUDGET"}
    assert {field.name for field, _ in message.ListFields()} == {
        "campaign", "offer_revision", "sequence", "minimum_group_size", "outcome", "changed_share_mean", "noise",
    }  # fmt: skip
    assert told(job((1, 2, 3), {}, by_reason={}), policy(), None) == message


def test_a_beat_beside_noise_says_what_the_site_does_and_no_number_about_its_images() -> None:
    def at(images: int) -> status_pb2.Beat:
        return beat(
            policy(), activity=status_pb2.ACTIVITY_PROTECTING, campaign=1, images=2 * images, done=images,
            images_per_s=images / 10, since_last_work_s=images, certificate_days=80, egress_bytes=1000,
        )  # fmt: skip

    assert at(100) == at(7000)
    assert at(100).images.suppressed == figures_pb2.SUPPRESSION_NOISE


@pytest.mark.parametrize(
    "table",
    [
        {"epsilon_per_report": 0},
        {"epsilon_per_report": 11, "epsilon_total": 20},
        {"epsilon_per_report": 0.0001},
        {"epsilon_per_report": float("nan")},
        {"epsilon_per_report": 3},
        {"images_per_patient": 0},
        {"delta": 0.1},
    ],
    ids=str,
)
def test_noise_that_would_hide_nobody_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        noise(**table)


def test_ten_times_a_tenth_is_one() -> None:
    tenth = noise(epsilon_per_report=0.1, epsilon_total=1)
    assert tenth.affords(9 * tenth.epsilon_per_report)
    assert not tenth.affords(10 * tenth.epsilon_per_report)


def test_noise_and_surrogates_that_learn_from_every_image_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    tables = (
        "[egress]\nminimum_group_size = 5\n[egress.noise]\nepsilon_per_report = 0.5\nepsilon_total = 2.0\n"
    )
    path.write_text(tables)
    assert load_policy(path).egress == policy()
    path.write_text(f"local_adaptation = true\n{tables}")
    with pytest.raises(ConfigurationError, match="local_adaptation"):
        load_policy(path)
