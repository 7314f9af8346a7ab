"""What the steward lets leave the site: the table ``[egress]`` of the policy file. Without it, nothing leaves.

[egress]
minimum_group_size = 10                    # images; a figure over fewer is withheld
withhold = ["by_class"]                    # figures that never leave: psnr, by_class, changed_share, reasons

[egress.noise]                             # what leaves is blurred; without this table it is exact
epsilon_per_report = 0.5                   # privacy loss of one report
epsilon_total = 2.0                        # of all reports together; then no figure leaves any more
images_per_patient = 1                     # images that one patient has at most: whom the epsilon holds for
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["NoisePolicy", "OptionalFigure", "ReportingPolicy"]

OptionalFigure = Literal["psnr", "by_class", "changed_share", "reasons", "victim_check"]

_LARGEST_EPSILON: Final = Decimal(10)
"""Of one report; our choice: at 10, one patient can make what is told 22,000 times as likely, which hides nobody."""

_Epsilon = Annotated[Decimal, Field(gt=0, decimal_places=3)]
"""Decimal, because what is spent is added up and compared: ten times 0.1 is 1."""


class NoisePolicy(BaseModel):
    """How much may be learned of one patient from all reports together; frozen, unknown keys refused.

    Over all campaigns, not over each: they count the same images, and how many campaigns there are is the
    coordinator's choice.

    Attributes:
        epsilon_per_report: privacy loss of one report (differential privacy); smaller blurs more. Nothing to do with
            the epsilon of a perturbation.
        epsilon_total: of all reports that this site ever makes; raised by the steward or not at all.
        images_per_patient: images that one patient has at most among those of a campaign. The noise grows with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon_per_report: Annotated[_Epsilon, Field(le=_LARGEST_EPSILON)]
    epsilon_total: _Epsilon
    images_per_patient: Annotated[int, Field(ge=1, le=1_000_000)] = 1

    @model_validator(mode="after")
    def _enough_for_one(self) -> Self:
        if self.epsilon_total < self.epsilon_per_report:
            raise ValueError("epsilon_total is less than one report takes")
        return self

    def affords(self, spent: Decimal) -> bool:
        """Return whether one more report may have figures."""
        return spent + self.epsilon_per_report <= self.epsilon_total

    def scale(self, counted: int) -> Fraction:
        """Return the scale of the noise in images, for a report in which an image adds to so many counts at most."""
        return counted * self.images_per_patient / Fraction(self.epsilon_per_report)


class ReportingPolicy(BaseModel):
    """The steward's word on figures; frozen, unknown keys refused, the threshold has no default.

    Attributes:
        minimum_group_size: fewest images that may stand behind a figure. The coordinator can ask for more
            and cannot lower it.
        withhold: figures that do not leave at all.
        noise: what is added to the others; None: nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum_group_size: Annotated[int, Field(ge=1, le=1_000_000)]
    withhold: tuple[OptionalFigure, ...] = ()
    noise: NoisePolicy | None = None

    def raised_to(self, minimum_group_size: int) -> ReportingPolicy:
        """Return the policy with the larger of the two thresholds."""
        larger = max(self.minimum_group_size, minimum_group_size)
        return self.model_copy(update={"minimum_group_size": larger})
