"""What the reports of many sites add up to. Withheld figures stay visible as such and never become zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from medveil.models.errors import InputError

__all__ = ["Aggregate", "Noised", "SiteFigures", "Total", "aggregate"]

_LAPLACE_95: Final = math.log(20) / math.sqrt(2)
"""Half the 95 % interval of a Laplace distribution, in standard deviations; sums of several draws need less."""


@dataclass(frozen=True, slots=True)
class Noised:
    """A count to which its site has added noise.

    Attributes:
        value: count plus noise, in images; may be negative.
        variance: of the noise, in images squared.
    """

    value: int
    variance: float


@dataclass(frozen=True, slots=True)
class SiteFigures:
    """One report as numbers; None where the site withholds one.

    Attributes:
        site: who sent it, from its certificate.
        sequence: the site's own number of the report; a higher one replaces a lower one.
        counts: images by name of the count.
        rates: means or shares by name, over the images that ``weight`` counts.
        weight: images behind the rates; None: withheld.
        histograms: images per bin by name of the histogram.
    """

    site: str
    sequence: int
    counts: Mapping[str, int | Noised | None]
    rates: Mapping[str, float | None]
    weight: int | None
    histograms: Mapping[str, tuple[int | Noised | None, ...]]


@dataclass(frozen=True, slots=True)
class Total:
    """A sum over sites.

    Attributes:
        known: sum over the sites that state the count: but for noise, a lower bound of the truth.
        withheld_by: number of sites that do not.
        variance: of the noise in `known`, in images squared; 0: there is none.
    """

    known: int
    withheld_by: int
    variance: float = 0.0

    @property
    def half_interval(self) -> int:
        """Half the 95 % interval of the noise in `known`, in images, rounded up; 0: `known` is exact."""
        return math.ceil(_LAPLACE_95 * math.sqrt(self.variance))


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The campaign's figures.

    Attributes:
        sites: sites with a report, by name.
        counts: sums by name.
        rates: mean weighted by images, by name, over the sites that state both; None without any.
        histograms: sums per bin, by name.
    """

    sites: tuple[str, ...]
    counts: Mapping[str, Total]
    rates: Mapping[str, float | None]
    histograms: Mapping[str, tuple[Total, ...]]


def aggregate(reports: Iterable[SiteFigures]) -> Aggregate:
    """Add up the newest report of every site; order and repetition do not matter.

    Raises:
        InputError: ``report-conflict``: one site sent two contents under one number; ``histogram-bins``:
            two sites have different bins.
    """
    newest = _newest(reports)
    chosen = [newest[site] for site in sorted(newest)]
    return Aggregate(
        sites=tuple(sorted(newest)),
        counts={name: _total(r.counts.get(name, 0) for r in chosen) for name in _names(chosen, "counts")},
        rates={name: _mean(name, chosen) for name in _names(chosen, "rates")},
        histograms={name: _bins(name, chosen) for name in _names(chosen, "histograms")},
    )


def _newest(reports: Iterable[SiteFigures]) -> dict[str, SiteFigures]:
    seen: dict[tuple[str, int], SiteFigures] = {}
    newest: dict[str, SiteFigures] = {}
    for report in reports:
        if seen.setdefault((report.site, report.sequence), report) != report:
            raise InputError("report-conflict", "A site sent two different reports under one number.")
        if report.site not in newest or newest[report.site].sequence < report.sequence:
            newest[report.site] = report
    return newest


def _names(reports: Iterable[SiteFigures], kind: str) -> list[str]:
    return sorted({name for report in reports for name in getattr(report, kind)})


def _total(values: Iterable[int | Noised | None]) -> Total:
    listed = list(values)
    noised = [value for value in listed if isinstance(value, Noised)]
    exact = [value for value in listed if isinstance(value, int)]
    return Total(
        sum(exact) + sum(value.value for value in noised),
        listed.count(None),
        math.fsum(value.variance for value in noised),
    )


def _mean(name: str, reports: Iterable[SiteFigures]) -> float | None:
    stated = [
        (rate, report.weight)
        for report in reports
        if (rate := report.rates.get(name)) is not None and report.weight
    ]
    weight = sum(images for _, images in stated)
    # fsum rounds once, so the order of the sites does not matter to the last bit
    return math.fsum(rate * images for rate, images in stated) / weight if weight else None


def _bins(name: str, reports: Iterable[SiteFigures]) -> tuple[Total, ...]:
    rows = [report.histograms[name] for report in reports if name in report.histograms]
    if len({len(row) for row in rows}) > 1:
        raise InputError("histogram-bins", "Two sites report different bins; one of them must be updated.")
    return tuple(_total(column) for column in zip(*rows, strict=True))
