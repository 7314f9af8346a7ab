"""What can go wrong, as one small tree.

    MedveilError
    +-- ConfigurationError      the call, the policy or the settings are wrong          exit 2
    +-- InputError              the source as a whole cannot be worked on               exit 4
    |   +-- ImageError          one image cannot: it goes to quarantine, the batch on   (exit 3, "partial")
    +-- RefusedError            medveil will not run this: it cannot be trusted         exit 5
    |   +-- SignatureError      a bundle or sidecar is not what its signer wrote
    |   +-- AdmissionError      a received graph breaks one of the admission rules
    |   +-- SelfTestError       a session computed a wrong gradient
    +-- StorageError            a disk is full, read-only or holds someone else's files exit 6
    +-- BusyError               another medveil process works on the same folder        exit 7

Every error carries three things: a ``code`` (stable, for programs and the ledger), a ``public`` sentence that
says what to do and holds nothing personal (no path below the source, no identifier, no pixel value), and an
optional ``private`` detail for the site's own log. Foreign exceptions are translated once, at the edge,
``from`` the cause.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "AdmissionError",
    "BusyError",
    "ConfigurationError",
    "ExitCode",
    "ImageError",
    "InputError",
    "MedveilError",
    "RefusedError",
    "SelfTestError",
    "SignatureError",
    "StorageError",
]


class ExitCode(IntEnum):
    """Exit codes of every medveil command; documented in the README, tested in ``tests/e2e``."""

    OK = 0
    UNEXPECTED = 1
    CONFIGURATION = 2
    PARTIAL = 3
    INPUT = 4
    REFUSED = 5
    STORAGE = 6
    BUSY = 7
    INTERRUPTED = 130


class MedveilError(Exception):
    """Root of the tree; never raised itself.

    Args:
        code: stable, lower case, dashes (``"truncated"``, ``"domain"``); unique within its class.
        public: one sentence for a screen or the wire: what is wrong and what to do about it.
        private: detail for the site's own log only.
    """

    exit_code: ExitCode = ExitCode.UNEXPECTED

    def __init__(self, code: str, public: str, *, private: str = "") -> None:
        super().__init__(public)
        self.code = code
        self.public = public
        self.private = private

    def __str__(self) -> str:
        return f"{self.public} [{self.code}]"


class ConfigurationError(MedveilError):
    """The command line, the policy or a settings file is wrong."""

    exit_code = ExitCode.CONFIGURATION


class InputError(MedveilError):
    """The source as a whole cannot be worked on (missing, empty, no labels)."""

    exit_code = ExitCode.INPUT


class ImageError(InputError):
    """One image cannot be worked on; it is quarantined under ``code`` and the batch goes on."""

    exit_code = ExitCode.PARTIAL


class RefusedError(MedveilError):
    """medveil refuses to run something that it cannot trust."""

    exit_code = ExitCode.REFUSED


class SignatureError(RefusedError):
    """A bundle or a sidecar is not what its signer wrote."""


class AdmissionError(RefusedError):
    """A received ONNX graph breaks an admission rule; ``code`` names the rule."""


class SelfTestError(RefusedError):
    """A session does not reproduce its golden vector, or its gradient fails the directional check."""


class StorageError(MedveilError):
    """A disk is full or read-only, or an output folder holds files that are not ours."""

    exit_code = ExitCode.STORAGE


class BusyError(MedveilError):
    """Another medveil process holds the lock on this folder."""

    exit_code = ExitCode.BUSY
