"""DICOMweb against archives that answer strangely; a real one is in test_orthanc.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")

import httpx

from medveil.agent.imageio.pacs import Inbox, WebPacs, WebPeer, pull_by_wado
from medveil.agent.imageio.pacs import web as web_module
from medveil.agent.imageio.pacs.content import describe
from medveil.models.errors import ImageError, InputError, MedveilError

MakeObject = Callable[..., Path]
Answer = Callable[[httpx.Request], httpx.Response]
PEER = WebPeer(url="https://pacs.example/dicom-web/", token="canary-token")


def pacs(answer: Answer) -> WebPacs:
    return WebPacs(PEER, transport=httpx.MockTransport(answer))


def listed(*instances: str) -> list[dict[str, object]]:
    return [{"00080018": {"vr": "UI", "Value": [instance]}} for instance in instances]


@pytest.mark.parametrize("server_limit", [1, 2, 500])
def test_long_lists_are_read_to_their_end_whatever_the_archive_s_limit(server_limit: int) -> None:
    everything = [f"1.2.{number}" for number in range(5)]

    def answer(request: httpx.Request) -> httpx.Response:
        start = int(request.url.params["offset"])
        page = everything[start : start + server_limit]
        return httpx.Response(200, json=listed(*page)) if page else httpx.Response(204)

    with pacs(answer) as archive:
        assert archive.find_instances("1.2", "1.3") == set(everything)


def test_an_archive_that_ignores_the_offset_is_not_asked_for_ever() -> None:
    with pacs(lambda _: httpx.Response(200, json=listed("1.2.1", "1.2.2"))) as archive:
        assert archive.find_instances("1.2", "1.3") == {"1.2.1", "1.2.2"}


@pytest.mark.parametrize(
    ("answer", "kind", "code"),
    [
        (httpx.Response(200, json=listed("../../evil")), ImageError, "bad-uid"),
        (httpx.Response(200, text="<html>log in</html>"), ImageError, "bad-answer"),
        (httpx.Response(200, json={"error": 1}), ImageError, "bad-answer"),
        (httpx.Response(401), InputError, "pacs-refused"),
        (httpx.Response(302, headers={"Location": "https://elsewhere.example/"}), InputError, "pacs-refused"),
        (httpx.Response(503), InputError, "pacs-refused"),
    ],
)
def test_a_strange_answer_to_a_query_is_named(
    answer: httpx.Response, kind: type[MedveilError], code: str
) -> None:
    with pacs(lambda _: answer) as archive, pytest.raises(kind) as caught:
        archive.find_instances("1.2", "1.3")
    assert caught.value.code == code


@pytest.mark.parametrize(("status", "kind"), [(500, ImageError), (406, ImageError), (503, InputError)])
def test_an_object_that_cannot_be_delivered_is_told_from_an_archive_that_is_down(
    status: int, kind: type[MedveilError]
) -> None:
    with pacs(lambda _: httpx.Response(status)) as archive, pytest.raises(MedveilError) as caught:
        archive.fetch("1.2", "1.3", "1.4")
    assert type(caught.value) is kind


def test_images_do_not_pass_through_a_proxy_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    with WebPacs(PEER) as archive:
        assert archive._client._mounts == {}  # where httpx keeps them
    with httpx.Client() as careless:
        assert careless._mounts != {}


def test_redirects_lead_nowhere_and_only_the_pacs_sees_our_token() -> None:
    seen: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.host, request.headers["Authorization"]))
        return httpx.Response(307, headers={"Location": "https://elsewhere.example/"})

    with pacs(answer) as archive, pytest.raises(InputError):
        archive.find_instances("1.2", "1.3")
    assert seen == [("pacs.example", "Bearer canary-token")]


def test_a_uid_that_would_change_the_address_is_never_requested() -> None:
    with pacs(lambda _: pytest.fail("it was requested")) as archive, pytest.raises(ImageError):
        archive.fetch("1.2", "1.3", "../../../system")


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, {"00081199": {"Value": [{"00081155": {"Value": ["1.2.3.4.1.1"]}}]}}, None),
        (202, {"00081199": {"Value": [{"00081155": {"Value": ["1.2.3.4.1.1"]}}]}}, None),
        (200, {}, "not-stored"),
        (200, {"00081199": {"Value": [{"00081155": {"Value": ["9.9"]}}]}}, "not-stored"),
        (200, [], "http-200"),
        (
            409,
            {
                "00081198": {
                    "Value": [{"00081155": {"Value": ["1.2.3.4.1.1"]}, "00081197": {"Value": [0x0110]}}]
                }
            },
            "status-0110",
        ),
        (400, "not JSON", "http-400"),
        (500, "", "http-500"),
    ],
)
def test_stored_is_only_what_the_archive_lists_as_stored(
    make_object: MakeObject, status: int, body: object, reason: str | None
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    item = describe(make_object())
    with pacs(lambda _: httpx.Response(status, text=text)) as archive:
        assert list(archive.send([item])) == [(item, reason)]


def test_a_file_is_stored_as_it_is(make_object: MakeObject) -> None:
    path = make_object()
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.extend(web_module.decode_related(request.headers["Content-Type"], request.read()))
        return httpx.Response(200, json={})

    with pacs(answer) as archive:
        list(archive.send([describe(path)]))
    assert bodies == [path.read_bytes()]


def test_the_object_on_which_the_connection_breaks_is_named_before_the_outage(
    make_object: MakeObject,
) -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset")

    def absent(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route")

    items = [describe(make_object(number)) for number in (1, 2)]
    for answer, expected in ((broken, [(items[0], "no-answer")]), (absent, [])):
        named = []
        with pacs(answer) as archive, pytest.raises(InputError):
            named += archive.send(items)  # a list takes what was yielded before the error
        assert named == expected


def test_an_answer_beyond_the_size_limit_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_module, "MAX_FILE_BYTES", 10)
    with (
        pacs(lambda _: httpx.Response(200, content=b"x" * 11)) as archive,
        pytest.raises(ImageError) as caught,
    ):
        archive.fetch("1.2", "1.3", "1.4")
    assert caught.value.code == "too-large"


def test_what_does_not_come_is_reported_missing_and_a_second_pull_asks_for_that_only(
    make_inbox: Callable[..., Inbox], make_object: MakeObject
) -> None:
    files = {f"1.2.3.4.1.{number}": make_object(number).read_bytes() for number in (1, 2, 3)}
    asked: list[str] = []
    gone = {"1.2.3.4.1.2"}

    def answer(request: httpx.Request) -> httpx.Response:
        instance = request.url.path.rpartition("/")[2]
        if instance == "instances":
            return httpx.Response(200, json=listed(*files))
        asked.append(instance)
        if instance in gone:
            return httpx.Response(404)
        content_type, body = web_module.encode_related(files[instance])
        return httpx.Response(200, content=body, headers={"Content-Type": content_type})

    inbox = make_inbox()
    with pacs(answer) as archive:
        first = pull_by_wado(archive, inbox, "1.2.3.4", "1.2.3.4.1")
        assert (first.expected, first.missing) == (files.keys(), gone)
        gone.clear()
        asked.clear()
        assert pull_by_wado(archive, inbox, "1.2.3.4", "1.2.3.4.1").missing == frozenset()
    assert asked == ["1.2.3.4.1.2"]


def test_a_series_that_the_pacs_does_not_list_is_no_success(make_inbox: Callable[..., Inbox]) -> None:
    with pacs(lambda _: httpx.Response(204)) as archive, pytest.raises(InputError) as caught:
        pull_by_wado(archive, make_inbox(), "1.2", "1.3")
    assert caught.value.code == "no-such-series"
