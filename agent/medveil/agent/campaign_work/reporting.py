"""Answers, reports and beats, sent through the one door while `run` runs.

What has to arrive lies in the book first and stays there until the coordinator has said that it has it: a day
offline, a lost reply or a kill between two lines costs nothing but time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from medveil.agent.campaign_work.book import Answer, Book, Campaign, WorkState, book_path
from medveil.agent.campaign_work.orders import record_offer
from medveil.agent.campaign_work.worker import is_told_as_allowed
from medveil.agent.egress import Door
from medveil.agent.joining import Identity, load_identity, renew
from medveil.agent.policy import SitePolicy
from medveil.agent.reporting_channel import open_channel
from medveil.agent.reporting_log import EgressLog
from medveil.models.errors import ConfigurationError, MedveilError, RefusedError
from medveil.protos.v1 import campaign_pb2, report_pb2, status_pb2
from medveil.protos.v1.conventions import methods

__all__ = ["Contact", "Reporter"]

_CALLS: Final = methods("CampaignService")
_PAUSE_S: Final = 2.0
"""How soon something new in the book is sent."""
_BEAT_S: Final = 10.0
"""Between two beats until the coordinator has said how often it wants one."""
_RETRY_S: Final = 5.0
"""Before the line is opened again after a failure; our choice: a coordinator that was restarted hears from everybody
within ten seconds."""
_REFUSED_PAUSE_S: Final = 600.0
"""A report that was refused is tried again this much later: it needs a person, not a faster machine."""
_REMADE_S: Final = 30.0
"""For the worker to make a report anew; our choice, several times what it takes."""


@dataclass(frozen=True, slots=True)
class Contact:
    """How the line to the campaign service stands.

    Attributes:
        last_accepted_unix_s: when the coordinator last accepted a beat; 0: never since `run` began.
        trouble: why the last attempt failed (a code); empty: it did not.
    """

    last_accepted_unix_s: int = 0
    trouble: str = ""


class Reporter:
    """Sends whatever is due, in a thread of its own."""

    def __init__(
        self,
        federation: Path,
        policy: SitePolicy,
        log: EgressLog,
        beat: Callable[[Identity], status_pb2.Beat],
    ) -> None:
        """Take what it needs; nothing is sent before `start`.

        Args:
            federation: folder of certificate and book.
            policy: the site's; it names the coordinator.
            log: the egress log.
            beat: makes the sign of life.
        """
        self._federation, self._policy, self._log, self._beat = federation, policy, log, beat
        self._guard, self._contact = threading.Lock(), Contact()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._next_beat, self._beat_pause_s = 0.0, _BEAT_S
        self._not_before: dict[int, float] = {}

    @property
    def contact(self) -> Contact:
        """How the line stands now."""
        with self._guard:
            return self._contact

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the message that is on its way."""
        self._stopping.set()
        self._thread.join()

    # ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._while_connected()
                continue  # with the new certificate, at once
            except MedveilError as error:
                self._note(trouble=error.code)
            except Exception as error:  # a bug must not silence the site for good; the status names it
                self._note(trouble=f"unexpected-{type(error).__name__.lower()}")
            self._stopping.wait(_RETRY_S)

    def _while_connected(self) -> None:
        """Send over one channel until it fails or the certificate changes."""
        if self._policy.coordinator is None:
            raise ConfigurationError("no-coordinator", "The policy names no coordinator.")
        identity = load_identity(self._federation)
        with (
            open_channel(
                self._policy.coordinator.campaign,
                identity.authority_pem,
                (identity.key_pem, identity.chain_pem),
            ) as channel,
            Book(book_path(self._federation)) as book,
        ):
            door = Door(channel, self._log)
            while not self._stopping.is_set():
                if self._send_due(door, book, identity):
                    renew(self._federation, door)
                    return
                self._stopping.wait(_PAUSE_S)

    def _send_due(self, door: Door, book: Book, identity: Identity) -> bool:
        """Send answers and reports that wait, and the beat when it is time; return whether to renew."""
        for campaign in book.campaigns():
            if campaign.answer is not None and not campaign.answer_sent and not campaign.is_over:
                self._send_answer(door, book, campaign)
            if campaign.report is not None and not campaign.report_sent:
                self._send_report(door, book, campaign)
        if time.monotonic() < self._next_beat:
            return False
        reply = self._send(door, "SendBeat", self._beat(identity))
        self._beat_pause_s = float(reply.next_beat_s) or _BEAT_S
        self._next_beat = time.monotonic() + self._beat_pause_s
        self._note(trouble="", last_accepted_unix_s=int(time.time()))
        if reply.offers_waiting or any(_waits_for_the_word(campaign) for campaign in book.campaigns()):
            self._read_offers(door, book)
        return bool(reply.renew_certificate)

    def _send_answer(self, door: Door, book: Book, campaign: Campaign) -> None:
        accepted = campaign.answer is Answer.ACCEPTED
        answer = campaign_pb2.ANSWER_ACCEPTED if accepted else campaign_pb2.ANSWER_DECLINED
        message = campaign_pb2.AnswerOfferRequest(
            campaign=campaign.number, revision=campaign.offer.revision, answer=answer
        )
        if self._waits(campaign.number):
            return
        try:
            self._send(door, "AnswerOffer", message)
        except RefusedError as error:
            self._note(trouble=error.code)
            self._wait_with(campaign.number)
            return
        book.answer_sent(campaign.number)
        self._read_offers(door, book)

    def _send_report(self, door: Door, book: Book, campaign: Campaign) -> None:
        if self._waits(campaign.number):
            return
        if not is_told_as_allowed(campaign, self._policy.egress):  # made before the policy asked for noise
            book.work_is(campaign.number, WorkState.STOPPED, "report-without-noise")
            self._wait_with(campaign.number, _REMADE_S)
            return
        message = report_pb2.Report.FromString(campaign.report)
        try:
            self._send(door, "SubmitReport", message)
        except RefusedError as error:
            book.report_refused(campaign.number, error.code)
            self._wait_with(campaign.number)
            return
        book.report_taken(campaign.number)

    def _read_offers(self, door: Door, book: Book) -> None:
        """Ask how the campaigns stand: the word to start needs not wait for the next Flower message."""
        for offer in self._send(door, "ListOffers", campaign_pb2.ListOffersRequest()).offers:
            # Not allowed here: recorded, and the status says so.
            with suppress(ConfigurationError):
                record_offer(offer, book, self._policy)

    def _send(self, door: Door, call: str, message: Any) -> Any:
        return door.send(_CALLS[call], message)

    def _waits(self, number: int) -> bool:
        return time.monotonic() < self._not_before.get(number, 0.0)

    def _wait_with(self, number: int, pause_s: float = _REFUSED_PAUSE_S) -> None:
        self._not_before[number] = time.monotonic() + pause_s

    def _note(self, **changes: Any) -> None:
        with self._guard:
            self._contact = replace(self._contact, **changes)


def _waits_for_the_word(campaign: Campaign) -> bool:
    return campaign.answer is Answer.ACCEPTED and campaign.offer.state == campaign_pb2.CAMPAIGN_STATE_OFFERED
