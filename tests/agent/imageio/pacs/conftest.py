"""DICOM files built in memory, and a real Orthanc on loopback.

Orthanc 1.10.1 (Debian 12) listens on every address whatever it is told. HTTP is refused from outside
(`RemoteAccessAllowed`), DICOM from everyone but the one modality at 127.0.0.1 that it is told of.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import uid as uids
from pydicom.dataset import Dataset, FileMetaDataset

from medveil.agent.cli import app
from medveil.models.cli_support import run_command

with suppress(ModuleNotFoundError):  # without the extra [dicom-net] each test module skips, with its reason
    import httpx

    from medveil.agent.imageio.pacs import DicomPeer, Inbox, KnownSender, ReceiveSettings, WebPeer

_EXECUTABLE = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
_DICOMWEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
_COMMAND = (sys.executable, "-c", "import sys; from medveil.agent.cli import main; sys.exit(main())")
_BUNDLE = Path(str(files("medveil.agent.demo") / "phantom.medveil"))
_START_S = 90.0  # a loaded machine; alone it takes two seconds

MakeObject = Callable[..., Path]


@pytest.fixture
def make_object(tmp_path: Path) -> MakeObject:
    """Return a function that writes the n-th slice of a small CT series and returns its path."""
    folder = tmp_path / "objects"

    def write(
        number: int = 1,
        *,
        series: int = 1,
        seed: int | None = None,
        syntax: str = uids.ExplicitVRLittleEndian,
        companion: bool = False,
        **attributes: Any,
    ) -> Path:
        generator = np.random.default_rng(number if seed is None else seed)
        dataset = Dataset()
        dataset.SOPClassUID = uids.KeyObjectSelectionDocumentStorage if companion else uids.CTImageStorage
        dataset.SOPInstanceUID = f"1.2.3.4.{series}.{number}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.4", f"1.2.3.4.{series}"
        dataset.PatientName, dataset.PatientID = "Canary^Cora", "CANARY-7"
        dataset.Modality = "KO" if companion else "CT"
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = uids.ExplicitVRLittleEndian
        if companion:
            item = Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = uids.CTImageStorage, "1.2.3.4.1.1"
            dataset.ReferencedSOPSequence = [item]
        else:
            dataset.Rows = dataset.Columns = 32
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
            dataset.PixelRepresentation = 0
            dataset.PixelData = generator.integers(0, 4096, (32, 32), np.uint16).tobytes()
            dataset["PixelData"].VR = "OW"
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        if syntax != uids.ExplicitVRLittleEndian:
            plugin = "pyjpegls" if syntax == uids.JPEGLSLossless else "pylibjpeg"
            dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
        folder.mkdir(exist_ok=True)
        path = folder / f"{series}-{number}-{seed}-{syntax}.dcm"
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def make_inbox(tmp_path: Path) -> Callable[..., Inbox]:
    """Return a function that opens the inbox of this test, on a disk with plenty of room unless told."""

    def build(**settings: Any) -> Inbox:
        limits = {"minimum_free_bytes": 100, "maximum_used": 0.9, "disk_usage": lambda _: (1000, 100, 900)}
        return Inbox(tmp_path / "inbox", **(limits | settings))

    return build


@pytest.fixture
def receive_settings() -> ReceiveSettings:
    """A free port that one sender at 127.0.0.1 may use."""
    return ReceiveSettings(port=0, senders=(KnownSender(ae_title="ORTHANC", addresses=("127.0.0.1",)),))


@dataclass
class Orthanc:
    """One Orthanc server with a storage of its own, which outlives a kill."""

    folder: Path
    http_port: int = field(default_factory=lambda: _free_port())
    dicom_port: int = field(default_factory=lambda: _free_port())
    agent_port: int = field(default_factory=lambda: _free_port())
    process: subprocess.Popen[bytes] | None = None
    more_settings: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Start the server and wait until both of its services answer."""
        settings = {
            "Name": "test",
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "Plugins": [str(_DICOMWEB)],
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomAet": "ORTHANC",
            "DicomPort": self.dicom_port,
            "DicomCheckCalledAet": True,
            "DicomCheckModalityHost": True,
            "DicomAlwaysAllowEcho": False,
            "DicomAlwaysAllowStore": False,
            "DicomModalities": {
                "agent": {"AET": "MEDVEIL", "Host": "127.0.0.1", "Port": self.agent_port},
            },
            "OverwriteInstances": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            **self.more_settings,
        }
        (self.folder / "storage").mkdir(parents=True, exist_ok=True)
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(settings))
        with (self.folder / "orthanc.log").open("ab") as log:
            self.process = subprocess.Popen([_EXECUTABLE, str(path)], stdout=log, stderr=log)
        end = time.monotonic() + _START_S
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "orthanc.log").read_text()[-2000:]
            assert time.monotonic() < end, "Orthanc did not answer in time"
            time.sleep(0.1)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the server; SIGKILL stands for a power cut."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=60)
            self.process = None

    def instances(self) -> list[str]:
        """Return the SOP Instance UIDs that it holds, with repetitions if there were any."""
        rows = httpx.get(f"{self._url}/instances?expand", trust_env=False, timeout=60).json()
        return sorted(row["MainDicomTags"]["SOPInstanceUID"] for row in rows)

    def objects(self, folder: Path) -> dict[str, pydicom.FileDataset]:
        """Fetch everything that it holds into a folder; return it by SOP Instance UID."""
        found = {}
        for row in httpx.get(f"{self._url}/instances", trust_env=False, timeout=60).json():
            path = folder / f"{row}.dcm"
            answer = httpx.get(f"{self._url}/instances/{row}/file", trust_env=False, timeout=60)
            path.write_bytes(answer.content)
            dataset = pydicom.dcmread(path)
            found[str(dataset.SOPInstanceUID)] = dataset
        return found

    def send_to_agent(self) -> bool:
        """Send everything that it holds to our receive port, over one association; return whether all was taken."""
        rows = httpx.get(f"{self._url}/instances", trust_env=False, timeout=60).json()
        place = f"{self._url}/modalities/agent/store"
        return httpx.post(place, json=rows, trust_env=False, timeout=60).is_success

    def put(self, path: Path) -> None:
        """Store a file through Orthanc's own interface."""
        httpx.post(
            f"{self._url}/instances", content=path.read_bytes(), trust_env=False, timeout=60
        ).raise_for_status()

    def clear(self) -> None:
        """Forget everything."""
        for identifier in httpx.get(f"{self._url}/patients", trust_env=False, timeout=60).json():
            httpx.delete(f"{self._url}/patients/{identifier}", trust_env=False, timeout=60).raise_for_status()

    @property
    def dicom(self) -> DicomPeer:
        """The server as a DIMSE peer."""
        return DicomPeer(ae_title="ORTHANC", host="127.0.0.1", port=self.dicom_port)

    @property
    def web(self) -> WebPeer:
        """The server as a DICOMweb peer."""
        return WebPeer(url=f"{self._url}/dicom-web")

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def _answers(self) -> bool:
        try:
            ready = httpx.get(f"{self._url}/system", trust_env=False, timeout=5).is_success
            with socket.create_connection(("127.0.0.1", self.dicom_port), timeout=5):
                return ready
        except (httpx.HTTPError, OSError):
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _require_orthanc() -> None:
    if Path(_EXECUTABLE).exists() and _DICOMWEB.exists():
        return
    reason = "Orthanc is not installed (apt-get install orthanc orthanc-dicomweb)"
    if os.environ.get("MEDVEIL_REQUIRE_PACS"):
        pytest.fail(f"{reason}, and this run requires it")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared_orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """One server for all tests that do not hurt it."""
    _require_orthanc()
    server = Orthanc(tmp_path_factory.mktemp("orthanc"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def orthanc(shared_orthanc: Orthanc) -> Orthanc:
    """The shared server, empty."""
    shared_orthanc.clear()
    return shared_orthanc


@pytest.fixture
def mortal_orthanc(tmp_path: Path) -> Iterator[Orthanc]:
    """A running server of this test's own, to be killed."""
    _require_orthanc()
    server = Orthanc(tmp_path / "mortal")
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGKILL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site's own folder: never the developer's."""
    monkeypatch.setenv("MEDVEIL_HOME", str(tmp_path / "home"))


@pytest.fixture
def agent(home: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[Any], str]]:
    """Run a command in this process; return its exit code, its JSON values and all that it said."""

    def run(*arguments: object) -> tuple[int, list[Any], str]:
        capsys.readouterr()
        code = run_command(app, "medveil-agent", ["pacs", *map(str, arguments), "--format", "json"])
        said = capsys.readouterr()
        return code, list(_json_values(said.out)), said.out + said.err

    return run


def _json_values(text: str) -> Iterator[Any]:
    decoder, text = json.JSONDecoder(), text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        yield value
        text = text[end:].strip()


@pytest.fixture
def policy(tmp_path: Path) -> Callable[..., Path]:
    """Write a policy for an Orthanc and return its path."""

    def write(orthanc: Any, *ways: str, quiet_s: float = 0, keep_received: bool = True) -> Path:
        tables = {
            "dicom": f'ae_title = "ORTHANC"\nhost = "127.0.0.1"\nport = {orthanc.dicom_port}',
            "web": f'url = "http://127.0.0.1:{orthanc.http_port}/dicom-web"',
            "receive": f"port = {orthanc.agent_port}\nquiet_s = {quiet_s}\nminimum_free_bytes = 0\n"
            "maximum_used = 1.0\n"
            'senders = [{ ae_title = "ORTHANC", addresses = ["127.0.0.1"] }]',
        }
        path = tmp_path / "policy.toml"
        head = f'[pacs]\nfolder = "{tmp_path / "door"}"\nkeep_received = {str(keep_received).lower()}\n'
        path.write_text(head + "".join(f"[pacs.{way}]\n{tables[way]}\n" for way in ways))
        return path

    return write


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """A labels file that names the study."""
    path = tmp_path / "labels.csv"
    path.write_text("uid,label\n1.2.3.4,nodules\n")
    return path


@pytest.fixture
def start_service(
    home: None, policy: Callable[..., Path], labels: Path
) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Return a function that starts ``pacs run`` in a process of its own and waits until its port is open."""
    started = []

    def start(rules: Path) -> subprocess.Popen[str]:
        command = [*_COMMAND, "pacs", "run", "--bundle", _BUNDLE, "--labels", labels, "--policy", rules]
        service = subprocess.Popen(
            [*map(str, command), "--format", "json"],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        started.append(service)
        assert service.stdout is not None
        assert json.loads(service.stdout.readline())["event"] == "listening"
        return service

    yield start
    for service in started:
        service.kill()
        service.communicate()
