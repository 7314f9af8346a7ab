# ruff: noqa
# fmt: off
# mypy: ignore-errors
from medveil.protos.v1 import figures_pb2 as _figures_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(_message.Message):
    __slots__ = ("images", "verified", "not_protectable", "quarantined", "unfinished")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    NOT_PROTECTABLE_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    images: _figures_pb2.Count
    verified: _figures_pb2.Count
    not_protectable: _figures_pb2.Count
    quarantined: _figures_pb2.Count
    unfinished: _figures_pb2.Count
    def __init__(self, images: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ..., verified: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ..., not_protectable: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ..., quarantined: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ..., unfinished: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ...) -> None: ...

class ReasonCount(_message.Message):
    __slots__ = ("reason", "images")
    REASON_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    reason: _figures_pb2.QuarantineReason
    images: _figures_pb2.Count
    def __init__(self, reason: _Optional[_Union[_figures_pb2.QuarantineReason, str]] = ..., images: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ...) -> None: ...

class ClassCount(_message.Message):
    __slots__ = ("class_index", "verified")
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    class_index: int
    verified: _figures_pb2.Count
    def __init__(self, class_index: _Optional[int] = ..., verified: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ...) -> None: ...

class VictimCheck(_message.Message):
    __slots__ = ("hold_out", "clean_accuracy", "protected_accuracy", "recoverable_accuracy", "half_interval")
    HOLD_OUT_FIELD_NUMBER: _ClassVar[int]
    CLEAN_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    PROTECTED_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    RECOVERABLE_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    HALF_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    hold_out: _figures_pb2.Count
    clean_accuracy: _figures_pb2.Rate
    protected_accuracy: _figures_pb2.Rate
    recoverable_accuracy: _figures_pb2.Rate
    half_interval: _figures_pb2.Rate
    def __init__(self, hold_out: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ..., clean_accuracy: _Optional[_Union[_figures_pb2.Rate, _Mapping]] = ..., protected_accuracy: _Optional[_Union[_figures_pb2.Rate, _Mapping]] = ..., recoverable_accuracy: _Optional[_Union[_figures_pb2.Rate, _Mapping]] = ..., half_interval: _Optional[_Union[_figures_pb2.Rate, _Mapping]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("campaign", "offer_revision", "sequence", "minimum_group_size", "outcome", "quarantined_by_reason", "verified_by_class", "psnr", "ssim", "changed_share_mean", "victim_check", "noise")
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    OFFER_REVISION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BY_REASON_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_BY_CLASS_FIELD_NUMBER: _ClassVar[int]
    PSNR_FIELD_NUMBER: _ClassVar[int]
    SSIM_FIELD_NUMBER: _ClassVar[int]
    CHANGED_SHARE_MEAN_FIELD_NUMBER: _ClassVar[int]
    VICTIM_CHECK_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    campaign: int
    offer_revision: int
    sequence: int
    minimum_group_size: int
    outcome: Outcome
    quarantined_by_reason: _containers.RepeatedCompositeFieldContainer[ReasonCount]
    verified_by_class: _containers.RepeatedCompositeFieldContainer[ClassCount]
    psnr: _figures_pb2.Histogram
    ssim: _figures_pb2.Histogram
    changed_share_mean: _figures_pb2.Rate
    victim_check: VictimCheck
    noise: _figures_pb2.Noise
    def __init__(self, campaign: _Optional[int] = ..., offer_revision: _Optional[int] = ..., sequence: _Optional[int] = ..., minimum_group_size: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., quarantined_by_reason: _Optional[_Iterable[_Union[ReasonCount, _Mapping]]] = ..., verified_by_class: _Optional[_Iterable[_Union[ClassCount, _Mapping]]] = ..., psnr: _Optional[_Union[_figures_pb2.Histogram, _Mapping]] = ..., ssim: _Optional[_Union[_figures_pb2.Histogram, _Mapping]] = ..., changed_share_mean: _Optional[_Union[_figures_pb2.Rate, _Mapping]] = ..., victim_check: _Optional[_Union[VictimCheck, _Mapping]] = ..., noise: _Optional[_Union[_figures_pb2.Noise, _Mapping]] = ...) -> None: ...

class SubmitReportReply(_message.Message):
    __slots__ = ("repeated",)
    REPEATED_FIELD_NUMBER: _ClassVar[int]
    repeated: bool
    def __init__(self, repeated: _Optional[bool] = ...) -> None: ...
