"""Where images may go is written down, and unsafe ways are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")

from medveil.agent.imageio.pacs import DicomPeer, KnownSender, ReceiveSettings, WebPeer


@pytest.mark.parametrize("url", ["http://pacs.hospital.example/dicom-web", "http://10.0.0.7:8042"])
def test_images_cross_the_network_in_clear_only_when_the_site_accepts_it(url: str) -> None:
    with pytest.raises(ValidationError, match="allow_http"):
        WebPeer(url=url)
    assert WebPeer(url=url, allow_http=True).url == url


@pytest.mark.parametrize(
    "url", ["https://pacs.example/dicom-web", "http://127.0.0.1:8042", "http://[::1]:80"]
)
def test_tls_and_loopback_need_no_permission(url: str) -> None:
    assert WebPeer(url=url).url == url


@pytest.mark.parametrize(
    "url", ["ftp://pacs.example", "pacs.example", "https://user:pw@pacs.example", "https://p/?a=1"]
)
def test_an_address_that_is_no_plain_web_address_is_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        WebPeer(url=url)


def test_secrets_are_never_printed() -> None:
    peer = WebPeer(url="https://pacs.example", user="agent", password="canary-secret")
    assert "canary-secret" not in f"{peer!r} {peer} {peer.model_dump_json()}"


@pytest.mark.parametrize(
    "login", [{"user": "a"}, {"password": "b"}, {"user": "a", "password": "b", "token": "c"}]
)
def test_a_login_is_complete_and_of_one_kind(login: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="user and password"):
        WebPeer(url="https://pacs.example", **login)


@pytest.mark.parametrize("title", ["", "   ", "SEVENTEEN_LETTERS", "BACK\\SLASH", "LINE\nEND", "UMLÄUT"])
def test_what_is_no_ae_title_is_refused(title: str) -> None:
    with pytest.raises(ValidationError):
        DicomPeer(ae_title=title, host="127.0.0.1", port=104)


def test_ae_titles_are_compared_without_padding() -> None:
    assert KnownSender(ae_title=" PACS  ", addresses=("10.0.0.1",)).ae_title == "PACS"


def test_a_receive_port_without_known_senders_is_refused() -> None:
    with pytest.raises(ValidationError):
        ReceiveSettings(senders=())


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError):
        ReceiveSettings.model_validate({"senders": [{"ae_title": "A", "addresses": ["::1"]}], "sender": []})
