"""DICOM files pass through multipart bodies byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pynetdicom", reason="needs the extra [dicom-net]")
pytest.importorskip("httpx", reason="needs the extra [dicom-net]")

from medveil.agent.imageio.pacs.multipart import decode_related, encode_related
from medveil.models.errors import ImageError


@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"\r\n", b"--", b"\r\n\r\n", b"B"])).map(b"".join))
def test_what_is_encoded_is_decoded_unchanged(data: bytes) -> None:
    assert decode_related(*encode_related(data)) == [data]


def test_preamble_epilogue_quotes_and_several_parts_are_understood() -> None:
    body = b"ignored\r\n--B\r\nContent-Type: x\r\n\r\none\r\n--B\r\nA: b\r\nC: d\r\n\r\n\r\ntwo\r\n--B--\r\nignored"
    assert decode_related('multipart/related; type="application/dicom"; boundary="B"', body) == [
        b"one",
        b"\r\ntwo",
    ]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/html", b"<html>log in</html>"),
        ("multipart/related", b"--B\r\n\r\n\r\n--B--"),
        ("multipart/related; boundary=B", b"nothing of the kind"),
        ("multipart/related; boundary=B", b"--B\r\nContent-Type: x\r\n\r\ncut sho"),
        ("", b""),
    ],
)
def test_an_answer_that_is_cut_short_or_no_multipart_is_refused(content_type: str, body: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_related(content_type, body)
    assert caught.value.code == "bad-answer"


def test_no_cut_of_a_body_passes_for_the_whole() -> None:
    content_type, body = encode_related(b"DICOM" * 10)
    for end in range(len(body) - len(b"--\r\n")):
        with pytest.raises(ImageError):
            decode_related(content_type, body[:end])
