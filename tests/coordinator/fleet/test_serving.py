"""What a running coordinator says: every change once, and ready only when everything it needs is."""

from __future__ import annotations

from typing import Any

import pytest

from medveil.coordinator.fleet.layout import Layout
from medveil.coordinator.fleet.serving import _environment, _Told
from medveil.models.child_processes import Standing


def standing(name: str, *, ready: bool, restarts: int = 0) -> Standing:
    return Standing(name, 1, restarts, -9 if restarts else None, 0.0, ready)


@pytest.fixture
def said() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def told(said: list[dict[str, Any]]) -> _Told:
    return _Told(said.append, {"fleet_port": 8453})


def test_ready_is_said_once_and_only_when_every_program_is(told: _Told, said: list[dict[str, Any]]) -> None:
    for both in ((False, False), (True, False), (True, True), (True, True)):
        told.programs((standing("superlink", ready=both[0]), standing("superexec", ready=both[1])))
    assert said == [
        {"event": "waiting", "for": ["superlink", "superexec"]},
        {"event": "waiting", "for": ["superexec"]},
        {"event": "ready", "fleet_port": 8453},
    ]


def test_a_restart_is_named_and_takes_ready_back(told: _Told, said: list[dict[str, Any]]) -> None:
    told.programs((standing("superlink", ready=True),))
    told.programs((standing("superlink", ready=False, restarts=1),))
    told.programs((standing("superlink", ready=True, restarts=1),))
    assert [event["event"] for event in said] == ["ready", "restarted", "waiting", "ready"]
    assert said[1] == {"event": "restarted", "program": "superlink", "exit_status": -9}


def test_sites_come_and_go_by_name(told: _Told, said: list[dict[str, Any]]) -> None:
    for present in ({"a"}, {"a"}, {"a", "b"}, {"b"}):
        told.sites(frozenset(present))
    assert [(event["event"], event["site"]) for event in said] == [
        ("site-present", "a"),
        ("site-present", "b"),
        ("site-away", "a"),
    ]


def test_trouble_is_said_once_until_it_is_over(told: _Told, said: list[dict[str, Any]]) -> None:
    for code in ("", "store-failed", "store-failed", "", "store-failed"):
        told.trouble(code)
    assert said == [{"event": "trouble", "code": "store-failed"}] * 2


def test_children_inherit_nothing_and_phone_nobody(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("SECRET", "x")
    environment = _environment(Layout(tmp_path))
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_HOME"].startswith(str(tmp_path))
    assert not {name for name in environment if "PROXY" in name.upper() or name == "SECRET"}
