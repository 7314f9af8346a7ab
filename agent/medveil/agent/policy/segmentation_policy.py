"""What the site says about segmentations: its own names for structures, and what to do with unproven noise.

[segmentation]
unproven = "mark"                          # or "refuse": noise that hindered no victim of the coordinator is not used
aliases = { "GTV" = "tumour", "BODY" = "background", "2" = "liver" }   # this site's names and values -> the bundle's
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["SegmentationPolicy"]


class SegmentationPolicy(BaseModel):
    """Frozen, unknown keys refused.

    Attributes:
        unproven: what happens with a bundle whose own victims still learned to segment from protected images, or that
            was never tried on any: ``mark`` perturbs and says so in the status, ``refuse`` doesn't begin, and the
            site's own check ends with exit code 5 where its victims were not held off. Easy tasks aren't protected by
            any published noise, so this is no rare case.
        aliases: name of a structure, segment, folder or stored value at this site -> class name of the bundle;
            "background" (or what the bundle calls its first class) for what is not of interest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unproven: Literal["mark", "refuse"] = "mark"
    aliases: dict[str, str] = Field(default_factory=dict)
