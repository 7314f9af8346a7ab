from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medveil.models import cli
from medveil.models.bundle import ManifestDraft, fingerprint, generate_key, save_public_key, write_bundle
from medveil.models.cli_support import run_command
from medveil.models.errors import ExitCode


def medveil(*arguments: object) -> int:
    return run_command(cli.app, "medveil", [str(argument) for argument in arguments])


def words(facts: object) -> list[str]:
    """Every text and whole number of a JSON value, names included."""
    if isinstance(facts, dict):
        return [w for name, value in facts.items() for w in (name.replace("_", " "), *words(value))]
    if isinstance(facts, list):
        return [w for value in facts for w in words(value)]
    return [str(facts)] if isinstance(facts, str) or (isinstance(facts, int) and facts > 1) else []


def test_table_and_json_show_the_same(bundle_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert medveil("bundle", "inspect", bundle_file, "--format", "json") == ExitCode.OK
    facts = json.loads(capsys.readouterr().out)
    assert medveil("bundle", "inspect", bundle_file) == ExitCode.OK
    table = capsys.readouterr().out
    assert "\x1b" not in table
    for word in words(facts):
        assert word in table


@pytest.fixture
def admitted(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Graphs that were shown to the admission, which lets everything pass."""
    shown: list[bytes] = []
    monkeypatch.setattr(cli, "admit_in_child", lambda graph, role: shown.append(graph))
    return shown


def test_verify_names_signer_and_what_was_checked(
    bundle_file: Path,
    key: Ed25519PrivateKey,
    admitted: list[bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_public_key(tmp_path / "coordinator.pub", key.public_key())
    for option, value in (
        ("--trusted-key", tmp_path / "coordinator.pub"),
        ("--trusted-signer", fingerprint(key.public_key()).lower()),
    ):
        assert medveil("bundle", "verify", bundle_file, option, value, "--format", "json") == ExitCode.OK
        facts = json.loads(capsys.readouterr().out)
        assert (facts["intact"], facts["signer_trusted"], facts["golden_vectors"]) == (True, True, 1)
        assert facts["graphs_admitted"] == 2
        assert facts["signer"] == fingerprint(key.public_key())
    assert admitted == [b"one graph", b"other"] * 2


def test_verify_refuses_a_signed_bundle_whose_graph_no_site_would_run(
    bundle_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medveil("bundle", "verify", bundle_file) == ExitCode.REFUSED
    assert capsys.readouterr().out == ""


def test_without_a_trusted_signer_the_screen_asks_to_compare(
    bundle_file: Path, admitted: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("inspect", "verify"):
        assert medveil("bundle", command, bundle_file) == ExitCode.OK
        assert "compare the signer's fingerprint" in capsys.readouterr().out


def test_wrong_bundles_and_keys_end_with_their_exit_code(
    bundle_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_public_key(tmp_path / "other.pub", generate_key().public_key())
    assert (
        medveil("bundle", "verify", bundle_file, "--trusted-key", tmp_path / "other.pub") == ExitCode.REFUSED
    )
    assert "[unknown-signer]" in capsys.readouterr().err
    assert medveil("bundle", "verify", tmp_path / "nothing") == ExitCode.INPUT
    assert medveil("bundle", "verify", bundle_file, "--trusted-key", bundle_file) == ExitCode.CONFIGURATION
    bundle_file.write_bytes(bundle_file.read_bytes()[:-1])
    assert medveil("bundle", "inspect", bundle_file) == ExitCode.REFUSED
    assert "[truncated]" in capsys.readouterr().err


def test_a_class_name_is_not_markup(
    bundle_file: Path, draft: ManifestDraft, key: Ed25519PrivateKey, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = (
        draft.taxonomy.classes[0].model_copy(update={"name": "[bold]x[/bold]"}),
        draft.taxonomy.classes[1],
    )
    renamed = draft.model_copy(update={"taxonomy": draft.taxonomy.model_copy(update={"classes": classes})})
    write_bundle(bundle_file, renamed, {"first": b"1", "second": b"2"}, {}, key)
    assert medveil("bundle", "inspect", bundle_file) == ExitCode.OK
    assert "[bold]x[/bold]" in capsys.readouterr().out
