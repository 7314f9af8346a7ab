"""Where the coordinator's process keeps what, below its one folder; everything is for its own user only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["HOME_VARIABLE", "Layout"]

HOME_VARIABLE: Final = "MEDVEIL_HOME"


@dataclass(frozen=True, slots=True)
class Layout:
    """The folder that ``medveil-coordinator init`` made, and its parts."""

    home: Path

    @property
    def store(self) -> Path:
        """The coordinator's SQLite store."""
        return self.home / "coordinator.sqlite"

    @property
    def authority(self) -> Path:
        """The certificate authority's folder."""
        return self.home / "authority"

    @property
    def authority_certificate(self) -> Path:
        """Its certificate, which anyone may have."""
        return self.authority / "authority.pem"

    @property
    def bundles(self) -> Path:
        """The bundles of campaigns, by SHA-256."""
        return self.home / "bundles"

    @property
    def fleet(self) -> Path:
        """What belongs to the running process: Flower's state, certificates of loopback, logs."""
        return self.home / "fleet"

    @property
    def lock(self) -> Path:
        """Held for as long as a process runs this coordinator."""
        return self.fleet / "lock"

    @property
    def flower_home(self) -> Path:
        """Flower's own folder."""
        return self.fleet / "flwr"

    @property
    def superlink_database(self) -> Path:
        """The SuperLink's state: nodes, runs, messages in transit."""
        return self.fleet / "superlink.sqlite"

    @property
    def superexec_secret(self) -> Path:
        """What the SuperExec proves itself with to the SuperLink."""
        return self.fleet / "superexec.secret"

    @property
    def certificate(self) -> Path:
        """Private key and certificate of the edge and the SuperLink, renewed at every start."""
        return self.fleet / "server.pem"

    def log(self, program: str) -> Path:
        """The output of one program."""
        return self.fleet / "logs" / f"{program}.log"
