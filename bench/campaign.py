"""What a campaign costs on one machine: time, memory and bytes of a real one, and the coordinator under many sites.

    python bench/campaign.py [--sites 3,10] [--simulated 1000] [--work DIR]

The real part starts ``medveil-coordinator run`` and that many ``medveil-agent run`` on loopback, with drawn phantoms
and the shipped bundle, and follows the coordinator's own store from the offer to the last verified report. Then, in
a second campaign of one site, while the others idle, its agent and the coordinator are killed (SIGKILL) in the middle
of the work and started again. Memory is the proportional set size of every process: the largest that was seen while
sites worked, and what is left when nothing is left to do. The simulated part is the store and the gRPC services
alone, in a process of their own, under sites that send a beat every 10 s and report at once. Prints a table and
writes it to ``bench/results/campaign.{md,json}``; each real campaign's figures are kept in the work folder.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress
from datetime import UTC, datetime
from importlib.resources import as_file, files
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cohort import kept
from medveil.coordinator import operations
from medveil.coordinator.pki import create_authority, load_authority
from medveil.coordinator.status_service import StatusServer
from medveil.coordinator.store import Store
from medveil.coordinator.watch import status_value
from medveil.models.phantoms import draw
from medveil.protos.v1 import campaign_pb2, figures_pb2, report_pb2, status_pb2
from medveil.protos.v1.conventions import methods
from report import markdown_table, write

IMAGES = 60
MANY_IMAGES = 1500
"""At the site whose agent is killed: enough to be killed in the middle."""
SIDE = 32
SANDBOX = "admission of graphs"
SETTLING_S = 15.0
LOOK_EVERY_S = 3.0
PATIENCE_S = 900.0
PORTS = {"campaign": 21451, "enrolment": 21452, "fleet": 21453, "superlink": 21454}
"""Below the range of outgoing connections; any four free ones would do."""
BEAT_EVERY_S = 10.0
PACED_S = 20.0
CALLERS = 16
SCRIPTS = Path(sysconfig.get_path("scripts"))


# A real campaign
# ------------------------------------------------------------------------------------------------


def real(sites: int, work: Path) -> dict[str, Any]:
    """Run two campaigns of that many sites and return what they took."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    home = work / "coordinator"
    command("medveil-coordinator", home, "init")
    figures: dict[str, Any] = {"sites": sites, "images": IMAGES * sites}
    names = [f"site-{number}" for number in range(1, sites + 1)]
    with Running(work) as running, Store(home / "coordinator.sqlite") as store:
        figures["ready_s"] = took(running.coordinator)
        for site in names:
            join(work, store, site)
        begun = time.monotonic()
        for site in names:
            running.agent(site)
        until(lambda: running.said("coordinator").count('"site-present"') >= sites)
        figures["present_s"] = time.monotonic() - begun

        with as_file(files("medveil.agent.demo") / "phantom.medveil") as bundle, Memory(running) as memory:
            figures["bundle_bytes"] = bundle.stat().st_size
            begun = time.monotonic()
            offer(home, 1, names, bundle)
            until(lambda: held(store) == sites)
            figures["bundle_everywhere_s"] = time.monotonic() - begun
            until(lambda: operations.campaign_status(store, 1, now()).complete)
            figures["all_verified_s"] = time.monotonic() - begun
            until(lambda: not store.open_rounds())
            figures["working_memory_mib"] = memory.largest
            figures["working_memory_mib_all"] = memory.largest_sum
            time.sleep(SETTLING_S)
            idle = memory.now()
        figures["idle_memory_mib"] = idle
        figures["idle_memory_mib_all"] = sum(map(sum, idle.values()))
        figures["report_bytes"] = [len(report.payload) for report in store.reports(1)]
        figures["sent_bytes"] = [site["egress_bytes"] for site in status_value(store, 1, now())["sites"]]
        figures["status_ms"] = [1e3 * took(lambda: status_value(store, 1, now())) for _ in range(20)]
        figures["status_command_s"] = took(lambda: command("medveil-coordinator", home, "status", "1"))
        figures |= killed_and_restarted(running, store, work, names)
        figures["load"] = os.getloadavg()[1]
    return figures


def killed_and_restarted(running: Running, store: Store, work: Path, names: list[str]) -> dict[str, float]:
    """Kill an agent and then the coordinator in mid-campaign; return how long they and the campaign take to go on."""
    home, victim = work / "coordinator", names[0]
    draw_images(work / f"{victim}.npz", MANY_IMAGES, seed=99)
    with as_file(files("medveil.agent.demo") / "phantom.medveil") as bundle:
        offer(home, 2, [victim], bundle)
    ledger = work / f"{victim}.out" / "campaign-2-1.private" / "ledger.sqlite"
    until(lambda: done(ledger) >= MANY_IMAGES // 20)
    running.kill(victim)
    before, runs = done(ledger), begun_runs(ledger)
    begun = time.monotonic()
    running.agent(victim)
    until(lambda: begun_runs(ledger) > runs)
    figures = {"agent_goes_on_s": time.monotonic() - begun, "done_before_kill": float(before)}
    until(lambda: done(ledger) > before)
    figures["agent_next_batch_s"] = time.monotonic() - begun

    running.kill("coordinator")
    until(lambda: done(ledger) > before + 1)  # the site works on
    moment = now().timestamp()
    begun = time.monotonic()
    figures["coordinator_ready_s"] = took(running.coordinator)
    until(lambda: heard_since(store, moment) == len(names))
    figures["coordinator_heard_all_s"] = time.monotonic() - begun
    command("medveil-coordinator", home, "campaign", "seal", "1")
    begun = time.monotonic()
    until(lambda: all(sealed.state == "sealed" for sealed in store.deliveries(1).values()))
    figures["order_after_restart_s"] = time.monotonic() - begun
    until(lambda: operations.campaign_status(store, 2, now()).complete)
    reports = [report_pb2.Report.FromString(report.payload) for report in store.reports(2)]
    told = sum(report.outcome.verified.exact for report in reports)
    assert (len(reports), told) == (1, MANY_IMAGES), "lost or repeated"
    return figures


def offer(home: Path, number: int, names: list[str], bundle: Path) -> None:
    """Make a campaign and offer it."""
    words = [word for site in names for word in ("--site", site)]
    create = ("campaign", "create", f"bench-{number}", *words, "--bundle", str(bundle))
    command("medveil-coordinator", home, *create, "--minimum-group-size", "5")
    command("medveil-coordinator", home, "campaign", "offer", str(number))


def join(work: Path, store: Store, site: str) -> None:
    """Let a site join, and write its policy."""
    home = work / site
    home.mkdir()
    draw_images(work / f"{site}.npz", IMAGES, seed=int(site.rpartition("-")[2]))
    token = operations.invite(store, site, now()).text
    fingerprint = load_authority(work / "coordinator" / "authority").fingerprint
    address = f"127.0.0.1:{PORTS['enrolment']}"
    command("medveil-agent", home, "join", address, "--token", token, "--fingerprint", fingerprint)
    (home / "site.toml").write_text(
        f'[coordinator]\ncampaign = "127.0.0.1:{PORTS["campaign"]}"\nfleet = "127.0.0.1:{PORTS["fleet"]}"\n'
        f'[campaigns]\nsource = "{work / site}.npz"\nout = "{work / site}.out"\napprove = "always"\n'
        "[egress]\nminimum_group_size = 5\n"
    )


def draw_images(path: Path, count: int, *, seed: int) -> None:
    """Write labelled phantoms."""
    images, labels = draw(count, np.random.default_rng(seed), size=SIDE)
    np.savez_compressed(path, train_images=images, train_labels=labels[:, None])


def done(ledger: Path) -> int:
    """Return how many images a job is done with, as an onlooker sees it; an NPZ is verified whole, at its end."""
    return counted(ledger, "SELECT COUNT(*) FROM images WHERE state IN ('protected', 'verified')")


def begun_runs(ledger: Path) -> int:
    """Return how often a job was begun or gone on with."""
    return counted(ledger, "SELECT COUNT(*) FROM log WHERE event = 'run-started'")


def counted(ledger: Path, question: str) -> int:
    """Return a number from a ledger that someone else writes; 0 before there is one."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as rows:
        return int(rows.execute(question).fetchone()[0])
    return 0


def heard_since(store: Store, moment: float) -> int:
    """Return how many sites the coordinator has heard since then."""
    sites = operations.campaign_status(store, 1, now()).sites
    return sum(site.last_contact_unix_s > moment for site in sites)


def held(store: Store) -> int:
    """Return how many sites have confirmed that they hold the whole bundle, tested."""
    sites = status_value(store, 1, now())["sites"]
    return sum(site["bundle_held"] == 1.0 for site in sites)


class Running(AbstractContextManager["Running"]):
    """The processes of a campaign, by name; on leaving, they are ended, the last one first."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            process.wait()

    @property
    def pids(self) -> list[int]:
        """Return the processes that were started here."""
        return [process.pid for process in self._processes.values()]

    def coordinator(self) -> None:
        """Start the coordinator and wait until it is ready."""
        ports = [word for name, port in PORTS.items() for word in (f"--{name}-port", str(port))]
        self._start("coordinator", "medveil-coordinator", "--name", "127.0.0.1", *ports)
        until(lambda: '"ready"' in self.said("coordinator"))

    def agent(self, site: str) -> None:
        """Start a site's agent."""
        self._start(site, "medveil-agent", "--policy", str(self._work / site / "site.toml"))

    def kill(self, name: str) -> None:
        """Kill one without warning; the kernel takes its children along."""
        self._processes[name].kill()
        self._processes[name].wait()

    def said(self, name: str) -> str:
        """Return what one has printed since it was last started."""
        return (self._work / f"{name}.log").read_text()

    def _start(self, name: str, program: str, *words: str) -> None:
        with (self._work / f"{name}.log").open("wb") as file:
            self._processes[name] = subprocess.Popen(
                [str(SCRIPTS / program), "run", "--format", "json", *words],
                env={**os.environ, "MEDVEIL_HOME": str(self._work / name)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )


class Memory(AbstractContextManager["Memory"]):
    """Looks at the memory of all processes (MiB, proportional set size) every few seconds, in a thread.

    Attributes:
        largest: of each program, the largest process that was seen.
        largest_sum: of all processes at one moment.
    """

    def __init__(self, running: Running) -> None:
        self._running = running
        self.largest: dict[str, list[float]] = {}
        self.largest_sum = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def now(self) -> dict[str, list[float]]:
        """Return every process's memory at this moment, by program."""
        return memory(self._running.pids)

    def _look(self) -> None:
        while not self._ending.wait(LOOK_EVERY_S):
            found = self.now()
            self.largest_sum = max(self.largest_sum, sum(map(sum, found.values())))
            for name, values in found.items():
                self.largest[name] = [max([*values, *self.largest.get(name, [])])]


def memory(roots: list[int]) -> dict[str, list[float]]:
    """Return the proportional set size (MiB) of the processes and everything below them, by program."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    wanted = set(roots)
    while grown := {pid for pid, parent in parents.items() if parent in wanted} - wanted:
        wanted |= grown
    found: dict[str, list[float]] = {}
    for pid in wanted:
        with suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            name = Path(os.fsdecode(next((w for w in words[1:] if not w.startswith(b"-")), words[0]))).name
            kib = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
            # What comes with ``python -c`` is the child that takes received graphs apart.
            found.setdefault(SANDBOX if " " in name else name, []).append(kib / 1024)
    return {name: sorted(values) for name, values in sorted(found.items())}


def command(program: str, home: Path, *words: str) -> None:
    """Run a command to its end."""
    line = [str(SCRIPTS / program), *words]
    subprocess.run(line, env={**os.environ, "MEDVEIL_HOME": str(home)}, check=True, stdout=subprocess.DEVNULL)


def took(work: Callable[[], Any]) -> float:
    """Return how long something takes, in seconds."""
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def until(condition: Callable[[], Any]) -> None:
    """Wait."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the campaign does not come on; look into the logs under --work"
        time.sleep(0.1)


def now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


# Many simulated sites
# ------------------------------------------------------------------------------------------------


def serve(folder: Path, pipe: Connection, sites: int) -> None:
    """Be the coordinator: in a process of its own, so that its memory and time are its alone."""
    authority = create_authority(folder / "authority", now())
    names = tuple(f"site-{number}" for number in range(sites))
    with Store(folder / "coordinator.sqlite") as store:
        identities = [joined(store, authority, name) for name in names]
        operations.create_campaign(
            store, campaign_pb2.Offer(name="bench", minimum_group_size=5), names, None, now()
        )
        operations.offer_campaign(store, 1, now(), "bench")
        server = StatusServer(store, authority, ["127.0.0.1"])
        port, _ = server.start("127.0.0.1")
        pipe.send((port, authority.certificate_pem, identities))
        pipe.recv()
        begun = time.perf_counter()
        operations.campaign_status(store, 1, now())
        status_s = time.perf_counter() - begun
        used = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((used.ru_maxrss / 1024, status_s))
        server.stop()


def joined(store: Store, authority: Any, site: str) -> tuple[bytes, bytes]:
    """Let a site join and return its key and certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    der = request.public_bytes(serialization.Encoding.DER)
    done = operations.join(store, authority, operations.invite(store, site, now()).text, der, now())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem, done.issued.chain_pem


def simulated(sites: int) -> dict[str, Any]:
    """Let that many sites accept, beat and report, and return how the coordinator held."""
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(Path(folder), theirs, sites)
        )
        process.start()
        port, authority, identities = mine.recv()
        calls = methods("CampaignService")
        channels = [
            grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(authority, key, chain))
            for key, chain in identities
        ]

        def call(site: int, name: str, payload: bytes) -> float:
            begun = time.perf_counter()
            channels[site].unary_unary(calls[name].path)(payload, timeout=120)
            return time.perf_counter() - begun

        with ThreadPoolExecutor(CALLERS) as pool:

            def everyone(name: str, payload: bytes) -> float:
                begun = time.perf_counter()
                list(pool.map(lambda site: call(site, name, payload), range(sites)))
                return time.perf_counter() - begun

            figures = {"sites": sites, "accept_s": everyone("AnswerOffer", accepting())}
            everyone("SendBeat", beat())
            figures["beats_per_s"] = sites / everyone("SendBeat", beat())
            figures |= paced(sites, lambda site: pool.submit(call, site, "SendBeat", beat()))
            figures |= {"report_bytes": len(a_report()), "reports_s": everyone("SubmitReport", a_report())}
        mine.send(None)
        figures["peak_rss_mib"], figures["status_s"] = mine.recv()
        process.join()
    return figures


def paced(sites: int, submit: Callable[[int], Any]) -> dict[str, float]:
    """Send each site's beat in turn, as often as real sites would, and return how long an answer takes."""
    rate, begun, sent = sites / BEAT_EVERY_S, time.perf_counter(), []
    for number in range(int(rate * PACED_S)):
        time.sleep(max(0.0, begun + number / rate - time.perf_counter()))
        sent.append(submit(number % sites))
    took = sorted(answer.result() for answer in sent)
    return {"beat_median_ms": statistics.median(took) * 1e3, "beat_p99_ms": took[int(0.99 * len(took))] * 1e3}


def accepting() -> bytes:
    """Return an answer that accepts."""
    answer = campaign_pb2.AnswerOfferRequest(campaign=1, revision=1, answer=campaign_pb2.ANSWER_ACCEPTED)
    return bytes(answer.SerializeToString(deterministic=True))


def beat() -> bytes:
    """Return a working site's beat."""
    message = status_pb2.Beat(
        activity=status_pb2.ACTIVITY_PROTECTING,
        campaign=1,
        images=figures_pb2.Count(exact=1000),
        done=figures_pb2.Count(exact=500),
        images_per_s=3,
        certificate_days=300,
    )
    return bytes(message.SerializeToString(deterministic=True))


def a_report() -> bytes:
    """Return a finished site's report."""
    counts = {"images": 1000, "verified": 1000, "not_protectable": 0, "quarantined": 0, "unfinished": 0}
    report = report_pb2.Report(
        campaign=1,
        offer_revision=1,
        sequence=1,
        minimum_group_size=5,
        outcome=report_pb2.Outcome(**{name: figures_pb2.Count(exact=n) for name, n in counts.items()}),
        changed_share_mean=figures_pb2.Rate(exact=0.3),
    )
    return bytes(report.SerializeToString(deterministic=True))


# ------------------------------------------------------------------------------------------------


def real_table(results: list[dict[str, Any]]) -> str:
    """Return what the real campaigns took, one column each."""
    rows = [
        ("images", lambda r: f"{r['images']}"),
        ("load over the last 5 minutes of it, everything on the machine", lambda r: f"{r['load']:.1f}"),
        ("`medveil-coordinator run` to ready, s", lambda r: f"{r['ready_s']:.0f}"),
        (
            "all agents started at once, to the coordinator seeing each SuperNode, s",
            lambda r: f"{r['present_s']:.0f}",
        ),
        ("offer to bundle held and tested everywhere, s", lambda r: f"{r['bundle_everywhere_s']:.0f}"),
        ("offer to every site verified, s", lambda r: f"{r['all_verified_s']:.0f}"),
        ("bundle to each site, once, bytes", lambda r: f"{r['bundle_bytes']:,}"),
        ("egress log of each site by then, bytes", lambda r: _range(r["sent_bytes"])),
        ("report, bytes", lambda r: _range(r["report_bytes"])),
        (
            "status of the campaign, from the store, median, ms",
            lambda r: f"{statistics.median(r['status_ms']):.1f}",
        ),
        ("`medveil-coordinator status`, s", lambda r: f"{r['status_command_s']:.1f}"),
        ("agent killed and started: to its job going on, s", lambda r: f"{r['agent_goes_on_s']:.1f}"),
        (
            "the same, to the job's next finished batch (128 images), s",
            lambda r: f"{r['agent_next_batch_s']:.1f}",
        ),
        ("coordinator killed and started: to ready, s", lambda r: f"{r['coordinator_ready_s']:.1f}"),
        ("the same, to a beat of every site, s", lambda r: f"{r['coordinator_heard_all_s']:.1f}"),
        (
            "an order after both, by Flower (SuperNode's re-admission included), s",
            lambda r: f"{r['order_after_restart_s']:.0f}",
        ),
        ("memory of all processes, most at once, MiB", lambda r: f"{r['working_memory_mib_all']:,.0f}"),
        ("memory of all processes, idle, MiB", lambda r: f"{r['idle_memory_mib_all']:,.0f}"),
    ]
    table = [[title, *(show(result) for result in results)] for title, show in rows]
    for kind, key in (("largest", "working_memory_mib"), ("idle", "idle_memory_mib")):
        for name in sorted({name for result in results for name in result[key]}):
            cells = [_range(result[key].get(name, [])) for result in results]
            table.append([f"{kind} {name}, MiB", *cells])
    return markdown_table(["", *(f"{r['sites']} sites" for r in results)], table)


def simulated_table(figures: dict[str, Any]) -> str:
    """Return how the coordinator held."""
    rows = [
        ["every site connects and accepts, s", f"{figures['accept_s']:.1f}"],
        ["beats as fast as they come, 1/s", f"{figures['beats_per_s']:.0f}"],
        [
            f"answer to a beat, each site every {BEAT_EVERY_S:.0f} s, median, ms",
            f"{figures['beat_median_ms']:.1f}",
        ],
        ["the same, 99th percentile, ms", f"{figures['beat_p99_ms']:.1f}"],
        [
            f"every site reports at once ({figures['report_bytes']} bytes each), s",
            f"{figures['reports_s']:.1f}",
        ],
        ["status of the whole campaign, s", f"{figures['status_s']:.2f}"],
        ["peak memory of the coordinator (RSS), MiB", f"{figures['peak_rss_mib']:.0f}"],
    ]
    return markdown_table(["store and gRPC services alone", f"{figures['sites']:,} simulated sites"], rows)


def _range(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", default="3,10", help="sizes of the real campaigns; empty: none")
    parser.add_argument("--simulated", type=int, default=1000, help="simulated sites; 0: none")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "medveil-bench-campaign")
    arguments = parser.parse_args()
    sizes, work = [int(word) for word in arguments.sites.split(",") if word], arguments.work.absolute()
    results = [kept(work / f"{size}.json", lambda size=size: real(size, work / str(size))) for size in sizes]
    sections, data = [], {"real": results}
    if results:
        sections += ["## A real campaign on one machine", real_table(results)]
    if arguments.simulated:
        data["simulated"] = simulated(arguments.simulated)
        sections += ["## Many sites", simulated_table(data["simulated"])]
    write("campaign", "What a campaign costs", sections, json.loads(json.dumps(data)))


if __name__ == "__main__":
    main()
