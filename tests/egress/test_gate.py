from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medveil.agent.egress import report
from medveil.agent.policy import load_policy
from medveil.agent.reporting import beat
from medveil.agent.reporting_figures import Figures
from medveil.agent.reporting_gate import Withheld, coarsened, gated_parts, gated_total
from medveil.agent.reporting_policy import ReportingPolicy
from medveil.coordinator.reports import parse_report
from medveil.models.errors import ConfigurationError
from medveil.protos.v1 import figures_pb2, status_pb2
from medveil.protos.v1.conventions import PSNR_EDGES_DB

PARTS = st.lists(st.integers(0, 60), min_size=1, max_size=8)
LEAST = st.integers(1, 30)
BINS = len(PSNR_EDGES_DB) + 1


@given(PARTS, LEAST)
def test_no_small_count_is_told_and_none_follows_by_subtraction(parts: list[int], least: int) -> None:
    total = gated_total(sum(parts), least)
    told = gated_parts(total, parts, least)
    hidden = [count for count, figure in zip(parts, told, strict=True) if isinstance(figure, Withheld)]
    assert all(isinstance(f, Withheld) or f == n for f, n in zip(told, parts, strict=True))
    assert not any(isinstance(figure, int) and 0 < figure < least for figure in told)
    if hidden and isinstance(total, int):
        assert len(hidden) >= 2
        assert sum(hidden) >= least


@given(PARTS, LEAST)
def test_nothing_is_withheld_without_need(parts: list[int], least: int) -> None:
    if not any(0 < count < least for count in parts):
        assert gated_parts(sum(parts), parts, least) == parts


@given(st.integers(0, 1000), LEAST)
def test_two_beats_cannot_be_subtracted_down_to_one_image(count: int, least: int) -> None:
    told = [coarsened(n, least) for n in (count, count + 1)]
    numbers = [figure for figure in told if isinstance(figure, int)]
    assert all(number % least == 0 for number in numbers)


@st.composite
def job_figures(draw: st.DrawFn) -> Figures:
    bins = draw(st.lists(st.integers(0, 30), min_size=BINS, max_size=BINS))
    blank = draw(st.integers(0, 20))
    verified = sum(bins) + blank
    first = draw(st.integers(0, verified))
    return Figures(
        verified=verified,
        not_protectable=draw(st.integers(0, 30)),
        unfinished=draw(st.integers(0, 30)),
        by_reason={1: draw(st.integers(0, 30)), 3: draw(st.integers(0, 30))},
        by_class={0: first, 1: verified - first},
        psnr_bins=tuple(bins),
        changed_share_mean=0.25,
    )


@given(job_figures(), LEAST)
def test_the_coordinator_accepts_every_report_that_the_door_builds(figures: Figures, least: int) -> None:
    policy = ReportingPolicy(minimum_group_size=least)
    message = report(figures, policy, campaign=1, offer_revision=1, sequence=1)
    payload = message.SerializeToString(deterministic=True)
    assert parse_report(payload, minimum_group_size=least) == message


@given(job_figures(), st.integers(2, 30))
def test_images_without_a_psnr_cannot_be_counted_by_subtraction(figures: Figures, least: int) -> None:
    message = report(
        figures, ReportingPolicy(minimum_group_size=least), campaign=1, offer_revision=1, sequence=1
    )
    told = [message.outcome.verified, *message.psnr.bins]
    if all(count.WhichOneof("value") == "exact" for count in told):
        rest = told[0].exact - sum(count.exact for count in told[1:])
        assert rest == 0 or rest >= least


def test_one_blank_frame_is_hidden_behind_a_bin() -> None:
    figures = Figures(101, 0, 0, psnr_bins=(40,) + (0,) * (BINS - 2) + (60,))
    message = report(figures, ReportingPolicy(minimum_group_size=5), campaign=1, offer_revision=1, sequence=1)
    assert message.psnr.bins[0].suppressed == figures_pb2.SUPPRESSION_COMPLEMENTARY
    assert message.psnr.bins[-1].exact == 60


@given(job_figures(), st.integers(2, 30))
def test_the_parts_of_a_withheld_figure_are_withheld_too(figures: Figures, least: int) -> None:
    message = report(
        figures, ReportingPolicy(minimum_group_size=least), campaign=1, offer_revision=1, sequence=1
    )
    if message.outcome.verified.WhichOneof("value") == "suppressed":
        told = [entry.verified for entry in message.verified_by_class] + list(message.psnr.bins)
        assert all(count.WhichOneof("value") == "suppressed" for count in told)
        assert message.changed_share_mean.WhichOneof("value") == "suppressed"


def test_without_a_policy_nothing_is_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        report(Figures(100, 0, 0), None, campaign=1, offer_revision=1, sequence=1)
    assert refused.value.code == "no-egress-policy"
    with pytest.raises(ConfigurationError):
        beat(None, activity=status_pb2.ACTIVITY_IDLE)
    assert load_policy(None).egress is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("maximum_epsilon = 8.0", "no-egress-policy"),
        ("[egress]", "policy"),  # the threshold has no default
        ("[egress]\nminimum_group_size = 0", "policy"),
        ("[egress]\nminimum_group_size = 10\nminimum_grop_size = 1", "policy"),
        ("[egress]\nminimum_group_size = 10\nwithhold = ['everything']", "policy"),
        ("[egress", "policy-unreadable"),
    ],
)
def test_an_unclear_policy_is_no_policy(tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        report(Figures(100, 0, 0), load_policy(path).egress, campaign=1, offer_revision=1, sequence=1)
    assert refused.value.code == code


def test_the_coordinator_can_raise_the_threshold_and_never_lower_it(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("[egress]\nminimum_group_size = 10\nwithhold = ['psnr']")
    policy = load_policy(path).egress
    assert policy is not None
    assert policy.raised_to(20).minimum_group_size == 20
    assert policy.raised_to(1).minimum_group_size == 10


@pytest.mark.parametrize(
    ("figure", "field"),
    [("psnr", "psnr"), ("by_class", "verified_by_class"), ("reasons", "quarantined_by_reason")],
)
def test_what_the_steward_withholds_is_not_in_the_message(figure: str, field: str) -> None:
    figures = Figures(100, 0, 0, {1: 20}, {0: 100}, (0,) * (BINS - 1) + (100,), 0.2)
    told = report(figures, ReportingPolicy(minimum_group_size=5), campaign=1, offer_revision=1, sequence=1)
    policy = ReportingPolicy.model_validate({"minimum_group_size": 5, "withhold": (figure,)})
    silent = report(figures, policy, campaign=1, offer_revision=1, sequence=1)
    listed = {descriptor.name for descriptor, _ in told.ListFields()}
    assert listed - {descriptor.name for descriptor, _ in silent.ListFields()} == {field}
