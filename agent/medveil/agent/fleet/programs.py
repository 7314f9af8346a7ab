"""SuperNode and SuperExec as command lines: what Flower is told to do here, and what it is told not to do."""

from __future__ import annotations

import os
import secrets
import socket
import sysconfig
from pathlib import Path
from typing import Final

from medveil.agent.sealing import home_folder
from medveil.models.child_processes import Program
from medveil.models.disk import make_private_folder, write_atomically

__all__ = ["POLICY_VARIABLE", "SUPEREXEC", "SUPERNODE", "fleet_programs"]

SUPERNODE: Final = "flower-supernode"
SUPEREXEC: Final = "flower-superexec"

POLICY_VARIABLE: Final = "MEDVEIL_POLICY"
"""Names the site's policy file to the client app's process, which nobody calls with arguments of ours."""

_LOOPBACK: Final = "127.0.0.1"
_SECRET_BYTES: Final = 32
_KEPT: Final = ("HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "USER")


def fleet_programs(
    folder: Path, gate_address: str, gate_certificate: Path, node_key: Path, policy_file: Path
) -> list[Program]:
    """Return SuperNode and SuperExec, in the order in which they start.

    The client app's process is SuperExec's child, not SuperNode's (``--isolation process``): what runs the
    coordinator's messages never holds the node's key. Nothing is installed at run time, and nothing is told to
    Flower's makers.

    Args:
        folder: for Flower's files, logs and the secret that the two share.
        gate_address: ``host:port``.
        gate_certificate: the only one that SuperNode trusts.
        node_key: this site's private key.
        policy_file: for the client app.

    Raises:
        StorageError: the folder cannot be written.
    """
    make_private_folder(folder)
    secret = folder / "superexec-secret"
    write_atomically(secret, secrets.token_bytes(_SECRET_BYTES), mode=0o600)
    runtime = f"{_LOOPBACK}:{(port := _free_port())}"
    supernode = [
        "--superlink", gate_address,
        "--root-certificates", str(gate_certificate),
        "--auth-supernode-private-key", str(node_key),
        "--isolation", "process",
        "--host", _LOOPBACK,
        "--port", str(port),
        "--superexec-auth-secret-file", str(secret),
    ]  # fmt: skip
    superexec = [
        "--insecure",  # over loopback, under the shared secret
        "--runtime-api-address", runtime,
        "--superexec-auth-secret-file", str(secret),
        "--parent-pid", str(os.getpid()),
    ]  # fmt: skip
    environment = {**_environment(folder), POLICY_VARIABLE: str(policy_file)}
    return [
        Program(name, [str(_scripts() / name), *arguments], environment, folder / f"{name}.log")
        for name, arguments in ((SUPERNODE, supernode), (SUPEREXEC, superexec))
    ]


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {
        **kept,
        # SuperExec looks up its task programs by name.
        "PATH": os.pathsep.join([str(_scripts()), os.defpath]),
        "MEDVEIL_HOME": str(home_folder().absolute()),
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }


def _scripts() -> Path:
    return Path(sysconfig.get_path("scripts"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])
