"""A whole campaign on this machine: a coordinator and three hospitals, as the programs that they would run.

DIR/coordinator/       the coordinator's folder, as `medveil-coordinator` makes it
DIR/st-anna/ ...       one folder per hospital: its images, its own folder, its release
DIR/phantom.medveil    the bundle (none with one's own)

Nothing is simulated: the commands of both sides run as processes, Flower carries offer and bundle over mutual TLS on
loopback, each site protects its images, and reports come back over gRPC. Only the operator and the stewards are
played: somebody has to type what they would type.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from medveil.agent.campaign_work.book import Book, Stage, book_path
from medveil.agent.campaign_work.bundles import Bundles
from medveil.agent.campaign_work.standing import work_of
from medveil.agent.demo.demonstration import shipped
from medveil.agent.demo.sites import SITES, Hospitals, draw_sites, split_sites
from medveil.agent.policy import load_policy
from medveil.agent.victim_check.check import CheckSettings, check_release
from medveil.agent.victim_check.training import Schedule
from medveil.models.bundle import open_bundle
from medveil.models.child_processes import Children, Program
from medveil.models.disk import write_atomically
from medveil.models.errors import ConfigurationError, MedveilError, RefusedError

__all__ = ["FederationWatch", "show_campaign"]

_LOOPBACK: Final = "127.0.0.1"
_MINIMUM_GROUP: Final = 5
_PATIENCE_S: Final = 900.0
"""How long one step may take before the demonstration gives up; on a busy machine Flower's processes start slowly."""
_TICK_S: Final = 0.5
_CHECK: Final = CheckSettings(
    architectures=("inception", "mlp"), seeds=1, schedule=Schedule(steps=120), limit_s=180.0
)
"""Two victims, one seed and short: a direction within a minute; the word "protected" takes what `medveil-agent check`
does by itself."""


_SHOWN: Final = ("images", "verified", "quarantined", "not_protectable", "psnr_db", "report", "release")


class FederationWatch(Protocol):
    """Who looks on."""

    def step(self, text: str) -> None:
        """Learn what happens now."""
        ...

    def images(self, done: int, total: int) -> None:
        """Learn how far the sites are, together."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    """One hospital, or the coordinator: its folder, and how its commands are called."""

    program: str
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """Ours, with this folder for home, one thread each, and no proxy between processes on loopback."""
        ours = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        return {**ours, "MEDVEIL_HOME": str(self.home), "OMP_NUM_THREADS": "1"}

    def argv(self, *words: object) -> list[str]:
        return [str(Path(sysconfig.get_path("scripts")) / self.program), *map(str, words), "--format", "json"]

    def call(self, *words: object) -> Any:
        """Run one command and return what it printed.

        Raises:
            RefusedError: it failed; ``code`` is its own.
        """
        done = subprocess.run(
            self.argv(*words),
            env=self.environment,
            capture_output=True,
            check=False,
        )
        try:
            value = json.loads(done.stdout)
        except ValueError as exc:
            raise RefusedError(
                "demo-step",
                f"{self.program} {words[0]} failed; run the demonstration again in another folder.",
                private=done.stderr.decode(errors="replace"),
            ) from exc
        if isinstance(value, dict) and "error" in value:
            raise RefusedError(
                value["error"]["code"], f"{self.program} {words[0]}: {value['error']['message']}"
            )
        return value

    def background(self, folder: Path, *words: object) -> Program:
        """Return a command that goes on running."""
        return Program(self.program, self.argv(*words), self.environment, folder / f"{self.program}.log")


def show_campaign(
    out: Path, data: Path | None, bundle: Path | None, watch: FederationWatch
) -> dict[str, Any]:
    """Run a campaign from ``init`` to ``seal`` and return what came of it, as JSON values.

    Args:
        out: folder for everything; it may not exist yet.
        data: the user's labelled images, dealt out to three sites; None draws phantoms.
        bundle: surrogates for the user's classes; None takes those shipped with medveil.
        watch: who looks on.

    Raises:
        ConfigurationError: ``demo-exists``, or ``demo-bundle``.
        InputError: ``data-format``.
        RefusedError: a step failed, or took longer than a quarter of an hour.
    """
    folder = out.absolute()
    if folder.exists():
        raise ConfigurationError(
            "demo-exists", "The demonstration's folder is there already; name another with --out."
        )
    started = time.monotonic()
    watch.step("images for three hospitals")
    own = bundle is not None
    hospitals = draw_sites(folder) if data is None else split_sites(data, folder, own_bundle=own)
    if bundle is None:
        bundle = folder / "phantom.medveil"
        write_atomically(bundle, shipped("phantom.medveil"))
    return _Demonstration(folder, hospitals, bundle.absolute(), watch).run(started)


@dataclass(frozen=True, slots=True)
class _Look:
    """What one site's own record says, seen from outside."""

    stage: Stage
    trusted: bool
    done: int
    images: int


class _Demonstration:
    """One campaign, and the processes that it takes."""

    def __init__(self, folder: Path, hospitals: Hospitals, bundle: Path, watch: FederationWatch) -> None:
        self._folder, self._hospitals, self._bundle, self._watch = folder, hospitals, bundle, watch
        self._coordinator = _Place("medveil-coordinator", folder / "coordinator")
        self._sites = {site: _Place("medveil-agent", folder / site / "home") for site in SITES}
        self._ports = dict(zip(("campaign", "enrolment", "fleet", "superlink"), _free_ports(4), strict=True))
        self._running: list[Children] = []

    def run(self, started: float) -> dict[str, Any]:
        try:
            self._open()
            number = self._offer()
            self._approve(number)
            status = self._finish(number)
            seconds = round(time.monotonic() - started, 1)
            self._watch.step("small models train on originals and on protected copies, at each site")
            rows = [self._row(site, number) for site in SITES]
            return {
                "campaign": status,
                "sites": rows,
                "seconds_to_seal": seconds,
                "surrogates_know_the_classes": not self._hospitals.aliases,
                "folder": str(self._folder),
            }
        finally:
            for children in reversed(self._running):
                children.stop()

    # The story, as operator and stewards would type it

    def _open(self) -> None:
        """Start the coordinator, let every site join it, and start their agents."""
        self._watch.step("the coordinator makes its certificate authority and starts")
        coordinator = self._coordinator
        fingerprint = coordinator.call("init")["authority_fingerprint"]
        self._start(coordinator.background(self._folder, "run", "--name", _LOOPBACK, *self._port_words()))
        self._until(self._coordinator_is_ready)
        for site, place in self._sites.items():
            self._watch.step(f"{site} joins with a one-time token; its keys are made there and stay there")
            token = coordinator.call("invite", site)["token"]
            address = f"{_LOOPBACK}:{self._ports['enrolment']}"
            place.call("join", address, "--token", token, "--fingerprint", fingerprint)
            self._write_policy(site)
            self._start(place.background(self._folder / site, "run", "--policy", self._policy(site)))

    def _offer(self) -> int:
        """Offer the campaign and wait until every site holds its bundle, verified and tested."""
        self._watch.step("the coordinator offers a campaign; Flower carries offer and bundle to the sites")
        words = [word for site in SITES for word in ("--site", site)]
        made = self._coordinator.call(
            "campaign", "create", "demonstration", *words, "--bundle", self._bundle,
            "--minimum-group-size", _MINIMUM_GROUP,
        )  # fmt: skip
        number = int(made["campaign"])
        self._coordinator.call("campaign", "offer", number)
        self._until(lambda: all(look is not None and look.trusted for look in self._looks(number)))
        return number

    def _approve(self, number: int) -> None:
        for site, place in self._sites.items():
            self._watch.step(f"the steward of {site} approves")
            place.call("approve", number)

    def _finish(self, number: int) -> Any:
        """Wait until every site has reported, and seal the campaign."""
        self._watch.step("the sites protect their images, where they lie, and report counts over gRPC")
        self._until(
            lambda: all(look is not None and look.stage is Stage.REPORTED for look in self._looks(number))
        )
        self._coordinator.call("campaign", "seal", number)
        return self._coordinator.call("status", number)

    # Looking

    def _looks(self, number: int) -> list[_Look | None]:
        looks = [self._look(site, number) for site in SITES]
        known = [look for look in looks if look is not None]
        self._watch.images(sum(look.done for look in known), sum(look.images for look in known))
        return looks

    def _look(self, site: str, number: int) -> _Look | None:
        home = self._sites[site].home
        with Book(book_path(home / "federation")) as book:
            campaign = book.campaign(number)
        if campaign is None:
            return None
        held = Bundles(home / "bundles").holds(campaign.offer.bundle_sha256)
        work = work_of(load_policy(self._policy(site)), campaign)
        return _Look(campaign.stage(bundle_held=held), held, work.done, work.images)

    def _coordinator_is_ready(self) -> bool:
        log = self._folder / f"{self._coordinator.program}.log"
        return log.is_file() and '"event": "ready"' in log.read_text(encoding="utf-8", errors="replace")

    def _row(self, site: str, number: int) -> dict[str, Any]:
        """Return what a site protected, and what victims learned there."""
        place, policy = self._sites[site], self._policy(site)
        (campaign,) = (
            c for c in place.call("status", "--policy", policy)["campaigns"] if c["campaign"] == number
        )
        row = {key: campaign[key] for key in _SHOWN}
        try:
            check = check_release(Path(campaign["release"]), settings=_CHECK)
        except MedveilError as error:
            return {"site": site, **row, "check": None, "check_refused": error.code}
        victims = [
            {
                "victim": victim.architecture,
                "clean": victim.clean.balanced_accuracy,
                "protected": victim.protected.balanced_accuracy,
                "recoverable": victim.protected.recoverable_accuracy,
            }
            for victim in check.victims
        ]
        return {"site": site, **row, "check": victims, "check_refused": None}

    # The processes

    def _start(self, program: Program) -> None:
        children = Children([program])
        children.tick()
        self._running.append(children)

    def _until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + _PATIENCE_S
        while not condition():
            for children in self._running:
                children.tick()
            if time.monotonic() > limit:
                raise RefusedError(
                    "demo-stuck", f"A step took too long; the logs in {self._folder} say what it waits for."
                )
            time.sleep(_TICK_S)

    def _port_words(self) -> list[object]:
        return [word for name, port in self._ports.items() for word in (f"--{name}-port", port)]

    def _policy(self, site: str) -> Path:
        return self._folder / site / "site.toml"

    def _write_policy(self, site: str) -> None:
        signer = open_bundle(self._bundle, trusted=None).signer
        classes = "\n".join(
            f"{_quoted(own)} = {_quoted(known)}" for own, known in self._hospitals.aliases.items()
        )
        text = f"""\
trusted_signers = ["{signer}"]

[classes]
{classes}

[egress]
minimum_group_size = {_MINIMUM_GROUP}

[coordinator]
campaign = "{_LOOPBACK}:{self._ports["campaign"]}"
fleet = "{_LOOPBACK}:{self._ports["fleet"]}"

[campaigns]
source = {_quoted(str(self._hospitals.sources[site]))}
out = {_quoted(str(self._folder / site / "releases"))}
"""
        write_atomically(self._policy(site), text.encode())


def _quoted(text: str) -> str:
    """Return a TOML string; its escapes are JSON's but for pairs of surrogates."""
    return json.dumps(text, ensure_ascii=False)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((_LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
