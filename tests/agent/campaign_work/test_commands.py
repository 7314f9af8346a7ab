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

from medveil.agent.cli import app
from medveil.agent.joining import identity_file
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
    for words in ("waiting-for-steward", "stopped", "last accepted never", "epsilon 8/255, mask 0.25"):
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
