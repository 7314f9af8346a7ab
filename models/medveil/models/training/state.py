"""What a training keeps on disk while it runs: killed at any moment, the same command continues.

    OUT.training/
        plan.json              what is trained, and for how many epochs (fixed once, so that a rerun agrees)
        NAME.partial.pt        the member in work, after its last finished epoch
        NAME.finished.pt       a finished member
        lock                   held while a process works here

Every file appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from medveil.models.disk import locked, replace_file
from medveil.models.errors import BusyError, ConfigurationError, StorageError

__all__ = ["TrainingState", "state_folder", "training_identity"]

_PLAN = "plan.json"


def state_folder(out: Path) -> Path:
    """Return the folder beside the bundle `out` in which its training is kept."""
    return out.with_name(f"{out.name}.training")


def training_identity(*facts: object) -> str:
    """Return a digest of what a continued training must agree in with the one that began, and of what computes it.

    Args:
        facts: data, seed, time and plan, with a `str` that tells them apart.
    """
    told = [str(fact) for fact in (*facts, torch.__version__, version("medveil"))]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class TrainingState:
    """The state folder of one training.

    Args:
        folder: see `state_folder`.
        identity: see `training_identity`; another training may not continue here.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder
        self._identity = identity

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            BusyError: "training": another process trains for the same bundle.
            StorageError: "state-write".
        """
        with _storage_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
        busy = BusyError("training", "Another process is training for this bundle; let it end.")
        with locked(self._folder / "lock", busy):
            yield

    def epochs(self) -> dict[str, int] | None:
        """Return the epochs per member that were planned at the first start; None at the first start.

        Raises:
            ConfigurationError: "other-training": the folder belongs to other data, another seed or plan.
        """
        try:
            kept = json.loads((self._folder / _PLAN).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            kept = {}
        if kept.get("identity") != self._identity:
            raise ConfigurationError(
                "other-training",
                "An unfinished training with other data, seed or settings lies beside the output; "
                "remove its .training folder or choose another --out.",
                private=str(self._folder),
            )
        return dict(kept["epochs"])

    def keep_epochs(self, epochs: Mapping[str, int]) -> None:
        """Fix the epochs per member for this run and its continuations."""
        self._write(
            _PLAN, json.dumps({"identity": self._identity, "epochs": dict(epochs)}, indent=2).encode()
        )

    def load(self, name: str) -> dict[str, Any] | None:
        """Return what was last kept under `name`; None if nothing was."""
        path = self._folder / f"{name}.pt"
        if not path.exists():
            return None
        # weights_only: the file is data, never code
        return dict(torch.load(path, weights_only=True))

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep tensors and plain values under `name`."""
        buffer = io.BytesIO()
        torch.save(dict(value), buffer)
        self._write(f"{name}.pt", buffer.getvalue())

    def drop(self, name: str) -> None:
        """Forget what was kept under `name`."""
        (self._folder / f"{name}.pt").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder: the bundle is written and nothing here is needed any more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, name: str, data: bytes) -> None:
        with _storage_errors():
            replace_file(self._folder / name, data)


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageError(
            "state-write",
            "The training cannot write beside the output; check space and permissions.",
            private=str(exc),
        ) from exc
