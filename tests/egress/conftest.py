"""What no byte that leaves a site may hold, in every form in which it might travel."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

import pytest

SHORTEST = 6
"""Bytes below which a form turns up by chance."""


@dataclass(frozen=True)
class Canaries:
    """A patient's name, a UID and a pattern of pixels."""

    name: str = "Mustermann^Erika"
    uid: str = "1.2.840.113619.2.55.3.604688"
    pixels: bytes = b"\xde\x0d\xbe\x0f\xca\x0e\xba\x0b"
    """Four pixels of 12 bits, as they are stored in 16."""

    def forms(self, *more: str | bytes) -> list[bytes]:
        """Return every canary, and whatever else shall not leave, in the usual encodings."""
        found: list[bytes] = []
        for thing in (self.name, self.name.split("^")[0], self.uid, self.pixels, *more):
            found += _forms(thing.encode() if isinstance(thing, str) else thing)
            if isinstance(thing, str):
                found += [
                    thing.encode("utf-16-le"),
                    thing.encode("utf-16-be"),
                    quote(thing, safe="").encode(),
                ]
        return [form for form in found if len(form) >= SHORTEST]


def _forms(raw: bytes) -> Iterator[bytes]:
    yield raw
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    for shift in range(3):
        # At each of the three alignments, without the ends that depend on the neighbours.
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(b"\0" * shift + raw)[4:-4]


@pytest.fixture(scope="session")
def canaries() -> Canaries:
    return Canaries()
