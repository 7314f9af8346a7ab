"""What a pull from the PACS brought."""

from __future__ import annotations

from dataclasses import dataclass

from medveil.agent.imageio.pacs.inbox import Rejected
from medveil.models.errors import InputError

__all__ = ["Pulled", "require_listed"]


@dataclass(frozen=True, slots=True)
class Pulled:
    """The outcome of pulling one series.

    Attributes:
        expected: SOP Instance UIDs that the PACS lists.
        missing: those of them that did not arrive; asking again is safe.
        rejected: arrivals that could not be sorted, with their reasons.
    """

    expected: frozenset[str]
    missing: frozenset[str]
    rejected: tuple[Rejected, ...]


def require_listed(instances: frozenset[str]) -> frozenset[str]:
    """Return the instances of a series; a series without any is a mistake in the call, not a success.

    Raises:
        InputError: ``no-such-series``.
    """
    if not instances:
        raise InputError(
            "no-such-series", "The PACS lists no object of this series for us; check both identifiers."
        )
    return instances
