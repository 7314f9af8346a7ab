from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medveil.coordinator.campaign import SiteFigures, Total, aggregate
from medveil.models.errors import InputError

COUNT = st.one_of(st.none(), st.integers(0, 10_000))
FIGURES = st.builds(
    SiteFigures,
    site=st.sampled_from("abcdef"),
    sequence=st.just(1),
    counts=st.fixed_dictionaries({"verified": COUNT, "quarantined": COUNT}),
    rates=st.fixed_dictionaries({"changed": st.one_of(st.none(), st.floats(0, 1))}),
    weight=COUNT,
    histograms=st.fixed_dictionaries({"psnr": st.tuples(COUNT, COUNT, COUNT)}),
)
REPORTS = st.lists(FIGURES, max_size=6, unique_by=lambda report: report.site)


@given(REPORTS, st.integers())
def test_the_order_of_sites_and_repetition_do_not_matter(reports: list[SiteFigures], seed: int) -> None:
    shuffled = reports * 2
    random.Random(seed).shuffle(shuffled)
    assert aggregate(shuffled) == aggregate(reports)


@given(REPORTS)
def test_a_withheld_count_is_counted_as_withheld_and_never_as_zero(reports: list[SiteFigures]) -> None:
    for name, total in aggregate(reports).counts.items():
        stated = [r.counts[name] for r in reports]
        assert total == Total(sum(c for c in stated if c is not None), stated.count(None))


@given(FIGURES, st.integers(0, 100))
def test_a_newer_report_replaces_the_older_one(report: SiteFigures, count: int) -> None:
    newer = replace(report, sequence=2, counts={"verified": count})
    assert aggregate([newer, report]) == aggregate([newer])


def test_two_contents_under_one_number_are_refused() -> None:
    report = SiteFigures("a", 1, {"verified": 10}, {}, 10, {})
    with pytest.raises(InputError) as refused:
        aggregate([report, replace(report, counts={"verified": 11})])
    assert refused.value.code == "report-conflict"


def test_a_rate_is_weighted_by_images_and_absent_without_a_stated_one() -> None:
    small = SiteFigures("a", 1, {}, {"changed": 0.1}, 10, {})
    large = SiteFigures("b", 1, {}, {"changed": 0.4}, 20, {})
    silent = SiteFigures("c", 1, {}, {"changed": None}, 500, {})
    assert aggregate([small, large, silent]).rates["changed"] == pytest.approx(0.3)
    assert aggregate([silent]).rates["changed"] is None


def test_histograms_with_different_bins_are_refused() -> None:
    with pytest.raises(InputError, match="different bins"):
        aggregate(
            [SiteFigures("a", 1, {}, {}, 1, {"h": (1,)}), SiteFigures("b", 1, {}, {}, 1, {"h": (1, 2)})]
        )
