"""Where the site keeps what belongs to campaigns, below its own folder."""

from __future__ import annotations

from pathlib import Path

from medveil.agent.sealing import home_folder

__all__ = ["bundles_folder", "egress_log_file", "federation_folder", "flower_folder", "policy_file"]


def federation_folder() -> Path:
    """Return the folder of keys, certificate, egress log and the record of campaigns."""
    return home_folder() / "federation"


def egress_log_file() -> Path:
    """Return the log of everything that left."""
    return federation_folder() / "egress.jsonl"


def bundles_folder() -> Path:
    """Return the folder of received bundles."""
    return home_folder() / "bundles"


def flower_folder() -> Path:
    """Return the folder of Flower's own files and logs."""
    return home_folder() / "flower"


def policy_file() -> Path:
    """Return where the policy lies when no other file is named."""
    return home_folder() / "site.toml"
