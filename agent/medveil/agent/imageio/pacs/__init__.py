"""The third door: to the hospital's own PACS and to nowhere else (extra [dicom-net]).

Into the site:  ``ReceivePort`` or a pull -> ``Inbox`` -> a folder of complete series, which ``protect`` takes.
Out of it:      released objects -> ``DeliveryQueue`` -> ``Delivery`` -> the PACS, and back to be compared.
"""

from __future__ import annotations

from medveil.agent.imageio.pacs.delivery import Delivery, Reader, Round, Sender
from medveil.agent.imageio.pacs.dimse import DimseReader, DimseSender, echo, find_instances, pull_by_move
from medveil.agent.imageio.pacs.inbox import CompleteSeries, Inbox, Rejected, inbox_counts
from medveil.agent.imageio.pacs.pulled import Pulled
from medveil.agent.imageio.pacs.queue import DeliveryQueue, DeliveryState, Entry, delivery_counts
from medveil.agent.imageio.pacs.receiver import ReceivePort
from medveil.agent.imageio.pacs.web import WebPacs, pull_by_wado
from medveil.agent.pacs_policy import DicomPeer, KnownSender, ReceiveSettings, WebPeer

__all__ = [
    "CompleteSeries",
    "Delivery",
    "DeliveryQueue",
    "DeliveryState",
    "DicomPeer",
    "DimseReader",
    "DimseSender",
    "Entry",
    "Inbox",
    "KnownSender",
    "Pulled",
    "Reader",
    "ReceivePort",
    "ReceiveSettings",
    "Rejected",
    "Round",
    "Sender",
    "WebPacs",
    "WebPeer",
    "delivery_counts",
    "echo",
    "find_instances",
    "inbox_counts",
    "pull_by_move",
    "pull_by_wado",
]
