"""Flower's Control API on loopback: nodes are registered and rounds begun. Nothing outside this machine reaches it.

Flower has no public Python API for this; its command line costs a process and two seconds per call. So its own
client is used, from the exactly pinned version (`check_flower` looks).
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from importlib.metadata import version
from importlib.resources import files
from types import TracebackType
from typing import Final, Self

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from medveil.models.errors import ConfigurationError, RefusedError
from medveil.protos.fleet import FAB_SHA256, FLWR_VERSION

__all__ = ["Control", "campaign_bundle", "check_flower"]

_SETTINGS: Final = "pyproject.toml"


def check_flower() -> None:
    """Refuse every Flower but the one that this version was tested with.

    Raises:
        ConfigurationError: ``flower-version``.
    """
    if version("flwr") != FLWR_VERSION:
        raise ConfigurationError(
            "flower-version", f"medveil needs flwr {FLWR_VERSION}, exactly; install medveil anew."
        )


def campaign_bundle() -> bytes:
    """Build the Flower App Bundle from the settings that are installed here.

    Raises:
        ConfigurationError: ``app-changed``: it isn't the one that sites accept.
    """
    settings = files("medveil.coordinator.fleet").joinpath("campaign", _SETTINGS).read_bytes()
    content, _ = build_fab_from_files({_SETTINGS: settings})
    if hashlib.sha256(content).hexdigest() != FAB_SHA256:
        raise ConfigurationError(
            "app-changed", "The installed Flower app isn't the one that sites accept; install medveil anew."
        )
    return content


class Control(AbstractContextManager["Control"]):
    """A client of the SuperLink on this machine."""

    def __init__(self, address: str, root_certificate: bytes) -> None:
        """Prepare; the first call connects.

        Args:
            address: ``host:port`` on loopback.
            root_certificate: PEM of who signed the SuperLink's certificate.
        """
        self._app = Fab(hash_str=FAB_SHA256, content=campaign_bundle())
        self._client = ControlHttpClient.from_server_address(
            address, False, root_certificate, [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def register(self, site: str, key: bytes) -> None:
        """Let a node take part; one that may already changes nothing.

        Args:
            site: for Flower's own lists.
            key: the node's public key, as it shows it.

        Raises:
            RefusedError: ``node-key``: it is no key that Flower takes.
            ConfigurationError: ``superlink``: the SuperLink doesn't answer; try again.
        """
        try:
            self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=site))
        except httpx.HTTPStatusError as exc:
            error = FlowerError.from_json(exc.response.text)
            if error is not None and error.code == ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                return
            if error is not None and error.code == ApiErrorCode.PUBLIC_KEY_NOT_VALID:
                raise RefusedError(
                    "node-key", "The site's node key is none that Flower takes; make a new one."
                ) from exc
            raise _unreachable(exc) from exc
        except httpx.HTTPError as exc:
            raise _unreachable(exc) from exc

    def begin(self, round_number: int) -> None:
        """Ask for the Flower run of a round.

        Raises:
            ConfigurationError: ``superlink``.
        """
        request = StartRunRequest(fab=self._app, override_config={"round": Scalar(sint64=round_number)})
        try:
            answer = self._client.StartRun(request)
        except httpx.HTTPError as exc:
            raise _unreachable(exc) from exc
        if not answer.HasField("run_id"):
            raise ConfigurationError("superlink", "The SuperLink did not begin a run; see its log.")


def _unreachable(exc: httpx.HTTPError) -> ConfigurationError:
    return ConfigurationError(
        "superlink", "The SuperLink does not answer; it is restarted, see its log.", private=str(exc)
    )
