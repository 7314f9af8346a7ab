"""How well a classifier trained on a release does on clean images, in the best case for the attacker.

Accuracy alone flatters a protection. Noise with a target *permutes* what the victim learns: an AUC of 0.18
is 0.82 to whoever flips the answer. So every figure comes in three forms: as predicted, under the best
relabelling of the outputs, and after a small head was refitted on a few clean labelled images. The largest
is what counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment, minimize
from scipy.special import log_softmax, softmax
from scipy.stats import rankdata

__all__ = [
    "CALIBRATION_IMAGES",
    "Scores",
    "auc",
    "auc_matrix",
    "balanced_accuracy",
    "calibrated_scores",
    "evaluate",
    "recoverable_accuracy",
    "recoverable_auc",
]

Logits = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]

CALIBRATION_IMAGES = 50
"""Clean labelled images that an attacker is assumed to have (DESIGN 4, rule 2)."""
CALIBRATION_DRAWS = 10
"""Random draws of those images that are averaged: one draw of 50 moves the figure by several points."""
CALIBRATION_PENALTY = 1e-2
"""L2 penalty of the refitted head, per image: keeps 50 separable images from giving infinite weights."""


@dataclass(frozen=True)
class Scores:
    """What one classifier reaches on clean images; all in [0, 1], higher is better for the attacker.

    Attributes:
        accuracy: share of correct answers, as predicted.
        balanced_accuracy: mean over the classes of the share of that class answered correctly.
        auc: area under the ROC curve, one class against the rest, mean over the classes.
        recoverable_accuracy: balanced accuracy in the best case: over all relabellings of the outputs, and
            after calibration on ``CALIBRATION_IMAGES`` clean labelled images.
        recoverable_auc: AUC in the best case, likewise. For two classes at least 0.5 by construction.
    """

    accuracy: float
    balanced_accuracy: float
    auc: float
    recoverable_accuracy: float
    recoverable_auc: float

    def as_dict(self) -> dict[str, float]:
        """Return the scores by name."""
        return asdict(self)


def auc(score: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve of ``score`` ``(N,)``, given who is ``positive`` ``(N,)``.

    Ties count one half (Mann-Whitney U). NaN when one of the two groups is empty.
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    ranks = rankdata(score)
    u = ranks[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(u / (n_positive * n_negative))


def auc_matrix(logits: Logits, labels: Labels) -> npt.NDArray[np.float64]:
    """Return ``(K, K)``: entry ``[output, class]`` is the AUC of that output's probability for that class.

    The diagonal is the ordinary one-against-rest AUC; the other entries say what relabelling would recover.
    """
    probabilities = softmax(logits.astype(np.float64), axis=1)
    classes = probabilities.shape[1]
    return np.array([[auc(probabilities[:, j], labels == k) for k in range(classes)] for j in range(classes)])


def balanced_accuracy(predicted: Labels, labels: Labels) -> float:
    """Return the mean, over the classes present in ``labels``, of the share answered correctly."""
    present = np.unique(labels)
    return float(np.mean([(predicted[labels == k] == k).mean() for k in present]))


def recoverable_auc(logits: Logits, labels: Labels) -> float:
    """Return the mean one-against-rest AUC under the best one-to-one relabelling of the outputs."""
    matrix = np.nan_to_num(auc_matrix(logits, labels), nan=0.5)
    outputs, classes = linear_sum_assignment(matrix, maximize=True)
    return float(matrix[outputs, classes].mean())


def recoverable_accuracy(logits: Logits, labels: Labels) -> float:
    """Return the balanced accuracy under the best one-to-one relabelling of the outputs."""
    classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    share = np.array(
        [
            [np.mean(predicted[labels == k] == j) if (labels == k).any() else 0.0 for k in range(classes)]
            for j in range(classes)
        ]
    )
    outputs, matched = linear_sum_assignment(share, maximize=True)
    present = len(np.unique(labels))
    return float(share[outputs, matched].sum() / present)


def calibrated_scores(
    logits: Logits, labels: Labels, rng: np.random.Generator, *, images: int = CALIBRATION_IMAGES
) -> tuple[float, float]:
    """Return balanced accuracy and AUC after a linear head was refitted on a few clean images.

    A multinomial logistic regression on the victim's own logits (vector scaling with a full matrix, Guo et
    al. 2017, arXiv 1706.04599) is fitted on ``images`` images drawn evenly over the classes and scored on all
    the others; mean over ``CALIBRATION_DRAWS`` draws. It covers thresholds, flips and any linear mixing of
    the outputs.

    Args:
        logits: ``(N, K)`` of the victim on clean images.
        labels: ``(N,)``.
        rng: chooses the calibration images.
        images: how many of them; at most half of the set is used.
    """
    z = logits.astype(np.float64)
    z = (z - z.mean(axis=0)) / (z.std(axis=0) + 1e-12)
    classes = z.shape[1]
    per_class = max(1, min(images, len(labels) // 2) // classes)
    accuracies, aucs = [], []
    for _ in range(CALIBRATION_DRAWS):
        chosen = np.concatenate(
            [
                rng.permutation(np.flatnonzero(labels == k))[
                    : min(per_class, max(1, int((labels == k).sum()) // 2))
                ]
                for k in np.unique(labels)
            ]
        )
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        refitted = z[rest] @ (head := _fit_head(z[chosen], labels[chosen], classes))[:-1] + head[-1]
        accuracies.append(balanced_accuracy(refitted.argmax(axis=1), labels[rest]))
        aucs.append(float(np.nanmean(np.diag(auc_matrix(refitted, labels[rest])))))
    return float(np.mean(accuracies)), float(np.mean(aucs))


def evaluate(logits: Logits, labels: Labels, rng: np.random.Generator) -> Scores:
    """Return all scores of one classifier.

    Args:
        logits: ``(N, K)``, finite.
        labels: ``(N,)``, class index; every class should occur.
        rng: chooses the calibration images.

    Raises:
        ValueError: the logits are not finite, or the lengths differ.
    """
    if len(logits) != len(labels) or not np.isfinite(logits).all():
        raise ValueError("need one row of finite logits per label")
    calibrated_accuracy, calibrated_auc = calibrated_scores(logits, labels, rng)
    predicted = logits.argmax(axis=1)
    return Scores(
        accuracy=float((predicted == labels).mean()),
        balanced_accuracy=balanced_accuracy(predicted, labels),
        auc=float(np.nanmean(np.diag(auc_matrix(logits, labels)))),
        recoverable_accuracy=max(recoverable_accuracy(logits, labels), calibrated_accuracy),
        recoverable_auc=max(recoverable_auc(logits, labels), calibrated_auc),
    )


def _fit_head(z: npt.NDArray[np.float64], labels: Labels, classes: int) -> npt.NDArray[np.float64]:
    """Return ``(K + 1, K)``: weights and, last, bias of a penalised multinomial logistic regression."""
    inputs = np.hstack([z, np.ones((len(z), 1))])
    onehot = np.eye(classes)[labels]

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weights = flat.reshape(-1, classes)
        scores = inputs @ weights
        value = -(onehot * log_softmax(scores, axis=1)).sum() / len(z)
        gradient = inputs.T @ (softmax(scores, axis=1) - onehot) / len(z)
        return (
            value + CALIBRATION_PENALTY * float((weights[:-1] ** 2).sum()),
            (gradient + 2 * CALIBRATION_PENALTY * np.vstack([weights[:-1], np.zeros((1, classes))])).ravel(),
        )

    fitted = minimize(loss, np.zeros(inputs.shape[1] * classes), jac=True, method="L-BFGS-B")
    return np.asarray(fitted.x, np.float64).reshape(-1, classes)
