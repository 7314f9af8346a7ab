"""New UIDs for derived objects: the same image under the same rules always gets the same one.

A retry must not create a second object, so the UID is computed, not drawn. It is keyed, so that nobody
outside the site can link a release to its source by trying UIDs. And the digest of the policy goes in: a PACS
keeps the first copy it sees of a UID, so a second run with another budget would otherwise be dropped without
a word.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import Final

__all__ = ["DerivedUids"]

UUID_ROOT: Final = "2.25"
"""Root for UIDs made from a 128-bit UUID (PS3.5 B.2): 5 + at most 39 digits, below the limit of 64."""

_VERSION_8: Final = 0x8 << 76  # RFC 9562 5.8: UUID whose bits are the maker's own
_VARIANT: Final = 0x2 << 62  # RFC 9562 4.1
_MASK: Final = (1 << 128) - 1 - (0xF << 76) - (0x3 << 62)


@dataclass(frozen=True, slots=True)
class DerivedUids:
    """Maps source UIDs to those of the release.

    Attributes:
        site_key: secret of the site, at least 16 bytes; never printed.
        campaign: which release this is.
        policy_digest: digest over everything that changes the output (bundle, budget, windows, method).
    """

    site_key: bytes = field(repr=False)
    campaign: str
    policy_digest: str

    def __post_init__(self) -> None:
        if len(self.site_key) < 16:
            raise ValueError("the site key needs at least 16 bytes")

    def instance(self, source: str) -> str:
        """Return the SOP Instance UID that replaces ``source``."""
        return self._derive("instance", source)

    def series(self, source: str) -> str:
        """Return the Series Instance UID that replaces ``source``."""
        return self._derive("series", source)

    def _derive(self, kind: str, source: str) -> str:
        parts = (self.campaign, self.policy_digest, kind, source)
        # Each part carries its length: ("ab", "c") and ("a", "bc") must not meet.
        message = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)
        digest = hmac.new(self.site_key, message, hashlib.sha256).digest()
        number = int.from_bytes(digest[:16], "big") & _MASK | _VERSION_8 | _VARIANT
        return f"{UUID_ROOT}.{number}"
