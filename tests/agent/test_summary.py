"""What a run reports, and how it ends."""

from __future__ import annotations

import pytest

from medveil.agent.ledger import Totals
from medveil.agent.summary import EXIT_MEANING, exit_code, proxy_statement
from medveil.models.bundle import ProxyCheck, ProxyVictim, Scores
from medveil.models.errors import ExitCode


def totals(verified: int, not_protectable: int, quarantined: int) -> Totals:
    images = verified + not_protectable + quarantined
    return Totals(images, verified, not_protectable, {"truncated": quarantined}, 0, None, None, None, None)


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ((3, 0, 0), ExitCode.OK),
        ((3, 1, 0), ExitCode.PARTIAL),
        ((3, 0, 1), ExitCode.PARTIAL),
        ((0, 1, 0), ExitCode.PARTIAL),
        ((0, 1, 5), ExitCode.PARTIAL),
        ((0, 0, 5), ExitCode.INPUT),
    ],
)
def test_only_all_verified_is_success(counts, code):
    assert exit_code(totals(*counts)) is code
    assert EXIT_MEANING[code]


def test_the_coordinators_measurement_is_quoted_as_made_on_public_images():
    clean = Scores(accuracy=0.9, balanced_accuracy=0.89, auc=0.97)
    broken = Scores(accuracy=0.5, balanced_accuracy=0.51, auc=0.3)
    victim = ProxyVictim(
        architecture="small-cnn",
        seed=1,
        clean=clean,
        protected=broken,
        protected_peak_auc=0.6,
        recoverable_auc=0.7,
        recoverable_accuracy=0.66,
    )
    check = ProxyCheck(
        images=100,
        epsilon_255=8.0,
        mask_ratio=0.3,
        psnr_db=35.4,
        attempts=1,
        effective=True,
        victims=(victim,),
    )
    sentence = proxy_statement(check)
    assert "on public images" in sentence
    assert "small-cnn 0.89 -> 0.51 (recoverable AUC 0.70)" in sentence
    assert "measured nothing" in proxy_statement(None)


def test_several_seeds_of_one_design_are_one_figure_their_median():
    scores = [Scores(accuracy=a, balanced_accuracy=a, auc=a) for a in (0.9, 0.5, 0.6, 0.8)]
    victims = tuple(
        ProxyVictim(
            architecture=name,
            seed=seed,
            clean=scores[0],
            protected=scores[1 + seed],
            protected_peak_auc=0.9,
            recoverable_auc=0.5 + 0.1 * seed,
            recoverable_accuracy=0.6,
        )
        for name in ("one", "two")
        for seed in range(3)
    )
    check = ProxyCheck(
        images=100,
        epsilon_255=8.0,
        mask_ratio=0.3,
        psnr_db=35.4,
        attempts=1,
        effective=True,
        victims=victims,
    )
    sentence = proxy_statement(check)
    assert sentence.count("->") == 3  # once in the explanation, once per design
    assert "two 0.90 -> 0.60 (recoverable AUC 0.60, median of 3 seeds)" in sentence
