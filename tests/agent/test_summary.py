"""What a run reports, and how it ends."""

from __future__ import annotations

import pytest

from medveil.agent.ledger import Totals
from medveil.agent.summary import EXIT_MEANING, exit_code, proxy_statement, segmentation_statement
from medveil.models.bundle import ProxyCheck, ProxyVictim, Scores, SegmentationCheck
from medveil.models.bundle.manifest import SegmentationVictim
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


def test_what_victims_of_masks_found_is_quoted_beside_what_takes_no_image():
    victim = SegmentationVictim(
        architecture="unet-in",
        seed=1,
        clean_dice=0.66,
        clean_iou=0.5,
        protected_dice=0.58,
        protected_iou=0.4,
        protected_peak_dice=0.6,
    )
    earlier = SegmentationCheck(
        images=40,
        epsilon_255=4.0,
        psnr_db=46.5,
        roi_psnr_db=39.0,
        attempts=1,
        effective=False,
        victims=(victim,),
    )
    quoted = segmentation_statement(earlier)
    assert "unet-in 0.66 -> 0.58 (best epoch 0.60)" in quoted
    assert "constant mask" not in quoted
    recovered = victim.model_copy(update={"recoverable_dice": 0.62})
    told = segmentation_statement(earlier.model_copy(update={"victims": (recovered,)}))
    assert "(best epoch 0.60, 0.62 with the best thresholds)" in told
    seeds = [
        victim.model_copy(update={"seed": n, "recoverable_dice": d}) for n, d in enumerate((0.1, 0.62, 0.2))
    ]
    told = segmentation_statement(earlier.model_copy(update={"victims": tuple(seeds)}))
    assert "0.20 with the best thresholds, median of 3 seeds; 0.62 in the one that found most)" in told
    reading = victim.model_copy(update={"release_dice": 0.18})
    told = segmentation_statement(earlier.model_copy(update={"victims": (reading,)}))
    assert told.endswith("Models trained on clean images find 0.18 in protected ones.")
    told = segmentation_statement(earlier.model_copy(update={"constant_mask_dice": 0.57}))
    assert told.startswith(quoted)
    assert "A constant mask, the same for every image, finds 0.57" in told
