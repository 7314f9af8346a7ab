"""The commands of both sides, against each other."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from medveil.agent import joining_cli
from medveil.coordinator import campaign_cli, operations
from medveil.coordinator.campaign import CampaignState
from medveil.coordinator.pki import load_authority
from medveil.coordinator.status_service import StatusServer
from medveil.coordinator.store import Store
from medveil.models.cli_support import new_app, run_command
from medveil.models.errors import ExitCode
from medveil.protos.v1 import campaign_pb2, figures_pb2, status_pb2


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow screen breaks its cells over several lines
    apps = {"agent": new_app("agent"), "coordinator": new_app("coordinator")}
    joining_cli.register(apps["agent"])
    campaign_cli.register(apps["coordinator"])

    def call(side: str, *arguments: object, expect: ExitCode = ExitCode.OK, plain: bool = False) -> Any:
        monkeypatch.setenv("MEDVEIL_HOME", str(tmp_path / side))
        words = [str(argument) for argument in arguments] + ([] if plain else ["--format", "json"])
        assert run_command(apps[side], side, words) == expect
        out = capsys.readouterr().out
        return out if plain else json.loads(out)

    return call


@pytest.fixture
def coordinator(run: Any, tmp_path: Path) -> Any:
    run("coordinator", "init")
    with Store(tmp_path / "coordinator" / "coordinator.sqlite") as store:
        server = StatusServer(store, load_authority(tmp_path / "coordinator" / "authority"), ["127.0.0.1"])
        ports = server.start("127.0.0.1")
        yield [f"127.0.0.1:{port}" for port in ports]
        server.stop(0.2)


def test_a_site_joins_with_the_printed_token_and_its_log_shows_what_it_sent(
    run: Any, coordinator: Any, tmp_path: Path
) -> None:
    campaign_port, enrolment_port = coordinator
    told = run("coordinator", "invite", "st-anna")
    join = ("join", enrolment_port, "--token", told["token"], "--fingerprint", told["authority_fingerprint"])
    assert run("agent", *join)["site"] == "st-anna"
    assert run("agent", "renew", campaign_port)["site"] == "st-anna"
    sent = run("agent", "egress", "log")
    assert [line["method"].rpartition("/")[2] for line in sent] == ["Join", "Renew"]
    assert sent[0]["message"]["token"] == told["token"]
    assert run("agent", "egress", "verify")["changed_line"] is None
    log = tmp_path / "agent" / "federation" / "egress.jsonl"
    log.write_bytes(log.read_bytes().replace(b"/Join", b"/Jojn"))
    assert run("agent", "egress", "verify", expect=ExitCode.REFUSED)["changed_line"] == 1


def test_a_site_without_a_connection_joins_by_files_and_a_swapped_key_is_refused(
    run: Any, coordinator: Any, tmp_path: Path
) -> None:
    asked = run("agent", "join", "--request", tmp_path / "request.json")
    approve = ("approve", "island", tmp_path / "request.json", "--out", tmp_path / "accept.json")
    swapped = "-".join(["AAAA"] * 8)
    error = run("coordinator", *approve, "--fingerprint", swapped, expect=ExitCode.CONFIGURATION)["error"]
    assert error["code"] == "fingerprint"
    told = run("coordinator", *approve, "--fingerprint", asked["key_fingerprint"].lower())
    accept = ("join", "--accept", tmp_path / "accept.json", "--fingerprint", told["authority_fingerprint"])
    assert run("agent", *accept)["site"] == "island"


def test_a_campaign_is_moved_on_by_hand_and_a_step_outside_the_table_is_refused(
    run: Any, coordinator: Any
) -> None:
    bundle = files("medveil.agent.demo") / "phantom.medveil"
    create = ("campaign", "create", "chest", "--site", "a", "--bundle", bundle, "--minimum-group-size", 5)
    assert run("coordinator", *create) == {"campaign": 1, "state": "draft"}
    assert run("coordinator", *create, expect=ExitCode.CONFIGURATION)["error"]["code"] == "campaign-exists"
    assert run("coordinator", "campaign", "offer", 1)["state"] == "offered"
    refused = run("coordinator", "campaign", "seal", 1, expect=ExitCode.CONFIGURATION)
    assert refused["error"]["code"] == "campaign-state"
    run("coordinator", "campaign", "waive", 1, "a", "--by", "Dr B", "--reason", "closed")
    assert run("coordinator", "campaign", "abort", 1, "--reason", "test")["state"] == "aborted"
    assert "aborted" in run("coordinator", "watch", 1, plain=True)


def test_the_screen_and_the_json_say_the_same_and_withheld_is_not_zero(
    run: Any, coordinator: Any, tmp_path: Path
) -> None:
    _, enrolment_port = coordinator
    told = run("coordinator", "invite", "a")
    join = ("join", enrolment_port, "--token", told["token"], "--fingerprint", told["authority_fingerprint"])
    run("agent", *join)
    with Store(tmp_path / "coordinator" / "coordinator.sqlite") as store:
        now = campaign_cli._now()
        offer = campaign_pb2.Offer(name="chest", minimum_group_size=5)
        operations.create_campaign(store, offer, ("a", "absent"), None, now)
        assert operations.offer_campaign(store, 1, now, "r").state is CampaignState.OFFERED
        beat = status_pb2.Beat(
            activity=status_pb2.ACTIVITY_STOPPED,
            trouble=status_pb2.TROUBLE_DISK_FULL,
            images=figures_pb2.Count(exact=100),
            done=figures_pb2.Count(suppressed=figures_pb2.SUPPRESSION_GROUP_TOO_SMALL),
        )
        store.record_contact("a", now, beat.SerializeToString())
    value = run("coordinator", "status", 1)
    a, absent = value["sites"]
    assert (a["trouble"], a["images"], a["left_s"]) == ("disk-full", {"exact": 100}, None)
    assert a["done"] == {"suppressed": "group-too-small"}
    assert (absent["last_contact"], absent["images"], absent["state"]) == (None, None, "invited")
    assert not value["complete"]
    screen = run("coordinator", "status", 1, plain=True)
    assert "\x1b" not in screen
    row = next(line for line in screen.splitlines() if "disk-full" in line)
    assert "withheld / 100" in row
    assert "365 days" in row or "364 days" in row
    assert "never" in next(line for line in screen.splitlines() if "absent" in line)
