"""The multipart/related bodies of DICOMweb (PS3.18 8.6, RFC 2046 5.1), byte for byte.

The standard library's MIME classes are made for mail: they copy each part several times and rewrite line
ends. DICOM files need neither.
"""

from __future__ import annotations

import secrets
from email.message import Message
from typing import Final

from medveil.models.errors import ImageError

__all__ = ["decode_related", "encode_related"]

LINE: Final = b"\r\n"
HEADERS_END: Final = LINE + LINE
BOUNDARY_BYTES: Final = 16  # 128 random bits: no file contains them


def encode_related(data: bytes) -> tuple[str, bytes]:
    """Return the content type and the body that hold one DICOM file."""
    boundary = secrets.token_hex(BOUNDARY_BYTES)
    while boundary.encode() in data:
        boundary = secrets.token_hex(BOUNDARY_BYTES)
    dashed = b"--" + boundary.encode()
    body = b"".join(
        (dashed, LINE, b"Content-Type: application/dicom", HEADERS_END, data, LINE, dashed, b"--", LINE)
    )
    return f'multipart/related; type="application/dicom"; boundary={boundary}', body


def decode_related(content_type: str, body: bytes) -> list[bytes]:
    """Return the parts of a body, without their headers.

    Raises:
        ImageError: ``bad-answer``: it is no multipart body, or is cut short.
    """
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_param("boundary")
    if message.get_content_maintype() != "multipart" or not isinstance(boundary, str) or not boundary:
        raise _bad_answer(content_type)
    dashed = LINE + b"--" + boundary.encode("ascii", "replace")
    # The first boundary needs no line end before it.
    at = (LINE + body).find(dashed)
    if at < 0:
        raise _bad_answer("no boundary")
    parts = []
    start = at + len(dashed) - len(LINE)
    while body[start : start + 2] != b"--":
        headers_end = body.find(HEADERS_END, start)
        end = body.find(dashed, start)
        if headers_end < 0 or end < 0:
            raise _bad_answer("cut short")
        parts.append(body[headers_end + len(HEADERS_END) : end])
        start = end + len(dashed)
    return parts


def _bad_answer(private: str) -> ImageError:
    return ImageError(
        "bad-answer", "The PACS answered with something that is no DICOM file; try again.", private=private
    )
