"""The whole campaign on loopback: a coordinator, Flower, three agents, gRPC; no network beyond and no torch."""

from __future__ import annotations

import pytest

from medveil.agent.demo import sites
from medveil.agent.demo.federation import show_campaign
from medveil.agent.reporting_log import sent_messages, verify_log


class Steps:
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def step(self, text: str) -> None:
        self.said.append(text)

    def images(self, done: int, total: int) -> None:
        assert done <= total


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_hospitals_take_part_from_joining_to_sealing(tmp_path, monkeypatch):
    monkeypatch.setattr(sites, "_PHANTOMS", 90)  # too few for every site's check, which says so by name
    shown = show_campaign(tmp_path / "demo", None, None, Steps())
    assert shown["campaign"]["state"] == "sealed"
    assert [site["state"] for site in shown["campaign"]["sites"]] == ["verified"] * 3
    assert sum(site["verified"] for site in shown["sites"]) == 90
    assert all(site["report"] == "accepted" for site in shown["sites"])
    for site in shown["sites"]:
        assert (site["check"] is None) == (site["check_refused"] is not None)
        home = tmp_path / "demo" / site["site"] / "home"
        log = home / "federation" / "egress.jsonl"
        assert verify_log(log).changed_line is None
        calls = {message.method.rpartition("/")[2] for message in sent_messages(log)}
        assert {"Join", "SendBeat", "AnswerOffer", "SubmitReport", "activate-node", "push-object"} <= calls
        everything = b"".join(message.payload for message in sent_messages(log))
        for canary in (b"Phantom", b".dcm", b"2.25.", b"clear", str(tmp_path).encode()):
            assert canary not in everything
