"""What a campaign costs on one machine: time, memory and bytes of a real one, and the coordinator under many sites.

    python bench/campaign.py [--sites 3,10] [--simulated 1000] [--work DIR]

The real part starts ``medveil-coordinator run`` and that many ``medveil-agent run`` on loopback, with drawn phantoms
and the shipped bundle, and follows the coordinator's own store from the offer to the last verified report. Memory is
the proportional set size of every process, read when all is done and nothing is left to do. The simulated part is the
store and the gRPC services alone, in a process of their own, under sites that send a beat every 10 s and report at
once. Prints a table and writes it to ``bench/results/campaign.{md,json}``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
SIDE = 32
PATIENCE_S = 1800.0
PORTS = {"campaign": 21451, "enrolment": 21452, "fleet": 21453, "superlink": 21454}
"""Below the range of outgoing connections; any four free ones would do."""
BEAT_EVERY_S = 10.0
PACED_S = 20.0
CALLERS = 16
SCRIPTS = Path(sysconfig.get_path("scripts"))


# A real campaign
# ------------------------------------------------------------------------------------------------


def real(sites: int, work: Path) -> dict[str, Any]:
    """Run a campaign of that many sites and return what it took."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    home = work / "coordinator"
    command("medveil-coordinator", home, "init")
    figures: dict[str, Any] = {"sites": sites, "images": IMAGES * sites}
    with ending() as processes, Store(home / "coordinator.sqlite") as store:
        begun = time.monotonic()
        ports = [word for name, port in PORTS.items() for word in (f"--{name}-port", str(port))]
        line = ("run", "--name", "127.0.0.1", "--format", "json", *ports)
        processes.append(start("medveil-coordinator", home, line, work / "coordinator.log"))
        until(lambda: '"ready"' in (work / "coordinator.log").read_text())
        figures["ready_s"] = time.monotonic() - begun

        for number in range(1, sites + 1):
            processes.append(join(work, store, f"site-{number}"))
        until(lambda: (work / "coordinator.log").read_text().count('"site-present"') >= sites)

        names = [word for number in range(1, sites + 1) for word in ("--site", f"site-{number}")]
        with as_file(files("medveil.agent.demo") / "phantom.medveil") as bundle:
            figures["bundle_bytes"] = bundle.stat().st_size
            create = (
                "campaign",
                "create",
                "bench",
                *names,
                "--bundle",
                str(bundle),
                "--minimum-group-size",
                "5",
            )
            command("medveil-coordinator", home, *create)
        begun = time.monotonic()
        command("medveil-coordinator", home, "campaign", "offer", "1")
        until(lambda: held(store) == sites)
        figures["bundle_everywhere_s"] = time.monotonic() - begun
        until(lambda: operations.campaign_status(store, 1, now()).complete)
        figures["all_verified_s"] = time.monotonic() - begun
        until(lambda: not store.open_rounds())

        status = [status_value(store, 1, now()) for _ in range(5)]
        figures["report_bytes"] = [len(report.payload) for report in store.reports(1)]
        figures["sent_bytes"] = [site["egress_bytes"] for site in status[-1]["sites"]]
        figures["memory_mib"] = memory([process.pid for process in processes])
    return figures


def join(work: Path, store: Store, site: str) -> subprocess.Popen[bytes]:
    """Let a site join, write its policy and start its agent."""
    home = work / site
    home.mkdir()
    images, labels = draw(IMAGES, np.random.default_rng(int(site.rpartition("-")[2])), size=SIDE)
    np.savez_compressed(work / f"{site}.npz", train_images=images, train_labels=labels[:, None])
    token = operations.invite(store, site, now()).text
    fingerprint = load_authority(work / "coordinator" / "authority").fingerprint
    address = f"127.0.0.1:{PORTS['enrolment']}"
    command("medveil-agent", home, "join", address, "--token", token, "--fingerprint", fingerprint)
    policy = home / "site.toml"
    policy.write_text(
        f'[coordinator]\ncampaign = "127.0.0.1:{PORTS["campaign"]}"\nfleet = "127.0.0.1:{PORTS["fleet"]}"\n'
        f'[campaigns]\nsource = "{work / site}.npz"\nout = "{work / site}.out"\napprove = "always"\n'
        "[egress]\nminimum_group_size = 5\n"
    )
    return start("medveil-agent", home, ("run", "--policy", str(policy)), work / f"{site}.log")


def held(store: Store) -> int:
    """Return how many sites have confirmed that they hold the whole bundle, tested."""
    sites = status_value(store, 1, now())["sites"]
    return sum(site["bundle_held"] == 1.0 for site in sites)


def memory(roots: list[int]) -> dict[str, list[float]]:
    """Return the proportional set size (MiB) of the processes and everything below them, by program."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    wanted = set(roots)
    while grown := {pid for pid, parent in parents.items() if parent in wanted} - wanted:
        wanted |= grown
    found: dict[str, list[float]] = {}
    for pid in wanted:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        name = Path(os.fsdecode(next((w for w in words[1:] if not w.startswith(b"-")), words[0]))).name
        kib = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        found.setdefault(name, []).append(kib / 1024)
    return {name: sorted(values) for name, values in sorted(found.items())}


def command(program: str, home: Path, *words: str) -> None:
    """Run a command to its end."""
    line = [str(SCRIPTS / program), *words]
    subprocess.run(line, env={**os.environ, "MEDVEIL_HOME": str(home)}, check=True, stdout=subprocess.DEVNULL)


def start(program: str, home: Path, words: tuple[str, ...], log: Path) -> subprocess.Popen[bytes]:
    """Start a command that stays."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [str(SCRIPTS / program), *words],
            env={**os.environ, "MEDVEIL_HOME": str(home)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


@contextmanager
def ending() -> Iterator[list[subprocess.Popen[bytes]]]:
    """End the processes that are put into the list, the last one first."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()


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
        ("`run` to ready, s", lambda r: f"{r['ready_s']:.0f}"),
        ("offer to bundle held and tested everywhere, s", lambda r: f"{r['bundle_everywhere_s']:.0f}"),
        ("offer to every site verified, s", lambda r: f"{r['all_verified_s']:.0f}"),
        ("bundle to each site, bytes", lambda r: f"{r['bundle_bytes']:,}"),
        ("left each site through its door, bytes", lambda r: _range(r["sent_bytes"])),
        ("report, bytes", lambda r: _range(r["report_bytes"])),
    ]
    programs = sorted({name for result in results for name in result["memory_mib"]})
    table = [[title, *(show(result) for result in results)] for title, show in rows]
    for name in programs:
        table.append(
            [f"idle memory of {name}, MiB", *(_range(r["memory_mib"].get(name, [])) for r in results)]
        )
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
    sizes = [int(word) for word in arguments.sites.split(",") if word]
    results = [real(size, arguments.work / str(size)) for size in sizes]
    sections, data = [], {"real": results}
    if results:
        sections += ["## A real campaign on one machine", real_table(results)]
    if arguments.simulated:
        data["simulated"] = simulated(arguments.simulated)
        sections += ["## Many sites", simulated_table(data["simulated"])]
    write("campaign", "What a campaign costs", sections, json.loads(json.dumps(data)))


if __name__ == "__main__":
    main()
