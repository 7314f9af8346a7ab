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

class CampaignState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAMPAIGN_STATE_UNSPECIFIED: _ClassVar[CampaignState]
    CAMPAIGN_STATE_DRAFT: _ClassVar[CampaignState]
    CAMPAIGN_STATE_OFFERED: _ClassVar[CampaignState]
    CAMPAIGN_STATE_RUNNING: _ClassVar[CampaignState]
    CAMPAIGN_STATE_PAUSED: _ClassVar[CampaignState]
    CAMPAIGN_STATE_SEALED: _ClassVar[CampaignState]
    CAMPAIGN_STATE_ABORTED: _ClassVar[CampaignState]

class SiteState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SITE_STATE_UNSPECIFIED: _ClassVar[SiteState]
    SITE_STATE_INVITED: _ClassVar[SiteState]
    SITE_STATE_JOINED: _ClassVar[SiteState]
    SITE_STATE_OFFERED: _ClassVar[SiteState]
    SITE_STATE_ACCEPTED: _ClassVar[SiteState]
    SITE_STATE_DECLINED: _ClassVar[SiteState]
    SITE_STATE_PROTECTING: _ClassVar[SiteState]
    SITE_STATE_REPORTED: _ClassVar[SiteState]
    SITE_STATE_VERIFIED: _ClassVar[SiteState]

class Answer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ANSWER_UNSPECIFIED: _ClassVar[Answer]
    ANSWER_ACCEPTED: _ClassVar[Answer]
    ANSWER_DECLINED: _ClassVar[Answer]
CAMPAIGN_STATE_UNSPECIFIED: CampaignState
CAMPAIGN_STATE_DRAFT: CampaignState
CAMPAIGN_STATE_OFFERED: CampaignState
CAMPAIGN_STATE_RUNNING: CampaignState
CAMPAIGN_STATE_PAUSED: CampaignState
CAMPAIGN_STATE_SEALED: CampaignState
CAMPAIGN_STATE_ABORTED: CampaignState
SITE_STATE_UNSPECIFIED: SiteState
SITE_STATE_INVITED: SiteState
SITE_STATE_JOINED: SiteState
SITE_STATE_OFFERED: SiteState
SITE_STATE_ACCEPTED: SiteState
SITE_STATE_DECLINED: SiteState
SITE_STATE_PROTECTING: SiteState
SITE_STATE_REPORTED: SiteState
SITE_STATE_VERIFIED: SiteState
ANSWER_UNSPECIFIED: Answer
ANSWER_ACCEPTED: Answer
ANSWER_DECLINED: Answer

class Offer(_message.Message):
    __slots__ = ("campaign", "revision", "name", "task", "method", "epsilon_255", "mask_ratio", "bundle_sha256", "bundle_size_bytes", "minimum_group_size", "due_unix_s", "state")
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    EPSILON_255_FIELD_NUMBER: _ClassVar[int]
    MASK_RATIO_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_GROUP_SIZE_FIELD_NUMBER: _ClassVar[int]
    DUE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    campaign: int
    revision: int
    name: str
    task: str
    method: str
    epsilon_255: float
    mask_ratio: float
    bundle_sha256: bytes
    bundle_size_bytes: int
    minimum_group_size: int
    due_unix_s: int
    state: CampaignState
    def __init__(self, campaign: _Optional[int] = ..., revision: _Optional[int] = ..., name: _Optional[str] = ..., task: _Optional[str] = ..., method: _Optional[str] = ..., epsilon_255: _Optional[float] = ..., mask_ratio: _Optional[float] = ..., bundle_sha256: _Optional[bytes] = ..., bundle_size_bytes: _Optional[int] = ..., minimum_group_size: _Optional[int] = ..., due_unix_s: _Optional[int] = ..., state: _Optional[_Union[CampaignState, str]] = ...) -> None: ...

class ListOffersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListOffersReply(_message.Message):
    __slots__ = ("offers",)
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    offers: _containers.RepeatedCompositeFieldContainer[Offer]
    def __init__(self, offers: _Optional[_Iterable[_Union[Offer, _Mapping]]] = ...) -> None: ...

class AnswerOfferRequest(_message.Message):
    __slots__ = ("campaign", "revision", "answer")
    CAMPAIGN_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    campaign: int
    revision: int
    answer: Answer
    def __init__(self, campaign: _Optional[int] = ..., revision: _Optional[int] = ..., answer: _Optional[_Union[Answer, str]] = ...) -> None: ...

class AnswerOfferReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
