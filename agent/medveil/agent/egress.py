"""The only door out of a site. Nothing else in the agent builds or sends a message to the coordinator.

1. `report` copies named aggregate fields, one by one, through the gate of the steward's policy
   (`medveil.agent.reporting_figures`).
2. `Door.send` writes the serialised bytes to the egress log, and then sends exactly those bytes.

Rates and counts are the only content: the messages have no field for text or bytes, but for enrolment, where
the site sends its public key and the coordinator's own token before it has touched an image.
"""

from __future__ import annotations

from typing import Any, Final

from medveil.agent.reporting_channel import translated
from medveil.agent.reporting_figures import Figures, tell_exactly, tell_nothing, tell_with_noise
from medveil.agent.reporting_log import EgressLog
from medveil.agent.reporting_noise import Draw
from medveil.agent.reporting_policy import ReportingPolicy
from medveil.models.errors import ConfigurationError
from medveil.protos.v1 import report_pb2
from medveil.protos.v1.conventions import MAX_MESSAGE_BYTES, Method

__all__ = ["Door", "report"]

_CALL_S: Final = 30.0


def report(
    figures: Figures,
    policy: ReportingPolicy | None,
    *,
    campaign: int,
    offer_revision: int,
    sequence: int,
    draw: Draw | None = None,
) -> report_pb2.Report:
    """Return the one message that says what became of a site's images.

    Args:
        figures: exact.
        policy: what may leave, and with which noise.
        campaign: the coordinator's number.
        offer_revision: of the offer that was accepted.
        sequence: of the report.
        draw: the noise; None: the budget is used up, and under a policy that asks for noise no figure leaves.

    Raises:
        ConfigurationError: ``no-egress-policy``: without a policy nothing leaves.
    """
    if policy is None:
        raise ConfigurationError(
            "no-egress-policy", "Nothing leaves this site until its policy says what may."
        )
    message = report_pb2.Report(
        campaign=campaign,
        offer_revision=offer_revision,
        sequence=sequence,
        minimum_group_size=policy.minimum_group_size,
    )
    if policy.noise is None:
        tell_exactly(message, figures, policy)
    elif draw is None:
        tell_nothing(message, figures, policy.noise)
    else:
        tell_with_noise(message, figures, policy, policy.noise, draw)
    return message


class Door:
    """Sends messages over one channel, and writes down each of them first."""

    def __init__(self, channel: Any, log: EgressLog) -> None:
        """Take an open channel and an open log; the caller closes both."""
        self._channel, self._log = channel, log

    def send(self, method: Method, message: Any, *, timeout_s: float = _CALL_S) -> Any:
        """Send one message and return the reply.

        Raises:
            RefusedError: the coordinator refused it; ``code`` is the coordinator's word. ``unknown-authority``:
                the other end is not our coordinator.
            ConfigurationError: ``unreachable``, ``not-this-message`` or ``message-size``.
            StorageError: the egress log cannot be written, so nothing was sent.
        """
        if type(message) is not method.request:
            raise ConfigurationError("not-this-message", "This call does not take this kind of message.")
        payload = message.SerializeToString(deterministic=True)
        if len(payload) > MAX_MESSAGE_BYTES:
            raise ConfigurationError("message-size", "The message is larger than 64 KiB and stays here.")
        import grpc  # late: the many commands that send nothing start without it

        self._log.append(method.path, payload)
        try:
            return method.reply.FromString(self._channel.unary_unary(method.path)(payload, timeout=timeout_s))
        except grpc.RpcError as exc:
            raise translated(exc) from exc
