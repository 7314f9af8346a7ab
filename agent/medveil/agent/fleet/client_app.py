"""The app that Flower runs here: installed code, for the coordinator's app bundle holds settings only.

One kind of message, taken apart by `medveil.protos.fleet`; every answer is that module's `Ack`. Flower sends the text
of an exception that escapes to the coordinator, so none does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from medveil.agent.campaign_work.book import Book, book_path
from medveil.agent.campaign_work.bundles import Bundles
from medveil.agent.campaign_work.orders import carry_out
from medveil.agent.campaign_work.places import bundles_folder, federation_folder
from medveil.agent.fleet.programs import POLICY_VARIABLE
from medveil.models.errors import InputError, MedveilError
from medveil.protos.fleet import (
    ACK_RECORD,
    ACTION,
    ORDER_RECORD,
    PART_ARRAY,
    PART_BYTES,
    PART_RECORD,
    Ack,
    Code,
    Order,
    Step,
    order_from,
)

__all__ = ["app", "obey"]

app = ClientApp()
_log = logging.getLogger(__name__)


@app.query(ACTION)
def obey(message: Message, context: Context) -> Message:
    """Carry out one order and answer with an `Ack`, whatever happens."""
    del context  # nothing is kept in Flower: the site's own record survives it
    return Message(RecordDict({ACK_RECORD: MetricRecord(dict(_ack(message).record()))}), reply_to=message)


def _ack(message: Message) -> Ack:
    order: Order | None = None
    try:
        order, part = _read(message.content)
        policy = os.environ.get(POLICY_VARIABLE)
        with Book(book_path(federation_folder())) as book:
            return carry_out(order, part, book, Bundles(bundles_folder()), Path(policy) if policy else None)
    except InputError as error:
        code = Code.MESSAGE
        _log.error("%s %s", error.code, error.private)
    except MedveilError as error:
        code = Code.STORAGE
        _log.error("%s %s", error.code, error.private)
    except Exception:  # the last line of defence: its text would travel
        code = Code.UNEXPECTED
        _log.exception("an order failed")
    return Ack(0, 0, code, 0) if order is None else Ack(order.campaign, order.revision, code, 0)


def _read(content: RecordDict) -> tuple[Order, bytes]:
    """Take a message apart.

    Raises:
        InputError: ``fleet-message``: it is not one of this version.
    """
    record = content.get(ORDER_RECORD)
    if not isinstance(record, ConfigRecord):
        raise _foreign()
    order = order_from(_plain(record))
    part = content.get(PART_RECORD)
    wanted = {ORDER_RECORD} if order.step is Step.STATE else {ORDER_RECORD, PART_RECORD}
    if set(content) != wanted:
        raise _foreign()
    return order, b"" if part is None else _bytes(part)


def _plain(record: ConfigRecord) -> Mapping[str, Any]:
    return dict(record)


def _bytes(part: object) -> bytes:
    if not isinstance(part, ArrayRecord) or set(part) != {PART_ARRAY}:
        raise _foreign()
    array = part[PART_ARRAY]
    if array.dtype != "uint8" or len(array.shape) != 1 or not 0 < array.shape[0] <= PART_BYTES:
        raise _foreign()
    return array.numpy().tobytes()


def _foreign() -> InputError:
    return InputError("fleet-message", "This message is of another medveil version; update the older side.")
