"""A coordinator and two hospitals over real Flower: each process is killed once, and nobody is obeyed blindly."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from medveil.agent.campaign_work.book import Stage
from medveil.agent.fleet.node_key import node_key, node_public_key
from medveil.agent.fleet.programs import fleet_programs
from medveil.coordinator import operations
from medveil.coordinator.campaign import SiteState
from medveil.coordinator.fleet.bundles import keep_bundle
from medveil.coordinator.store import Store
from medveil.models.child_processes import Children
from medveil.protos.fleet import PART_BYTES, Code
from medveil.protos.v1 import campaign_pb2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks into /proc"),
]

SEEN_S = 0.7
"""An agent looks for its client app twice a second; one that dies younger than this is given up after 10 s, not 2."""


@dataclass
class Fleet:
    """A running coordinator, its store, and two running hospitals that approve everything."""

    coordinator: Any
    store: Store
    first: Any
    second: Any

    @property
    def hospitals(self) -> tuple[Any, Any]:
        return self.first, self.second

    def state(self, hospital: Any, number: int = 1) -> SiteState:
        return self.store.campaign(number).sites[hospital.name].state


@pytest.fixture(scope="module")
def fleet(
    new_coordinator: Callable[[], Any],
    new_hospital: Callable[..., Any],
    large_bundle: Any,
    until: Callable[..., Any],
) -> Iterator[Fleet]:
    coordinator = new_coordinator()
    coordinator.start()
    coordinator.ready()
    hospitals = (new_hospital("st-anna", 24), new_hospital("northside", 64))
    with Store(coordinator.home / "coordinator.sqlite") as store:
        for hospital in hospitals:
            hospital.join(store, coordinator.authority, coordinator.ports["enrolment"])
            ports = coordinator.ports["campaign"], coordinator.ports["fleet"]
            hospital.write_policy(*ports, signer=large_bundle.signer)
            hospital.start()
        until(lambda: len(coordinator.events("site-present")) == len(hospitals), "both SuperNodes")
        until(lambda: all(hospital.status()["gate"] for hospital in hospitals), "what the agents know")
        yield Fleet(coordinator, store, *hospitals)


def test_a_campaign_survives_the_death_of_each_of_its_processes(
    fleet: Fleet, large_bundle: Any, until: Callable[..., Any], say: Callable[[str], None]
) -> None:
    first, second, store, coordinator = fleet.first, fleet.second, fleet.store, fleet.coordinator
    sites = ("--site", first.name, "--site", second.name)
    offer = ("--bundle", str(large_bundle.path), "--minimum-group-size", "5")
    coordinator.call("campaign", "create", "chest", *sites, *offer)
    coordinator.call("campaign", "offer", "1")

    # The SuperLink dies, while both sites wait for the first part of the bundle.
    until(lambda: len(store.deliveries(1)) == len(fleet.hospitals), "both sites to know of the campaign")
    ready = len(coordinator.events("ready"))
    os.kill(coordinator.child("flower-superlink"), signal.SIGKILL)
    since = time.monotonic()
    until(lambda: len(coordinator.events("ready")) > ready, "the SuperLink")
    say(f"SuperLink killed: ready after {time.monotonic() - since:.1f} s")

    # The first site's client app dies in the middle of the bundle, at work on the second part; the second site's goes
    # on beside it. Its SuperNode, which would wait a minute, is told to take its leave and begins anew.
    part = first.bundles.path(hashlib.sha256(large_bundle.content).digest()).with_suffix(".part")
    until(lambda: part.is_file() and part.stat().st_size == PART_BYTES, "the first part of the bundle")
    say(f"SuperLink killed: first part of the bundle there after {time.monotonic() - since:.1f} s")
    of_first_part = first.find("flwr-clientapp")
    until(lambda: first.find("flwr-clientapp") not in (None, of_first_part), "the second part")
    supernode = first.child("flower-supernode")
    time.sleep(SEEN_S)
    os.kill(first.find("flwr-clientapp"), signal.SIGKILL)
    struck, held = time.monotonic(), part.stat().st_size

    # The second site's SuperNode dies; Flower lets it in again only after 60 s, for which no image waits.
    until(lambda: second.verified(), "the second site's first image")
    os.kill(second.child("flower-supernode"), signal.SIGKILL)
    struck_node = time.monotonic()

    # Its worker dies in mid-image.
    worker = second.child("campaign_work.worker")
    os.kill(worker, signal.SIGKILL)
    done, since = second.verified(), time.monotonic()
    assert done < second.images
    until(lambda: second.verified() > done, "the next image")
    say(f"worker killed: next image verified after {time.monotonic() - since:.1f} s")

    until(lambda: part.with_suffix(".medveil").is_file(), "the first site's bundle")
    waited = time.monotonic() - struck
    say(f"client app killed with {held:,} bytes held: bundle whole and tested after {waited:.1f} s")
    assert first.child("flower-supernode") != supernode
    assert "the client app died with an order" in (first.home / "flower/gate.log").read_text()
    until(lambda: fleet.state(second) is SiteState.VERIFIED, "the second site's report")
    say(f"SuperNode killed: report accepted after {time.monotonic() - struck_node:.1f} s all the same")
    until(lambda: fleet.state(first) is SiteState.VERIFIED, "the first site's report")

    second.check_that_an_undisturbed_run_gives_the_same_bytes(large_bundle.path)

    # The coordinator dies in the round that tells of the end.
    until(lambda: not store.open_rounds(), "quiet")
    coordinator.call("campaign", "seal", "1")
    until(store.open_rounds, "a round")
    coordinator.kill()
    since, restart = time.monotonic(), datetime.now(UTC)
    coordinator.start()
    coordinator.ready()
    say(f"coordinator killed: ready after {time.monotonic() - since:.1f} s")
    for hospital in fleet.hospitals:
        until(lambda site=hospital: store.contact(site.name).time > restart, "a beat")
        say(f"coordinator killed: {hospital.name} in contact after {time.monotonic() - since:.1f} s")
    for hospital in fleet.hospitals:
        until(lambda site=hospital: store.deliveries(1)[site.name].state == "sealed", "the seal to arrive")
        say(f"coordinator killed: {hospital.name} knows of the seal after {time.monotonic() - since:.1f} s")
    say(f"SuperNode killed: Flower had let it in again after {time.monotonic() - struck_node:.1f} s at most")

    for hospital in fleet.hospitals:
        hospital.check_that_nothing_was_lost_or_repeated(store)


EVIL_APP = """
import os
import time
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()


@client.query("medveil")
def obey(message, context):
    (Path(os.environ["MEDVEIL_HOME"]) / "obeyed").touch()
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid, context):
    nodes = list(grid.get_node_ids())
    grid.push_messages([Message(RecordDict(), node, "query.medveil") for node in nodes])
    time.sleep(30)
"""


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # flwr's use of pathspec
def test_an_app_that_a_site_does_not_know_runs_at_no_site(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Callable[..., Any]
) -> None:
    """Whoever holds the coordinator's machine starts an app of his own; a node without a gate shows what it does."""
    before = {hospital.name: hospital.status()["gate"]["refused"] for hospital in fleet.hospitals}
    authority, link = fleet.coordinator.home / "authority/authority.pem", fleet.coordinator.ports["superlink"]
    settings = files("medveil.coordinator.fleet").joinpath("campaign/pyproject.toml").read_text()
    for side, name in (("serverapp", "server"), ("clientapp", "client")):
        settings = re.sub(f'{side} = ".*"', f'{side} = "evil:{name}"', settings)
    content, _ = build_fab_from_files({"pyproject.toml": settings.encode(), "evil.py": EVIL_APP.encode()})

    monkeypatch.setenv("MEDVEIL_HOME", str(tmp_path / "bare"))
    key = node_key(tmp_path)
    programs = fleet_programs(tmp_path / "bare", f"127.0.0.1:{link}", authority, key, tmp_path / "site.toml")
    control = ControlHttpClient.from_server_address(
        f"127.0.0.1:{link}",
        False,
        authority.read_bytes(),
        [RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    bare = Children(programs)
    try:
        control.RegisterNode(RegisterNodeRequest(public_key=node_public_key(tmp_path), name="bare"))
        bare.tick()
        log = tmp_path / "bare/flower-supernode.log"
        until(lambda: log.is_file() and "SuperNode ID" in log.read_text(), "the bare node")
        control.StartRun(
            StartRunRequest(fab=Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content))
        )
        until((tmp_path / "bare/obeyed").exists, "the bare node to obey")
        for hospital in fleet.hospitals:
            until(lambda site=hospital: site.status()["gate"]["refused"] > before[site.name], "a refusal")
            assert hospital.status()["gate"]["last_refusal"] == "fab"
            assert not (hospital.home / "obeyed").exists()
    finally:
        control.close()
        bare.stop()


def test_a_bundle_that_was_tampered_with_is_thrown_away_and_the_coordinator_is_told_why(
    fleet: Fleet, phantom: bytes, tmp_path: Path, until: Callable[..., Any]
) -> None:
    store, site, folder = fleet.store, fleet.first, fleet.coordinator.home / "bundles"
    altered = bytearray(phantom)
    altered[len(altered) // 2] ^= 1

    def offered(name: str, bundle: bytes) -> int:
        source = tmp_path / f"{name}.medveil"
        source.write_bytes(bundle)
        offer = campaign_pb2.Offer(
            name=name, task="classification", method="salm", epsilon_255=8, mask_ratio=0.25,
            bundle_sha256=keep_bundle(folder, source), bundle_size_bytes=len(bundle), minimum_group_size=5,
        )  # fmt: skip
        now = datetime.now(UTC)
        number = operations.create_campaign(store, offer, (site.name,), None, now).plan.number
        if name == "exchanged":  # after it was signed into the offer
            (folder / f"{offer.bundle_sha256.hex()}.medveil").write_bytes(altered)
        operations.offer_campaign(store, number, now, "ready")
        return number

    signed_by_nobody, exchanged = offered("altered", bytes(altered)), offered("exchanged", phantom)
    for number, code in ((signed_by_nobody, Code.BUNDLE_SIGNATURE), (exchanged, Code.BUNDLE_DIGEST)):
        until(
            lambda n=number: site.name in store.deliveries(n) and store.deliveries(n)[site.name].code,
            code.name,
        )
        assert store.deliveries(number)[site.name].code == code
        campaign = site.campaign(number)
        assert campaign.stage(bundle_held=False) is Stage.BUNDLE_REFUSED
        assert not site.bundles.holds(campaign.offer.bundle_sha256)
        assert not site.bundles.held_bytes(campaign.offer.bundle_sha256)
        assert not site.release(number).exists()
    word = fleet.coordinator.call("status", str(exchanged))["sites"][0]
    assert (word["state"], word["refusal"]) == ("accepted", "bundle-digest")
