"""What an order of the coordinator does at this site. Short: it records, stores and checks; the work is `run`'s.

Every outcome is one of the numbers of `medveil.protos.fleet.Code`. Nothing that happens here, no exception and no
file name, reaches the coordinator in another form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from medveil.agent.campaign_work.book import Answer, Book, Campaign
from medveil.agent.campaign_work.bundles import Bundles
from medveil.agent.policy import SitePolicy, load_policy
from medveil.models.errors import (
    AdmissionError,
    BusyError,
    ConfigurationError,
    InputError,
    MedveilError,
    SelfTestError,
    SignatureError,
    StorageError,
)
from medveil.protos.fleet import Ack, Code, Order, Step
from medveil.protos.v1 import campaign_pb2

__all__ = ["carry_out", "record_offer"]

_CODES: Final[tuple[tuple[type[MedveilError], Code], ...]] = (
    (SignatureError, Code.BUNDLE_SIGNATURE),
    (AdmissionError, Code.BUNDLE_REFUSED),
    (SelfTestError, Code.BUNDLE_SELF_TEST),
    (StorageError, Code.STORAGE),
    (BusyError, Code.BUSY),
    (ConfigurationError, Code.POLICY),
)
"""By class, the first that fits; what isn't here broke a rule of the bundle's container."""
_PASSING: Final = (Code.STORAGE, Code.BUSY)
"""No word on the bundle itself: the same part is welcome again."""


def carry_out(order: Order, part: bytes, book: Book, bundles: Bundles, policy_file: Path | None) -> Ack:
    """Do what an order asks for and return what the coordinator may know of it.

    Args:
        order: as it came.
        part: of the bundle; with BUNDLE only.
        book: this site's record.
        bundles: this site's bundles.
        policy_file: this site's policy.
    """
    try:
        code = _state(order, book, bundles, policy_file) if order.step is Step.STATE else Code.DONE
        if order.step is Step.BUNDLE:
            code = _bundle(order, part, book, bundles, policy_file)
    except MedveilError as error:
        code = _code(error)
    return Ack(order.campaign, order.revision, code, _held(order, bundles))


def record_offer(offer: campaign_pb2.Offer, book: Book, policy: SitePolicy) -> bool:
    """Take an offer, whichever way it came, and answer it where the steward has done so beforehand.

    Returns:
        Whether anything changed.

    Raises:
        ConfigurationError: ``method-not-allowed``: nobody could accept it under this policy.
    """
    changed = book.offered(offer)
    policy.check_method(offer.method)
    known = book.campaign(offer.campaign)
    unanswered = known is not None and known.answer is None and not known.is_over
    if unanswered and policy.campaigns is not None and policy.campaigns.approve == "always":
        book.answer(offer.campaign, Answer.ACCEPTED, "policy")
        changed = True
    return changed


def _state(order: Order, book: Book, bundles: Bundles, policy_file: Path | None) -> Code:
    try:
        offer = campaign_pb2.Offer.FromString(order.offer)
    except DecodeError:
        return Code.MESSAGE
    named = (offer.campaign, offer.revision, offer.bundle_sha256, offer.bundle_size_bytes)
    if named != (order.campaign, order.revision, order.bundle_sha256, order.bundle_bytes):
        return Code.MESSAGE
    record_offer(offer, book, load_policy(policy_file))
    known = book.campaign(order.campaign)
    if known is not None and known.bundle_trouble:
        return _remembered(known)
    return _accept_if_whole(order, book, bundles, policy_file)


def _bundle(order: Order, part: bytes, book: Book, bundles: Bundles, policy_file: Path | None) -> Code:
    known = book.campaign(order.campaign)
    if known is None or (known.offer.revision, known.offer.bundle_sha256) != (
        order.revision,
        order.bundle_sha256,
    ):
        return Code.CAMPAIGN
    if known.answer is Answer.DECLINED:
        return Code.POLICY
    if known.bundle_trouble:
        return _remembered(known)
    if bundles.holds(order.bundle_sha256):
        return Code.DONE
    try:
        bundles.append(order.bundle_sha256, order.bundle_bytes, order.offset, part)
    except InputError:
        return Code.OFFSET
    return _accept_if_whole(order, book, bundles, policy_file)


def _accept_if_whole(order: Order, book: Book, bundles: Bundles, policy_file: Path | None) -> Code:
    """Check a bundle whose last byte is here; also one that arrived just before a kill."""
    sha256 = order.bundle_sha256
    if bundles.holds(sha256) or bundles.held_bytes(sha256) < order.bundle_bytes:
        return Code.DONE
    try:
        bundles.accept(sha256, policy_file)
    except MedveilError as error:
        code = _code(error)
        if code not in _PASSING:
            book.bundle_refused(order.campaign, _name(code))
        return code
    return Code.DONE


def _held(order: Order, bundles: Bundles) -> int:
    """Return what the coordinator may count on: the whole size only for a bundle that is trusted."""
    held = bundles.held_bytes(order.bundle_sha256)
    whole = bundles.holds(order.bundle_sha256)
    return held if whole else min(held, order.bundle_bytes - 1)


def _code(error: MedveilError) -> Code:
    if isinstance(error, SignatureError) and error.code == "bundle-digest":
        return Code.BUNDLE_DIGEST
    return next((code for kind, code in _CODES if isinstance(error, kind)), Code.BUNDLE_REFUSED)


def _name(code: Code) -> str:
    return code.name.lower().replace("_", "-")


def _remembered(known: Campaign) -> Code:
    return next((code for code in Code if _name(code) == known.bundle_trouble), Code.BUNDLE_REFUSED)
