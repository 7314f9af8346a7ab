"""The commands around a running coordinator that need no Flower."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest

from medveil.coordinator import campaign_cli
from medveil.coordinator.fleet.bundles import read_part
from medveil.coordinator.store import Store
from medveil.models.cli_support import new_app, run_command
from medveil.models.errors import ExitCode
from medveil.protos.v1 import campaign_pb2


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    app = new_app("coordinator")
    campaign_cli.register(app)

    def run(*words: object, expect: ExitCode = ExitCode.OK) -> Any:
        line = [*map(str, words), "--home", str(tmp_path / "home"), "--format", "json"]
        assert run_command(app, "coordinator", line) == expect
        return json.loads(capsys.readouterr().out)

    return run


def test_a_campaign_keeps_its_bundle_whatever_becomes_of_the_file(call: Any, tmp_path: Path) -> None:
    source = tmp_path / "given.medveil"
    with as_file(files("medveil.agent.demo") / "phantom.medveil") as shipped:
        content = shipped.read_bytes()
    source.write_bytes(content)
    call("init")
    call("campaign", "create", "chest", "--site", "a", "--bundle", source, "--minimum-group-size", 5)
    source.unlink()
    with Store(tmp_path / "home" / "coordinator.sqlite") as store:
        offer = campaign_pb2.Offer.FromString(store.offer(1)[0])
    kept = read_part(tmp_path / "home" / "bundles", offer.bundle_sha256, 0)
    assert kept == content
    assert offer.bundle_size_bytes == len(content)


def test_running_without_an_authority_says_what_to_do(call: Any) -> None:
    answer = call("run", "--name", "localhost", expect=ExitCode.CONFIGURATION)
    assert answer["error"]["code"] == "no-authority"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"event": "waiting", "for": ["superlink", "superexec"]}, "waiting for superlink, superexec"),
        ({"event": "ready", "fleet_port": 8453}, "ready fleet port 8453"),
        ({"event": "site-present", "site": "st-anna"}, "site present st-anna"),
        ({"event": "stopping"}, "stopping"),
    ],
)
def test_events_read_as_sentences(
    event: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign_cli._tell_plainly(event)
    assert capsys.readouterr().out.rstrip("\n").split(" ", 1)[1] == line
