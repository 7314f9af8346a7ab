"""A site's own folder, a campaign's offer with the bundle that is shipped, and orders about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from medveil.agent.campaign_work.book import Answer, Book, book_path
from medveil.agent.campaign_work.bundles import Bundles
from medveil.agent.campaign_work.places import bundles_folder, federation_folder
from medveil.models.phantoms import CLASS_NAMES, draw
from medveil.protos.fleet import Order, Step
from medveil.protos.v1 import campaign_pb2

BUNDLE = (files("medveil.agent.demo") / "phantom.medveil").read_bytes()
SIGNER = (files("medveil.agent.demo") / "phantom.fingerprint").read_text(encoding="ascii").strip()


@pytest.fixture
def bundle() -> bytes:
    return BUNDLE


@pytest.fixture
def write_policy(tmp_path: Path) -> Callable[..., Path]:
    def write(signer: str = SIGNER, **changes: str) -> Path:
        tables = {
            "source": str(tmp_path / "images"),
            "out": str(tmp_path / "releases"),
            "approve": "ask",
            "methods": '["salm"]',
            **changes,
        }
        path = tmp_path / "site.toml"
        path.write_text(
            f'trusted_signers = ["{signer}"]\nallowed_methods = {tables["methods"]}\n'
            "[egress]\nminimum_group_size = 2\n"
            '[coordinator]\ncampaign = "localhost:8451"\nfleet = "localhost:8453"\n'
            f'[campaigns]\nsource = "{tables["source"]}"\nout = "{tables["out"]}"\napprove = "{tables["approve"]}"\n'
        )
        return path

    return write


@pytest.fixture
def book() -> Iterator[Book]:
    with Book(book_path(federation_folder())) as opened:
        yield opened


@pytest.fixture
def bundles() -> Bundles:
    return Bundles(bundles_folder())


@pytest.fixture
def offer() -> Callable[..., campaign_pb2.Offer]:
    def build(data: bytes = BUNDLE, state: str = "OFFERED", **fields: Any) -> campaign_pb2.Offer:
        defaults: dict[str, Any] = {
            "campaign": 1,
            "revision": 1,
            "name": "chest",
            "task": "classification",
            "method": "salm",
            "epsilon_255": 8.0,
            "mask_ratio": 0.25,
            "bundle_sha256": hashlib.sha256(data).digest(),
            "bundle_size_bytes": len(data),
            "minimum_group_size": 2,
            "state": campaign_pb2.CampaignState.Value(f"CAMPAIGN_STATE_{state}"),
        }
        return campaign_pb2.Offer(**{**defaults, **fields})

    return build


@pytest.fixture
def state_order() -> Callable[[campaign_pb2.Offer], Order]:
    def build(offer: campaign_pb2.Offer) -> Order:
        return Order(
            Step.STATE, offer.campaign, offer.revision, offer.bundle_sha256, offer.bundle_size_bytes,
            offer.SerializeToString(),
        )  # fmt: skip

    return build


@pytest.fixture
def part_order() -> Callable[[campaign_pb2.Offer, int], Order]:
    def build(offer: campaign_pb2.Offer, offset: int) -> Order:
        return Order(
            Step.BUNDLE,
            offer.campaign,
            offer.revision,
            offer.bundle_sha256,
            offer.bundle_size_bytes,
            b"",
            offset,
        )

    return build


@pytest.fixture
def accepted(
    book: Book,
    bundles: Bundles,
    bundle: bytes,
    offer: Callable[..., campaign_pb2.Offer],
    write_policy: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    """A campaign that may begin, over eight phantoms of which one cannot be read."""
    images, labels = draw(8, np.random.default_rng(5), size=32)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "images" / CLASS_NAMES[label] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        PillowImage.fromarray(image).save(place)
    (tmp_path / "images" / "clear" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    policy = write_policy()
    book.offered(offer(state="RUNNING"))
    book.answer(1, Answer.ACCEPTED, "steward")
    place = bundles.path(offer().bundle_sha256)  # trusted before: test_orders has how
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(bundle)
    return policy
