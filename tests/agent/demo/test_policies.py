"""What the demonstration's sites are told about classes that the shipped bundle doesn't know."""

from __future__ import annotations

from pathlib import Path

import pytest

from medveil.agent.demo import federation
from medveil.agent.demo.demonstration import shipped
from medveil.agent.demo.sites import SITES, Hospitals
from medveil.agent.policy import load_policy


class Unwatched:
    def step(self, text: str) -> None: ...

    def images(self, done: int, total: int) -> None: ...


@pytest.mark.parametrize(
    "aliases", [{}, {'a "quoted" name\\': "clear", "Pneumonie-Verdacht äöü 🫁": "nodules"}]
)
def test_whatever_the_users_folders_are_called_the_policy_can_be_read(
    tmp_path: Path, aliases: dict[str, str]
) -> None:
    bundle = tmp_path / "phantom.medveil"
    bundle.write_bytes(shipped("phantom.medveil"))
    hospitals = Hospitals({site: tmp_path / site / "images" for site in SITES}, aliases)
    demonstration = federation._Demonstration(tmp_path, hospitals, bundle, Unwatched())
    for site in SITES:
        (tmp_path / site).mkdir()
        demonstration._write_policy(site)
        policy = load_policy(demonstration._policy(site))
        assert policy.classes == aliases
        assert policy.campaigns is not None
        assert policy.campaigns.source == hospitals.sources[site]
