"""The tables of the policy file that only ``medveil-agent run`` reads: whose campaigns, over which images.

[coordinator]                              # whom this site joined
campaign = "coordinator.example:8451"      # answers, beats and reports
fleet = "coordinator.example:8453"         # offers and bundles

[campaigns]
source = "/data/chest"                     # labelled images; opened read-only
out = "/data/releases"                     # each campaign's release becomes a folder in it
approve = "ask"                            # the steward approves each campaign; "always": whatever this file allows
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

__all__ = ["CampaignPolicy", "CoordinatorAddresses"]

_LARGEST_PORT: Final = 65535


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= _LARGEST_PORT:
        raise ValueError("an address is HOST:PORT")
    return text


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("write the whole path, from the root of the disk: a service has no current folder")
    return path


_Address = Annotated[str, AfterValidator(_address)]
_Place = Annotated[Path, AfterValidator(_absolute)]


class CoordinatorAddresses(BaseModel):
    """Where the coordinator answers; frozen, unknown keys refused.

    Attributes:
        campaign: ``host:port`` of the campaign service (gRPC).
        fleet: ``host:port`` of the fleet edge (Flower).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    campaign: _Address
    fleet: _Address


class CampaignPolicy(BaseModel):
    """Over which images campaigns may run; frozen, unknown keys refused.

    Attributes:
        source: labelled images, in any form that `protect` takes.
        out: folder in which each campaign's release gets a folder of its own.
        approve: ``ask``: the steward answers each offer; ``always``: one that this policy allows is accepted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: _Place
    out: _Place
    approve: Literal["ask", "always"] = "ask"
