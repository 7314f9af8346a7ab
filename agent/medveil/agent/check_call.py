"""What ``check`` was asked, of releases with labels and with masks alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from medveil.models.cli_support import OutputFormat, open_progress

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["CheckCall"]

_Settings = TypeVar("_Settings", bound="DataclassInstance")
_Check = TypeVar("_Check")


@dataclass(frozen=True, slots=True)
class CheckCall:
    """One call of the command.

    Attributes:
        release: folder of the protected copies.
        private: its private folder; None: beside it.
        bundle: what it was made with; None: as its last run says.
        policy: likewise.
        minutes: longest time; None: as the check has it.
        seeds: runs of every victim; None: likewise.
        victims: architectures; empty: all of them.
        threads: victims trained at once; None: as many as there are threads.
        output: table or JSON.
    """

    release: Path
    private: Path | None = None
    bundle: Path | None = None
    policy: Path | None = None
    minutes: float | None = None
    seeds: int | None = None
    victims: tuple[str, ...] = ()
    threads: int | None = None
    output: OutputFormat = OutputFormat.TABLE

    def carry_out(self, check: Callable[..., _Check], defaults: _Settings) -> _Check:
        """Run a check under a progress bar and return what it found.

        Args:
            check: `check_release` or `check_masked_release`.
            defaults: its settings, in which what was asked replaces what is there.
        """
        asked = {
            "limit_s": None if self.minutes is None else 60 * self.minutes,
            "seeds": self.seeds,
            "architectures": tuple(dict.fromkeys(self.victims)) or None,
            "threads": self.threads,
        }
        settings = replace(defaults, **{name: value for name, value in asked.items() if value is not None})
        with open_progress("victims", quiet=self.output is OutputFormat.JSON) as bar:
            task = bar.add_task("training", total=None)
            return check(
                self.release,
                self.private,
                bundle=self.bundle,
                policy=self.policy,
                settings=settings,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
