# ruff: noqa
# fmt: off
# mypy: ignore-errors
from medveil.protos.v1 import campaign_pb2 as _campaign_pb2
from medveil.protos.v1 import report_pb2 as _report_pb2
from medveil.protos.v1 import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("token", "signing_request_der")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SIGNING_REQUEST_DER_FIELD_NUMBER: _ClassVar[int]
    token: str
    signing_request_der: bytes
    def __init__(self, token: _Optional[str] = ..., signing_request_der: _Optional[bytes] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("site", "certificate_der")
    SITE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_DER_FIELD_NUMBER: _ClassVar[int]
    site: str
    certificate_der: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, site: _Optional[str] = ..., certificate_der: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("signing_request_der",)
    SIGNING_REQUEST_DER_FIELD_NUMBER: _ClassVar[int]
    signing_request_der: bytes
    def __init__(self, signing_request_der: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate_der",)
    CERTIFICATE_DER_FIELD_NUMBER: _ClassVar[int]
    certificate_der: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, certificate_der: _Optional[_Iterable[bytes]] = ...) -> None: ...
