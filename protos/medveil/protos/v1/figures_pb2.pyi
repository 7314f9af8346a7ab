# ruff: noqa
# fmt: off
# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Suppression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUPPRESSION_UNSPECIFIED: _ClassVar[Suppression]
    SUPPRESSION_GROUP_TOO_SMALL: _ClassVar[Suppression]
    SUPPRESSION_COMPLEMENTARY: _ClassVar[Suppression]
    SUPPRESSION_POLICY: _ClassVar[Suppression]
    SUPPRESSION_NOISE: _ClassVar[Suppression]
    SUPPRESSION_BUDGET: _ClassVar[Suppression]

class QuarantineReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUARANTINE_REASON_UNSPECIFIED: _ClassVar[QuarantineReason]
    QUARANTINE_REASON_UNREADABLE: _ClassVar[QuarantineReason]
    QUARANTINE_REASON_UNSUPPORTED: _ClassVar[QuarantineReason]
    QUARANTINE_REASON_NO_LABEL: _ClassVar[QuarantineReason]
    QUARANTINE_REASON_POLICY: _ClassVar[QuarantineReason]
    QUARANTINE_REASON_READ_BACK_DIFFERED: _ClassVar[QuarantineReason]
    QUARANTINE_REASON_OTHER: _ClassVar[QuarantineReason]
SUPPRESSION_UNSPECIFIED: Suppression
SUPPRESSION_GROUP_TOO_SMALL: Suppression
SUPPRESSION_COMPLEMENTARY: Suppression
SUPPRESSION_POLICY: Suppression
SUPPRESSION_NOISE: Suppression
SUPPRESSION_BUDGET: Suppression
QUARANTINE_REASON_UNSPECIFIED: QuarantineReason
QUARANTINE_REASON_UNREADABLE: QuarantineReason
QUARANTINE_REASON_UNSUPPORTED: QuarantineReason
QUARANTINE_REASON_NO_LABEL: QuarantineReason
QUARANTINE_REASON_POLICY: QuarantineReason
QUARANTINE_REASON_READ_BACK_DIFFERED: QuarantineReason
QUARANTINE_REASON_OTHER: QuarantineReason

class Noise(_message.Message):
    __slots__ = ("epsilon", "images_per_patient", "scale")
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    IMAGES_PER_PATIENT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    epsilon: float
    images_per_patient: int
    scale: float
    def __init__(self, epsilon: _Optional[float] = ..., images_per_patient: _Optional[int] = ..., scale: _Optional[float] = ...) -> None: ...

class NoisedCount(_message.Message):
    __slots__ = ("images", "draws")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    DRAWS_FIELD_NUMBER: _ClassVar[int]
    images: int
    draws: int
    def __init__(self, images: _Optional[int] = ..., draws: _Optional[int] = ...) -> None: ...

class Count(_message.Message):
    __slots__ = ("exact", "suppressed", "noised")
    EXACT_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_FIELD_NUMBER: _ClassVar[int]
    NOISED_FIELD_NUMBER: _ClassVar[int]
    exact: int
    suppressed: Suppression
    noised: NoisedCount
    def __init__(self, exact: _Optional[int] = ..., suppressed: _Optional[_Union[Suppression, str]] = ..., noised: _Optional[_Union[NoisedCount, _Mapping]] = ...) -> None: ...

class Rate(_message.Message):
    __slots__ = ("exact", "suppressed")
    EXACT_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_FIELD_NUMBER: _ClassVar[int]
    exact: float
    suppressed: Suppression
    def __init__(self, exact: _Optional[float] = ..., suppressed: _Optional[_Union[Suppression, str]] = ...) -> None: ...

class Histogram(_message.Message):
    __slots__ = ("bins",)
    BINS_FIELD_NUMBER: _ClassVar[int]
    bins: _containers.RepeatedCompositeFieldContainer[Count]
    def __init__(self, bins: _Optional[_Iterable[_Union[Count, _Mapping]]] = ...) -> None: ...
