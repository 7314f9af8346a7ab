"""Campaigns over Flower: the coordinator's half.

    due           who needs an order, and when (pure)
    conversation  what is said to one site until it is up to date (pure, over a line)
    server_app    the ServerApp: one round with the sites that are online
    control       registers nodes and starts rounds at the SuperLink
    edge          the only way in from outside: mutual TLS, fleet calls only
    dispatcher    starts rounds as long as something is due
    serving       all of it in one process, with the SuperLink and its SuperExec beside it

Modules are imported from where they are; nothing here imports Flower until it is used.
"""

from __future__ import annotations

__all__: list[str] = []
