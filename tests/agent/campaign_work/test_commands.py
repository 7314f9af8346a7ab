"""What the steward types: approve, decline, status; and what `run` refuses to begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from medveil.agent import campaigns_run
from medveil.agent.cli import app
from medveil.agent.joining import identity_file
from medveil.agent.reporting_policy import NoisePolicy
from medveil.coordinator.pki import Role, create_authority
from medveil.models.cli_support import run_command


@pytest.fixture
def joined(home: Path, tmp_path: Path) -> None:
    """The certificate of a site that has joined."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    now = datetime.now(UTC)
    issued = create_authority(tmp_path / "authority", now).issue_client(request, Role.SITE, "st-anna", now)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = identity_file(home / "federation")
    file.parent.mkdir(parents=True)
    file.write_bytes(private + issued.chain_pem)


@pytest.fixture
def agent(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*words: object) -> tuple[int, str]:
        code = run_command(app, "medveil-agent", [str(word) for word in words])
        return code, capsys.readouterr().out

    return call


def value(answer: tuple[int, str]) -> tuple[int, Any]:
    return answer[0], json.loads(answer[1])


def test_status_shows_what_waits_and_claims_nothing_that_no_ledger_holds(
    joined, agent, book, offer, write_policy
):
    policy = write_policy()
    book.offered(offer())
    code, status = value(agent("status", "--policy", policy, "--format", "json"))
    (campaign,) = status["campaigns"]
    assert (code, status["site"], status["agent"]) == (0, "st-anna", "stopped")
    assert (status["coordinator"]["last_accepted"], status["gate"], status["programs"]) == (None, None, [])
    assert (campaign["stage"], campaign["images"], campaign["verified"]) == ("waiting-for-steward", 0, 0)
    assert (campaign["bundle"]["trusted"], campaign["report"], campaign["psnr_db"]) == (False, None, None)

    code, screen = agent("status", "--policy", policy)
    assert code == 0
    assert "\x1b" not in screen
    for words in (
        "waiting-for-steward",
        "stopped",
        "no contact while the agent is stopped",
        "epsilon 8/255, mask 0.25",
    ):
        assert words in screen
    assert "verified" not in screen


def test_the_steward_answers_and_an_unknown_campaign_is_named(joined, agent, book, offer):
    assert value(agent("approve", 7, "--format", "json"))[1]["error"]["code"] == "no-campaign"
    book.offered(offer())
    assert value(agent("decline", 1, "--format", "json")) == (
        0,
        {"campaign": 1, "revision": 1, "name": "chest", "answer": "declined"},
    )
    assert agent("approve", 1) == (0, "accepted: campaign 1, chest\n")
    book.answer_sent(1)
    assert value(agent("decline", 1, "--format", "json"))[1]["error"]["code"] == "answered"


def test_a_name_that_would_steer_the_terminal_is_shown_as_text(joined, agent, book, offer, write_policy):
    book.offered(offer(name="\x1b[2Jchest\nfree"))
    assert "\x1b" not in agent("status", "--policy", write_policy())[1]


@pytest.mark.parametrize(
    ("table", "code"),
    [("egress", "no-egress-policy"), ("coordinator", "no-coordinator"), ("campaigns", "no-campaigns-policy")],
)
def test_run_begins_with_nothing_left_open(joined, agent, write_policy, table, code):
    policy = write_policy()
    kept = [part for part in policy.read_text().split("[") if not part.startswith(f"{table}]")]
    policy.write_text("[".join(kept))
    answer = value(agent("run", "--policy", policy, "--format", "json"))
    assert (answer[0], answer[1]["error"]["code"]) == (2, code)


def test_a_site_that_has_not_joined_is_told_so(agent, write_policy):
    for command in ("run", "status"):
        answer = value(agent(command, "--policy", write_policy(), "--format", "json"))
        assert (answer[0], answer[1]["error"]["code"]) == (2, "not-joined")
    assert value(agent("status", "--format", "json"))[1]["error"]["code"] == "no-policy"


def test_status_and_log_show_what_is_left_of_a_noise_budget(joined, agent, book, offer, write_policy):
    policy = write_policy()
    tables = policy.read_text()
    noise = NoisePolicy(epsilon_per_report=0.5, epsilon_total=1.2)
    log = ("egress", "log", "--policy", policy)

    def shown() -> Any:
        _, status = value(agent("status", "--policy", policy, "--format", "json"))
        (screen,) = [
            line for line in agent("status", "--policy", policy)[1].splitlines() if "noise" in line
        ] or [""]
        (line,) = [line for line in agent(*log)[1].splitlines() if "noise" in line] or [""]
        assert line.removeprefix("noise budget: ")[:20] in screen
        return status["noise_budget"], line

    assert shown() == (None, "")
    book.offered(offer())
    policy.write_text(tables + "[egress.noise]\nepsilon_per_report = 0.5\nepsilon_total = 1.2\n")
    assert shown()[0] == {"spent": 0, "left": 1.2, "total": 1.2, "per_report": 0.5}
    book.report_ready(1, 1, b"report", noise=noise)
    budget, line = shown()
    assert (budget["spent"], budget["left"]) == (0.5, 0.7)
    assert "0.7 left, 0.5 for each report" in line
    book.report_ready(1, 2, b"report", noise=noise)
    assert "0.2 left is less than a report takes (0.5): the next will have no figures" in shown()[1]
    policy.write_text(tables)
    assert shown() == (
        {"spent": 1, "left": None, "total": None, "per_report": None},
        "noise budget: epsilon 1 spent; the policy asks for no noise any more, so reports are exact",
    )


@pytest.mark.parametrize("output", ["table", "json"])
def test_run_says_its_trouble_and_goes_on(agent, write_policy, monkeypatch, output):
    def run(policy_file: Path, stopping: object, say: Callable[[dict[str, Any]], None]) -> None:
        say({"event": "ready", "site": "st-anna", "coordinator": "localhost:8451", "process": 1})
        say({"event": "trouble", "trouble": "disk-full", "message": "The disk is full."})

    monkeypatch.setattr(campaigns_run, "run", run)
    code, said = agent("run", "--policy", write_policy(), "--format", output)
    assert code == 0
    ready, trouble = said.splitlines()
    assert "st-anna" in ready
    assert "disk-full" in trouble
    if output == "json":
        assert [json.loads(line)["event"] for line in (ready, trouble)] == ["ready", "trouble"]
