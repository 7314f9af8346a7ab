"""Many victims at once: every architecture under every seed, on clean and on protected images, in whole rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeVar

from medveil.agent.preparation import available_threads
from medveil.models.errors import ConfigurationError

__all__ = ["OutOfTime", "Progress", "Rounds", "Run", "finished_rounds"]

Progress = Callable[[int, int], None]
"""Told how many victims are trained, of how many."""

Kind = Literal["clean", "protected"]
_KINDS: Final[tuple[Kind, ...]] = ("clean", "protected")

Result = TypeVar("Result")


class OutOfTime(Exception):  # noqa: N818 (no error: the check goes on with what is finished)
    """The time for a victim is over before it was trained."""


@dataclass(frozen=True, slots=True)
class Run:
    """One victim: its architecture, its seed, and the kind of images it trains on."""

    architecture: str
    seed: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Rounds(Generic[Result]):
    """What the finished runs gave.

    Attributes:
        seeds: those under which every architecture was trained, both ways; the others don't count.
        results: of every finished run.
    """

    seeds: tuple[int, ...]
    results: Mapping[Run, Result]

    def of(self, architecture: str, kind: Kind) -> list[Result]:
        """Return the results of one architecture on one kind of images, seed by seed."""
        return [self.results[Run(architecture, seed, kind)] for seed in self.seeds]


def finished_rounds(
    train: Callable[[Run], Result],
    architectures: Sequence[str],
    seeds: int,
    *,
    threads: int | None,
    progress: Progress,
) -> Rounds[Result]:
    """Train every victim that there is time for; seed after seed, so that whole rounds come first.

    Args:
        train: trains one victim, or raises `OutOfTime`.
        architectures: of the victims.
        seeds: runs of each on each kind of image.
        threads: victims trained at once; None takes every processor thread.
        progress: who looks on.

    Raises:
        ConfigurationError: ``time-limit``: not one seed of all victims was finished in time.
    """
    runs = [Run(name, seed, kind) for seed in range(seeds) for name in architectures for kind in _KINDS]
    results: dict[Run, Result] = {}
    progress(0, len(runs))
    with ThreadPoolExecutor(min(threads or available_threads(), len(runs))) as pool:
        waiting: dict[Future[Result], Run] = {pool.submit(train, run): run for run in runs}
        try:
            for number, done in enumerate(as_completed(waiting), start=1):
                if not isinstance(done.exception(), OutOfTime):
                    results[waiting[done]] = done.result()
                progress(number, len(runs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    whole = tuple(s for s in range(seeds) if all(run in results for run in runs if run.seed == s))
    if not whole:
        raise ConfigurationError(
            "time-limit",
            "The time was over before one round of victims was trained; give the check more of it.",
        )
    return Rounds(whole, results)
