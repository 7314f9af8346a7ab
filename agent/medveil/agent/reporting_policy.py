"""What the steward lets leave the site: the table ``[egress]`` of the policy file. Without it, nothing leaves.

[egress]
minimum_group_size = 10                    # images; a figure over fewer is withheld
withhold = ["by_class"]                    # figures that never leave: psnr, by_class, changed_share, reasons
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medveil.models.errors import ConfigurationError

__all__ = ["OptionalFigure", "ReportingPolicy", "load_reporting_policy"]

OptionalFigure = Literal["psnr", "by_class", "changed_share", "reasons", "victim_check"]


class ReportingPolicy(BaseModel):
    """The steward's word on figures; frozen, unknown keys refused, the threshold has no default.

    Attributes:
        minimum_group_size: fewest images that may stand behind a figure. The coordinator can ask for more
            and cannot lower it.
        withhold: figures that do not leave at all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    minimum_group_size: Annotated[int, Field(ge=1, le=1_000_000)]
    withhold: tuple[OptionalFigure, ...] = ()

    def raised_to(self, minimum_group_size: int) -> ReportingPolicy:
        """Return the policy with the larger of the two thresholds."""
        larger = max(self.minimum_group_size, minimum_group_size)
        return self.model_copy(update={"minimum_group_size": larger})


def load_reporting_policy(path: Path | None) -> ReportingPolicy:
    """Read the table ``[egress]`` of a policy file.

    Raises:
        ConfigurationError: ``no-egress-policy``: there is no file or no such table, so nothing may leave;
            ``policy-unreadable`` or ``policy``: it is refused as a whole.
    """
    try:
        settings = {} if path is None else tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigurationError(
            "policy-unreadable", "The policy file cannot be read as TOML; correct it.", private=str(exc)
        ) from exc
    if "egress" not in settings:
        raise ConfigurationError(
            "no-egress-policy",
            "Nothing leaves this site until its policy says what may: add a table [egress] with "
            "minimum_group_size.",
        )
    try:
        return ReportingPolicy.model_validate(settings["egress"])
    except ValidationError as exc:
        faults = "; ".join(f"egress.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
        raise ConfigurationError("policy", f"The policy file is not valid ({faults}); correct it.") from exc
