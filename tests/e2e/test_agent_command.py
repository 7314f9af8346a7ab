"""What a data steward types: results, refusals and exit codes as documented."""

from __future__ import annotations

import fcntl
import hashlib
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.agent.workspace import private_beside

SUMMARY_KEYS = {
    "images",
    "verified",
    "quarantined",
    "quarantined_by_reason",
    "not_protectable",
    "psnr_db",
    "epsilon_max",
    "changed_share",
    "mask",
    "seconds",
    "images_per_s",
    "signer",
    "bundle_sha256",
    "exit_code",
    "exit_meaning",
}


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def protect(agent, bundle, source, tmp_path):
    """Run `protect` with JSON output; by default on the whole source and in this process."""

    def run(*more, source=source, out="out", bundle_file=bundle.path, using=agent, **options):
        folders = (source, "--out", tmp_path / out)
        return using("protect", *folders, "--bundle", bundle_file, "--format", "json", *more, **options)

    return run


@pytest.fixture
def many(tmp_path: Path, rng: np.random.Generator) -> Path:
    """An NPZ that takes some seconds and some hundred kilobytes."""
    images = rng.integers(30, 220, (1000, 12, 12), np.uint8)
    np.savez(tmp_path / "many.npz", train_images=images, train_labels=rng.integers(0, 2, (1000, 1), np.uint8))
    return tmp_path / "many.npz"


def test_all_verified_is_0_and_every_original_comes_back(
    protect, agent, agent_process, bundle, source, tmp_path
):
    done = protect(using=agent_process)
    assert done.code == 0
    assert done.json.keys() >= SUMMARY_KEYS
    assert (done.json["images"], done.json["verified"]) == (6, 6)
    assert done.json["signer"] == bundle.signer
    assert 0 < done.json["epsilon_max"] <= 8
    assert "back it up" in done.stderr.lower()
    assert set(tree(tmp_path / "out")) == {
        *(f"{c}/{name}" for c in ("NORMAL", "PNEUMONIA") for name in ("0.png", "1.png", "photo.png")),
        "medveil-release.json",
    }
    assert {"ledger.sqlite", "contact_sheet.png", "summary.json"} <= set(tree(tmp_path / "out.private"))
    for name in ("NORMAL/0.png", "PNEUMONIA/1.png"):
        clean = np.asarray(PillowImage.open(source / name)).astype(int)
        change = np.asarray(PillowImage.open(tmp_path / "out" / name)).astype(int) - clean
        assert np.abs(change).max() == 8
        assert np.count_nonzero(change) <= 44  # ceil(0.3 * 144)

    again = protect()
    assert (again.code, again.json["finished_now"]) == (0, 0)

    back = agent("restore", tmp_path / "out", "--out", tmp_path / "back", "--format", "json")
    assert (back.code, back.json["restored"]) == (0, 6)
    assert (tmp_path / "back/NORMAL/photo.jpg").read_bytes() == (source / "NORMAL/photo.jpg").read_bytes()
    verify = agent("log", "verify", tmp_path / "out", "--format", "json")
    assert (verify.code, verify.json["intact"]) == (0, True)


def test_a_wrong_setting_is_2(protect, tmp_path):
    done = protect("--epsilon", "9")
    assert (done.code, done.json["error"]["code"]) == (2, "epsilon")
    assert not (tmp_path / "out").exists()


def test_something_left_out_is_3_and_a_repaired_file_can_be_tried_again(protect, agent, source, tmp_path):
    good = (source / "NORMAL/0.png").read_bytes()
    (source / "NORMAL/cut.png").write_bytes(good[:-20])
    done = protect()
    assert done.code == 3
    assert done.json["quarantined_by_reason"] == {"truncated": 1}
    listed = agent("quarantine", "list", tmp_path / "out", "--format", "json")
    assert [entry["file"] for entry in listed.json["quarantined"]] == ["NORMAL/cut.png"]
    (source / "NORMAL/cut.png").write_bytes(good)
    retried = agent("quarantine", "retry", tmp_path / "out", "--format", "json")
    assert (retried.code, retried.json["verified"]) == (0, 7)


def test_nothing_usable_is_4(protect, tmp_path):
    (tmp_path / "empty").mkdir()
    done = protect(source=tmp_path / "empty")
    assert (done.code, done.json["error"]["code"]) == (4, "nothing-found")


def test_where_nothing_was_protected_nothing_is_said_to_be(protect, agent, bundle, tmp_path):
    (tmp_path / "bad/NORMAL").mkdir(parents=True)
    (tmp_path / "bad/NORMAL/zero.png").touch()
    done = protect(source=tmp_path / "bad")
    assert (done.code, done.json["protection"]) == (4, "nothing was perturbed")
    shown = agent("protect", tmp_path / "bad", "--out", tmp_path / "out", "--bundle", bundle.path)
    assert "may be shared" in shown.stdout
    assert str(tmp_path / "out") not in shown.stdout.split("may be shared")[1].split("stays here")[0]


def test_an_altered_bundle_or_an_unknown_signer_is_5(protect, bundle, tmp_path):
    data = bytearray(bundle.path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.medveil").write_bytes(bytes(data))
    assert protect(bundle_file=tmp_path / "bad.medveil").code == 5
    (tmp_path / "policy.toml").write_text(
        'trusted_signers = ["ed25519:AAAA-BBBB-CCCC-DDDD-EEEE-FFFF-GGGG-2222"]'
    )
    done = protect("--policy", tmp_path / "policy.toml")
    assert (done.code, done.json["error"]["code"]) == (5, "unknown-signer")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_6_and_the_rerun_continues(protect, agent_process, many, tmp_path):
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

    done = protect(source=many, using=agent_process, preexec_fn=small_files_only)
    assert (done.code, done.json["error"]["code"]) == (6, "disk-full")
    assert not [name for name in tree(tmp_path / "out") if not name.startswith(".medveil-part-")]
    assert protect(source=many).code == 0
    assert protect(source=many, out="whole").code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_someone_elses_folder_is_6_and_stays_as_it_was(protect, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    done = protect()
    assert (done.code, done.json["error"]["code"]) == (6, "foreign-files")
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


def test_a_folder_in_use_is_7(protect, tmp_path):
    (tmp_path / "out.private").mkdir()
    with (tmp_path / "out.private/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert protect().code == 7


def test_an_interruption_is_130_and_after_any_the_rerun_ends_with_the_same_bytes(
    start_agent, protect, bundle, many, tmp_path
):
    for blow, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        out = tmp_path / f"after-{code}"
        process = start_agent("protect", many, "--out", out, "--bundle", bundle.path)
        spool = private_beside(out) / "spool"
        deadline = time.monotonic() + 60
        while not any(spool.glob("*.frames")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(blow)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in stderr
        assert protect(source=many, out=out.name).code == 0
    assert protect("--threads", "2", source=many, out="whole").code == 0
    whole = tree(tmp_path / "whole")
    assert tree(tmp_path / "after-130") == whole
    assert tree(tmp_path / f"after-{-signal.SIGKILL}") == whole


def test_doctor_protects_three_images_and_predicts_the_rest(agent, bundle, source, many, tmp_path):
    for what, images in ((source, 6), (many, 1000)):
        done = agent("doctor", what, "--bundle", bundle.path, "--out", tmp_path, "--format", "json")
        assert done.code == 0, done.stdout
        assert all(check["ok"] for check in done.json["checks"])
        assert done.json["forecast"]["images"] == images
        assert done.json["forecast"]["hours"] > 0
        surrogates = next(check for check in done.json["checks"] if check["name"] == "surrogates")
        assert "none of them a golden vector" in surrogates["detail"]  # this bundle has none
        assert "run on cpu" in surrogates["detail"] or "run on cuda" in surrogates["detail"]
    assert not (tmp_path / "out").exists()


def test_doctor_ends_with_the_code_of_what_is_wrong(agent, bundle, source, tmp_path):
    bad = tmp_path / "bad.medveil"
    bad.write_bytes(bundle.path.read_bytes()[:-1])
    done = agent("doctor", source, "--bundle", bad, "--format", "json")
    assert done.code == 5
    assert [check["name"] for check in done.json["checks"] if not check["ok"]] == ["bundle"]


def test_the_policy_says_what_this_site_calls_the_classes(agent, bundle, source, tmp_path):
    for own, theirs in (("healthy", "NORMAL"), ("ill", "PNEUMONIA")):
        (source / theirs).rename(source / own)
    command = (source, "--bundle", bundle.path, "--format", "json")
    tried = agent("doctor", *command)
    assert tried.code == 3
    trial = tried.json["checks"][-1]
    assert "unknown-class: 3" in trial["detail"]
    assert "table [classes]" in trial["detail"]
    policy = tmp_path / "site.toml"
    policy.write_text('[classes]\n"healthy" = "NORMAL"\n"ill" = "PNEUMONIA"\n')
    done = agent("protect", *command, "--out", tmp_path / "out", "--policy", policy)
    assert (done.code, done.json["verified"]) == (0, 6)


def test_a_command_loads_no_torch_no_network_client_and_no_reader_before_it_needs_one():
    unwanted = {"torch", "grpc", "flwr", "requests", "pydicom", "nibabel", "scipy", "onnxruntime"}
    program = f"import sys, medveil.agent.cli; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tables_have_no_colour_codes_when_nobody_looks(agent, bundle, source, tmp_path):
    done = agent("protect", source, "--out", tmp_path / "out", "--bundle", bundle.path)
    assert done.code == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "perturbed, not verified by a victim" in done.stdout
    assert "compare it with your coordinator" in done.stdout


def test_the_key_is_made_once_and_shown(agent, tmp_path):
    made = agent("key", "create", "--format", "json")
    shown = agent("key", "show", "--format", "json")
    assert made.json == shown.json
    assert made.json["recipient"].startswith("age1")
    assert agent("key", "create").code == 2
