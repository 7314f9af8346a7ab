from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from medveil.protos.generate import generated
from medveil.protos.v1 import campaign_pb2, figures_pb2, report_pb2, services_pb2, status_pb2
from medveil.protos.v1.conventions import (
    MAX_MESSAGE_BYTES,
    PSNR_EDGES_DB,
    SSIM_EDGES,
    methods,
    phone_fingerprint,
    same_fingerprint,
)

FROM_A_SITE = (
    report_pb2.Report,
    status_pb2.Beat,
    campaign_pb2.AnswerOfferRequest,
    campaign_pb2.ListOffersRequest,
)
ENROLMENT = (services_pb2.JoinRequest, services_pb2.RenewRequest)


def fields(descriptor: Any) -> Iterator[Any]:
    for field in descriptor.fields:
        yield field
        if field.message_type is not None:
            yield from fields(field.message_type)


@pytest.mark.dev
def test_the_committed_code_is_what_the_protos_compile_to() -> None:
    code = generated()
    assert len(code) == 2 * len(list(next(iter(code)).parent.glob("*.proto")))
    for path, text in code.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m medveil.protos.generate"


@pytest.mark.parametrize("message", FROM_A_SITE, ids=lambda m: m.DESCRIPTOR.name)
def test_what_a_site_sends_has_no_field_for_text_or_bytes(message: Any) -> None:
    for field in fields(message.DESCRIPTOR):
        assert field.type not in (field.TYPE_STRING, field.TYPE_BYTES), field.full_name


def test_the_list_of_messages_from_a_site_is_complete() -> None:
    calls = [*methods("CampaignService").values(), *methods("EnrolmentService").values()]
    requests = {call.request for call in calls} - {status_pb2.WatchStatusRequest}
    assert requests == {*FROM_A_SITE, *ENROLMENT}


def test_a_report_with_everything_in_it_stays_under_64_kib() -> None:
    most = figures_pb2.Count(exact=2**63)
    report = report_pb2.Report(campaign=2**63, sequence=2**31, offer_revision=2**31, minimum_group_size=2**31)
    for name in ("images", "verified", "not_protectable", "quarantined", "unfinished"):
        getattr(report.outcome, name).CopyFrom(most)
    for reason in figures_pb2.QuarantineReason.values():
        report.quarantined_by_reason.add(reason=reason, images=most)
    for index in range(1000):
        report.verified_by_class.add(class_index=index, verified=most)
    report.psnr.bins.extend([most] * (len(PSNR_EDGES_DB) + 1))
    report.ssim.bins.extend([most] * (len(SSIM_EDGES) + 1))
    assert report.ByteSize() < MAX_MESSAGE_BYTES


def test_a_withheld_count_is_not_zero_on_the_wire() -> None:
    withheld = figures_pb2.Count(suppressed=figures_pb2.SUPPRESSION_GROUP_TOO_SMALL)
    zero = figures_pb2.Count(exact=0)
    assert withheld.SerializeToString() != zero.SerializeToString()
    assert zero.WhichOneof("value") == "exact"


def test_fingerprints_survive_the_phone() -> None:
    spoken = phone_fingerprint(b"certificate")
    assert same_fingerprint(spoken.lower().replace("-", " "), b"certificate")
    assert not same_fingerprint(spoken, b"another")
    assert not set(spoken) & set("0189")
