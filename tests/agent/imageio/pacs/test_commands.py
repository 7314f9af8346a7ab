"""``medveil-agent pacs`` against a real Orthanc: what comes in is protected, goes back, and is believed when read."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")


from medveil.agent.cli import app
from medveil.agent.imageio.pacs import Inbox
from medveil.agent.pacs_policy import PacsPolicy
from medveil.agent.pacs_service import Event, Work, open_service, read_labels
from medveil.agent.policy import load_policy
from medveil.agent.preparation import Wishes
from medveil.models.cli_support import run_command
from medveil.models.errors import InputError

BUNDLE = Path(str(files("medveil.agent.demo") / "phantom.medveil"))
STUDY, SERIES, NOTES = "1.2.3.4", "1.2.3.4.1", "1.2.3.4.2"

MakeObject = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("home")


def fill(orthanc: Any, make_object: MakeObject) -> list[pydicom.FileDataset]:
    """Put two slices and a note that refers to one of them into the PACS; return the slices."""
    slices = [make_object(1), make_object(2, syntax=uids.JPEG2000Lossless)]
    for path in (*slices, make_object(1, series=2, companion=True)):
        orthanc.put(path)
    return [pydicom.dcmread(path) for path in slices]


@pytest.mark.parametrize("ways", [("web",), ("dicom", "receive")], ids=["dicomweb", "dimse"])
def test_a_study_is_pulled_protected_pushed_and_read_back(
    orthanc: Any,
    make_object: MakeObject,
    policy: Any,
    labels: Path,
    agent: Any,
    tmp_path: Path,
    ways: tuple[str, ...],
) -> None:
    originals = fill(orthanc, make_object)
    rules = policy(orthanc, *ways)
    for series, count in ((SERIES, 2), (NOTES, 1)):
        code, (report,), _ = agent("pull", STUDY, series, "--policy", rules)
        assert (code, report) == (0, {"listed": count, "missing": 0, "rejected": {}})
    code, events, _ = agent("run", "--once", "--bundle", BUNDLE, "--labels", labels, "--policy", rules)
    assert code == 0
    (protected,) = (event for event in events if event["event"] == "protected")
    assert protected == {
        "event": "protected",
        "verified": 2,
        "not_protectable": 0,
        "quarantined": 0,
        "code": "",
    }
    _, (report,), _ = agent("status", "--policy", rules)
    assert report["received"] == {"arriving": 0, "open": 0, "ready": 3, "rejected": 0}
    assert report["delivery"] == {"queued": 0, "sent": 0, "verified": 3, "refused": 0, "differs": 0}

    held = orthanc.objects(tmp_path)
    assert len(held) == 6
    new = [dataset for uid, dataset in held.items() if not uid.startswith("1.2.3.4.")]
    pictures = [dataset for dataset in new if dataset.Modality == "CT"]
    for original in originals:
        (copy,) = (
            dataset
            for dataset in pictures
            if dataset.SourceImageSequence[0].ReferencedSOPInstanceUID == original.SOPInstanceUID
        )
        difference = copy.pixel_array.astype(int) - original.pixel_array
        assert 0 < np.count_nonzero(difference) <= 0.25 * difference.size
    (note,) = (dataset for dataset in new if dataset.Modality == "KO")
    referenced = note.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    assert referenced in {dataset.SOPInstanceUID for dataset in pictures}

    code, events, _ = agent("run", "--once", "--bundle", BUNDLE, "--labels", labels, "--policy", rules)
    assert code == 0
    assert {event["event"] for event in events} <= {"listening"}, "nothing is done twice"
    assert len(orthanc.instances()) == 6


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def test_the_service_protects_what_the_pacs_sends_until_it_is_told_to_stop(
    orthanc: Any, make_object: MakeObject, policy: Any, start_service: Any, agent: Any
) -> None:
    fill(orthanc, make_object)
    rules = policy(orthanc, "web", "receive", quiet_s=1, keep_received=False)
    service = start_service(rules)
    code, _, said = agent("pull", STUDY, SERIES, "--policy", rules)
    assert (code, "busy" in said or "works on" in said) == (7, True)
    assert orthanc.send_to_agent()

    def verified() -> int:
        return int(agent("status", "--policy", rules)[1][0]["delivery"]["verified"])

    wait_for(lambda: verified() == 3, "three objects verified")
    wait_for(
        lambda: agent("status", "--policy", rules)[1][0]["received"]["ready"] == 0,
        "what is safely in the PACS is let go",
    )
    service.send_signal(signal.SIGTERM)
    assert service.wait(timeout=60) == 0
    assert len(orthanc.instances()) == 6


def test_a_release_is_pushed_and_pushing_it_again_sends_nothing(
    orthanc: Any, make_object: MakeObject, policy: Any, labels: Path, agent: Any, tmp_path: Path
) -> None:
    rules = policy(orthanc, "dicom")
    source = tmp_path / "source" / "clear"
    source.mkdir(parents=True)
    make_object(1).rename(source / "1.dcm")
    release = tmp_path / "release"
    arguments = ["protect", str(source.parent), "--out", str(release), "--bundle", str(BUNDLE)]
    assert run_command(app, "medveil-agent", arguments) == 0
    for sent in (True, False):
        code, (report,), text = agent("push", release, "--policy", rules)
        assert (code, report["delivery"]["verified"]) == (0, 1)
        assert ("delivered" in text) is sent
    assert len(orthanc.instances()) == 1


class Nothing:
    """A PACS of which nothing is needed."""

    dicom_port, http_port, agent_port = 104, 80, 0


@pytest.fixture
def received(policy: Any, make_object: MakeObject, tmp_path: Path) -> PacsPolicy:
    """The door of a PACS that can't be reached, with one complete series behind it."""
    settings = load_policy(policy(Nothing(), "web")).pacs
    assert settings is not None
    inbox = Inbox(settings.folder / "inbox", minimum_free_bytes=0, maximum_used=1.0)
    for number in (1, 2):
        inbox.accept(f"{SERIES}.{number}", make_object(number).read_bytes())
    return settings


def events_of(settings: PacsPolicy, work: Work) -> list[Event]:
    found: list[Event] = []
    with open_service(settings) as service:
        service.run(work, threading.Event(), found.append, once=True)
    return found


def test_a_study_without_a_label_waits_for_one(received: PacsPolicy, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("uid,label\n9.9,clear\n")
    work = Work(Wishes(BUNDLE), table)
    assert [event.code for event in events_of(received, work)[1:]] == ["missing-label"]
    table.write_text(f"uid,label\n{STUDY},nodules\n{SERIES}.2,clear\n")
    named = {event.what: event for event in events_of(received, work)}
    assert named["protected"].counts == {"verified": 2, "not_protectable": 0, "quarantined": 0}
    assert named["outage"].code == "pacs-unreachable"
    copied = (received.folder / "releases" / f"{STUDY}.labels.csv").read_text().split()
    assert copied == ["file,label", f"{SERIES}/{SERIES}.1.dcm,nodules", f"{SERIES}/{SERIES}.2.dcm,clear"]


def test_a_study_that_the_disk_does_not_take_keeps_nothing_else_waiting(
    received: PacsPolicy, labels: Path, make_object: MakeObject
) -> None:
    blocked = received.folder / "releases" / STUDY / "notes.txt"
    blocked.parent.mkdir(mode=0o700, parents=True)
    blocked.write_text("lies where the release of this study should go")
    other = make_object(7, StudyInstanceUID="1.2.3.5", SeriesInstanceUID="1.2.3.5.1")
    Inbox(received.folder / "inbox", minimum_free_bytes=0, maximum_used=1.0).accept(
        f"{SERIES}.7", other.read_bytes()
    )
    labels.write_text(labels.read_text() + "1.2.3.5,clear\n")
    events = events_of(received, Work(Wishes(BUNDLE), labels))
    assert [(event.what, event.code) for event in events if event.what in ("failed", "protected")] == [
        ("failed", "foreign-files"),
        ("protected", ""),
    ]
    blocked.unlink()
    events = events_of(received, Work(Wishes(BUNDLE), labels))
    (protected,) = (event for event in events if event.what == "protected")
    assert protected.counts["verified"] == 2


def test_under_another_policy_a_study_that_went_out_already_is_left_as_it_is(
    received: PacsPolicy, make_object: MakeObject, labels: Path
) -> None:
    events_of(received, Work(Wishes(BUNDLE), labels))
    inbox = Inbox(received.folder / "inbox", minimum_free_bytes=0, maximum_used=1.0)
    inbox.accept(f"{SERIES}.3", make_object(3).read_bytes())
    failed = [e for e in events_of(received, Work(Wishes(BUNDLE, epsilon=4.0), labels)) if e.what == "failed"]
    assert [event.code for event in failed] == ["settings-changed"]
    assert len(list((received.folder / "releases" / STUDY).rglob("*.dcm"))) == 2


def test_a_policy_without_a_pacs_keeps_the_door_shut(agent: Any, tmp_path: Path) -> None:
    rules = tmp_path / "policy.toml"
    rules.write_text("maximum_epsilon = 8.0\n")
    for command in (("status",), ("retry",), ("receive",), ("pull", STUDY, SERIES)):
        code, _, said = agent(*command, "--policy", rules)
        assert (code, "[pacs]" in said) == (2, True)


def test_what_a_policy_does_not_name_is_not_used(agent: Any, policy: Any) -> None:
    rules = policy(Nothing(), "dicom")
    for command in (("receive",), ("pull", STUDY, SERIES)):
        code, _, said = agent(*command, "--policy", rules)
        assert (code, "[pacs.receive]" in said) == (2, True)
    code, _, said = agent("pull", STUDY, SERIES, "--policy", policy(Nothing()))
    assert (code, "[pacs.dicom]" in said) == (2, True)


def test_without_the_network_libraries_the_command_says_what_to_install(
    agent: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name
        for name in sys.modules
        if name.startswith(("medveil.agent.pacs_service", "medveil.agent.imageio.pacs"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pynetdicom", None)
    code, _, said = agent("status", "--policy", policy(Nothing(), "web"))
    assert (code, "[dicom-net]" in said) == (2, True)


def test_the_policy_names_secrets_and_prints_none(tmp_path: Path) -> None:
    rules = tmp_path / "policy.toml"
    rules.write_text(
        f'[pacs]\nfolder = "{tmp_path}"\n[pacs.web]\nurl = "https://pacs.example"\n'
        'user = "agent"\npassword = "canary-secret"\n'
    )
    policy = load_policy(rules)
    assert "canary-secret" not in repr(policy) + policy.model_dump_json()
    assert policy.digest() == load_policy(None).digest(), "who the PACS is does not change a release"


@pytest.mark.parametrize(
    ("text", "code"), [("uid;label\n1;2\n", "labels-columns"), ("\xff", "labels-unreadable")]
)
def test_a_bad_labels_file_is_named(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as refused:
        read_labels(tmp_path / "labels.csv")
    assert refused.value.code == code
