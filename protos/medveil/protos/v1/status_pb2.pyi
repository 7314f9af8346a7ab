# ruff: noqa
# fmt: off
# mypy: ignore-errors
from medveil.protos.v1 import campaign_pb2 as _campaign_pb2
from medveil.protos.v1 import figures_pb2 as _figures_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Activity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTIVITY_UNSPECIFIED: _ClassVar[Activity]
    ACTIVITY_IDLE: _ClassVar[Activity]
    ACTIVITY_WAITING_FOR_STEWARD: _ClassVar[Activity]
    ACTIVITY_PROTECTING: _ClassVar[Activity]
    ACTIVITY_REPORTING: _ClassVar[Activity]
    ACTIVITY_STOPPED: _ClassVar[Activity]

class Trouble(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TROUBLE_UNSPECIFIED: _ClassVar[Trouble]
    TROUBLE_DISK_FULL: _ClassVar[Trouble]
    TROUBLE_SOURCE_UNREADABLE: _ClassVar[Trouble]
    TROUBLE_BUNDLE_REFUSED: _ClassVar[Trouble]
    TROUBLE_POLICY: _ClassVar[Trouble]
    TROUBLE_BUSY: _ClassVar[Trouble]
    TROUBLE_OTHER: _ClassVar[Trouble]
ACTIVITY_UNSPECIFIED: Activity
ACTIVITY_IDLE: Activity
ACTIVITY_WAITING_FOR_STEWARD: Activity
ACTIVITY_PROTECTING: Activity
ACTIVITY_REPORTING: Activity
ACTIVITY_STOPPED: Activity
TROUBLE_UNSPECIFIED: Trouble
TROUBLE_DISK_FULL: Trouble
TROUBLE_SOURCE_UNREADABLE: Trouble
TROUBLE_BUNDLE_REFUSED: Trouble
TROUBLE_POLICY: Trouble
TROUBLE_BUSY: Trouble
TROUBLE_OTHER: Trouble

class Beat(_message.Message):
    __slots__ = ("activity", "trouble", "campaign", "images", "done", "images_per_s", "since_last_work_s", "certificate_days", "egress_bytes", "version_major", "version_minor", "version_patch")
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    IMAGES_PER_S_FIELD_NUMBER: _ClassVar[int]
    SINCE_LAST_WORK_S_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_DAYS_FIELD_NUMBER: _ClassVar[int]
    EGRESS_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSION_MAJOR_FIELD_NUMBER: _ClassVar[int]
    VERSION_MINOR_FIELD_NUMBER: _ClassVar[int]
    VERSION_PATCH_FIELD_NUMBER: _ClassVar[int]
    activity: Activity
    trouble: Trouble
    campaign: int
    images: _figures_pb2.Count
    done: _figures_pb2.Count
    images_per_s: float
    since_last_work_s: int
    certificate_days: int
    egress_bytes: int
    version_major: int
    version_minor: int
    version_patch: int
    def __init__(self, activity: _Optional[_Union[Activity, str]] = ..., trouble: _Optional[_Union[Trouble, str]] = ..., campaign: _Optional[int] = ..., images: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ..., done: _Optional[_Union[_figures_pb2.Count, _Mapping]] = ..., images_per_s: _Optional[float] = ..., since_last_work_s: _Optional[int] = ..., certificate_days: _Optional[int] = ..., egress_bytes: _Optional[int] = ..., version_major: _Optional[int] = ..., version_minor: _Optional[int] = ..., version_patch: _Optional[int] = ...) -> None: ...

class BeatReply(_message.Message):
    __slots__ = ("next_beat_s", "offers_waiting", "renew_certificate")
    NEXT_BEAT_S_FIELD_NUMBER: _ClassVar[int]
    OFFERS_WAITING_FIELD_NUMBER: _ClassVar[int]
    RENEW_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    next_beat_s: int
    offers_waiting: bool
    renew_certificate: bool
    def __init__(self, next_beat_s: _Optional[int] = ..., offers_waiting: _Optional[bool] = ..., renew_certificate: _Optional[bool] = ...) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("campaign", "interval_ms")
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    campaign: int
    interval_ms: int
    def __init__(self, campaign: _Optional[int] = ..., interval_ms: _Optional[int] = ...) -> None: ...

class SiteStatus(_message.Message):
    __slots__ = ("site", "state", "late", "waived", "last_contact_unix_s", "last_beat", "reports")
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    WAIVED_FIELD_NUMBER: _ClassVar[int]
    LAST_CONTACT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    LAST_BEAT_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    site: str
    state: _campaign_pb2.SiteState
    late: bool
    waived: bool
    last_contact_unix_s: int
    last_beat: Beat
    reports: int
    def __init__(self, site: _Optional[str] = ..., state: _Optional[_Union[_campaign_pb2.SiteState, str]] = ..., late: _Optional[bool] = ..., waived: _Optional[bool] = ..., last_contact_unix_s: _Optional[int] = ..., last_beat: _Optional[_Union[Beat, _Mapping]] = ..., reports: _Optional[int] = ...) -> None: ...

class CampaignStatus(_message.Message):
    __slots__ = ("campaign", "name", "state", "complete", "sites", "at_unix_s")
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    campaign: int
    name: str
    state: _campaign_pb2.CampaignState
    complete: bool
    sites: _containers.RepeatedCompositeFieldContainer[SiteStatus]
    at_unix_s: int
    def __init__(self, campaign: _Optional[int] = ..., name: _Optional[str] = ..., state: _Optional[_Union[_campaign_pb2.CampaignState, str]] = ..., complete: _Optional[bool] = ..., sites: _Optional[_Iterable[_Union[SiteStatus, _Mapping]]] = ..., at_unix_s: _Optional[int] = ...) -> None: ...
