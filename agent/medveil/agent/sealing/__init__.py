"""The site's key, and what it locks: sidecars that turn a protected copy back into the original."""

from __future__ import annotations

from medveil.agent.sealing.identity import SiteKey, home_folder, load_site_key, site_key_path
from medveil.agent.sealing.sidecar import (
    Binding,
    SidecarReader,
    clean_digest,
    frame_change,
    open_sidecar,
    write_sidecar,
)

__all__ = [
    "Binding",
    "SidecarReader",
    "SiteKey",
    "clean_digest",
    "frame_change",
    "home_folder",
    "load_site_key",
    "open_sidecar",
    "site_key_path",
    "write_sidecar",
]
