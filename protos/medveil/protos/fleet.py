"""What both sides of a campaign say to each other over Flower: names, numbers and two small messages.

    coordinator                                         site
    Order STATE   the offer, with the campaign's state  ->  recorded; waits for the steward, starts, pauses, ends
                  Ack: how much of the bundle it holds  <-
    Order BUNDLE  one part of the bundle, from there on ->  appended; the last part makes it whole: SHA-256,
                  Ack: how much it holds now            <-  signature, admission and self-test, then kept

An order states how things are, not what happened: the same one twice changes nothing, a lost one is sent again, and
a site that was away for days needs only the newest. A bundle travels once, in parts, and goes on where it broke off.
An acknowledgement is whole numbers and nothing else, so that a site's gate can let it out without trusting who made
it. Steward's answers, beats and reports don't travel here: they go through the site's one door (``v1`` services).

Flower is pinned: its transport, message kinds and error codes have changed with every minor version so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Final

from medveil.models.errors import InputError

__all__ = [
    "ACK_RECORD",
    "ACTION",
    "EDGE_PORT",
    "FAB_ID",
    "FAB_SHA256",
    "FAB_VERSION",
    "FLEET_CALLS",
    "FLEET_PREFIX",
    "FLWR_VERSION",
    "MESSAGE_TYPE",
    "NODE_KEY_HEADER",
    "ORDER_RECORD",
    "PART_ARRAY",
    "PART_BYTES",
    "PART_RECORD",
    "VERSION",
    "Ack",
    "Code",
    "Order",
    "Step",
    "ack_from",
    "order_from",
]

VERSION: Final = 1
"""Of the two messages below; a site that is sent another one answers `Code.MESSAGE`."""

FLWR_VERSION: Final = "1.41.0"

# The Flower App Bundle: settings only, no code. Whoever sends another one is not obeyed.
# ------------------------------------------------------------------------------------------------

FAB_ID: Final = "medveil/campaign"
FAB_VERSION: Final = "1.0.0"
FAB_SHA256: Final = "3f4d73cc5ab3970b49a9ea42c926d466d0e2471f119b72a334dac52c71dc51e8"
"""Of the bytes that ``flwr`` builds from the coordinator's ``campaign``; sites compare it before they run it."""

# The way to the coordinator: HTTP inside mutual TLS, this prefix and these calls, all POST
# ------------------------------------------------------------------------------------------------

EDGE_PORT: Final = 8453
"""Default; the campaign service has 8451, enrolment 8452."""

FLEET_PREFIX: Final = "/v1/fleet/"
FLEET_CALLS: Final = frozenset(
    {
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "register-node",
        "send-node-heartbeat",
        "unregister-node",
    }
)
"""Everything that a SuperNode of `FLWR_VERSION` asks for; nothing else under the prefix is let through either."""

NODE_KEY_HEADER: Final = "flwr-public-key"
"""Base64 of the node's public key, sent with every call; the edge binds it to the site of the client certificate."""

# Messages and their records
# ------------------------------------------------------------------------------------------------

ACTION: Final = "medveil"
MESSAGE_TYPE: Final = f"query.{ACTION}"
ORDER_RECORD: Final = "order"  # ConfigRecord
PART_RECORD: Final = "part"  # ArrayRecord, with BUNDLE only
PART_ARRAY: Final = "bytes"  # its only array, in NumPy's format: uint8, one axis
ACK_RECORD: Final = "ack"  # MetricRecord, the whole reply

PART_BYTES: Final = 16 * 1024 * 1024
"""Of a bundle, in one message; our choice: a line of 10 Mbit/s takes 13 s, and no more than that is ever repeated."""


class Step(StrEnum):
    """What an order is about."""

    STATE = "state"
    BUNDLE = "bundle"


class Code(IntEnum):
    """All that a site may answer; numbers are never reused."""

    DONE = 0
    MESSAGE = 1
    """Not a message of this version; one of the two sides must be updated."""
    CAMPAIGN = 2
    """Of this campaign or revision no offer has arrived; send STATE first."""
    OFFSET = 3
    """The part doesn't follow what is held; ``held_bytes`` says where to go on."""
    BUNDLE_DIGEST = 4
    """The whole isn't what the offer named; it was thrown away."""
    BUNDLE_SIGNATURE = 5
    """Not signed by someone whom the site trusts."""
    BUNDLE_REFUSED = 6
    """Its contents break an admission rule."""
    BUNDLE_SELF_TEST = 7
    """Its graphs don't compute here what the signer computed."""
    POLICY = 8
    """The site's policy doesn't allow this campaign."""
    STORAGE = 9
    """The site's disk is full or fails; try again later."""
    BUSY = 10
    """Another process holds the site's folder; try again later."""
    UNEXPECTED = 11
    """The site's own log says what."""


@dataclass(frozen=True, slots=True)
class Order:
    """Coordinator to site.

    Attributes:
        step: what it is about.
        campaign: the coordinator's number, from 1.
        revision: of the offer, from 1.
        bundle_sha256: 32 bytes.
        bundle_bytes: size of the whole bundle.
        offer: serialised ``medveil.v1.Offer`` with the campaign's present state; STATE only, else empty.
        offset: of the part in the bundle; BUNDLE only, else 0.
    """

    step: Step
    campaign: int
    revision: int
    bundle_sha256: bytes
    bundle_bytes: int
    offer: bytes = b""
    offset: int = 0

    def record(self) -> dict[str, int | str | bytes]:
        """Return the contents of the ConfigRecord."""
        return {
            "version": VERSION,
            "step": str(self.step),
            "campaign": self.campaign,
            "revision": self.revision,
            "bundle_sha256": self.bundle_sha256,
            "bundle_bytes": self.bundle_bytes,
            "offer": self.offer,
            "offset": self.offset,
        }


@dataclass(frozen=True, slots=True)
class Ack:
    """Site to coordinator.

    Attributes:
        campaign: as in the order; 0 if that couldn't be read.
        revision: as in the order; 0 if that couldn't be read.
        code: what became of the order.
        held_bytes: how much of the bundle the site holds, from its beginning; the whole size only once it is
            verified, admitted and self-tested. Sent with every code.
    """

    campaign: int
    revision: int
    code: Code
    held_bytes: int

    def record(self) -> dict[str, int]:
        """Return the contents of the MetricRecord."""
        return {
            "version": VERSION,
            "campaign": self.campaign,
            "revision": self.revision,
            "code": int(self.code),
            "held_bytes": self.held_bytes,
        }


def order_from(record: Mapping[str, Any]) -> Order:
    """Read an order that came.

    Raises:
        InputError: ``fleet-message``: not one of this version.
    """
    values = _checked(record, Order(Step.STATE, 1, 1, b"", 0).record())
    try:
        step = Step(values.pop("step"))
    except ValueError as exc:
        raise _foreign("step") from exc
    order = Order(step=step, **values)
    is_state = step is Step.STATE
    if len(order.bundle_sha256) != 32 or order.campaign < 1 or order.revision < 1 or order.bundle_bytes < 1:
        raise _foreign("value out of range")
    if is_state != bool(order.offer) or not 0 <= order.offset < order.bundle_bytes:
        raise _foreign("fields don't fit the step")
    if is_state and order.offset:
        raise _foreign("offset without a part")
    return order


def ack_from(record: Mapping[str, Any]) -> Ack:
    """Read an acknowledgement that came.

    Raises:
        InputError: ``fleet-message``: not one of this version.
    """
    values = _checked(record, Ack(0, 0, Code.DONE, 0).record())
    if min(values.values()) < 0:
        raise _foreign("negative number")
    try:
        code = Code(values.pop("code"))
    except ValueError as exc:
        raise _foreign("code") from exc
    return Ack(code=code, **values)


def _checked(record: Mapping[str, Any], pattern: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record without its version if it has exactly the pattern's keys and types."""
    if record.keys() != pattern.keys():
        raise _foreign("keys")
    for key, value in pattern.items():
        if type(record[key]) is not type(value):  # bool is an int to isinstance
            raise _foreign(f"type of {key}")
    if record["version"] != VERSION:
        raise _foreign("version")
    return {key: record[key] for key in pattern if key != "version"}


def _foreign(private: str) -> InputError:
    return InputError(
        "fleet-message", "This message is of another medveil version; update the older side.", private=private
    )
