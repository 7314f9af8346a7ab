"""The policy narrows, never widens, and fails closed."""

from __future__ import annotations

from pathlib import Path

import pytest

from medveil.agent.policy import SitePolicy, load_policy, narrowed
from medveil.models.errors import ConfigurationError

SIGNER = "ed25519:AAAA-BBBB-CCCC-DDDD-EEEE-FFFF-GGGG-2222"


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "p.toml").write_text(text)
    return tmp_path / "p.toml"


def test_without_a_file_the_defaults_are_safe():
    policy = load_policy(None)
    assert policy.maximum_epsilon == 8.0
    assert policy.trusted_signers is None
    assert policy.recipients == ()


def test_a_file_says_what_the_site_allows(tmp_path):
    policy = load_policy(
        write(tmp_path, f'maximum_epsilon = 4\nformats = ["png"]\ntrusted_signers = ["{SIGNER.lower()}"]\n')
    )
    assert policy.maximum_epsilon == 4
    assert policy.trusted_signers == (SIGNER,)
    assert policy.allows_format("png")
    assert not policy.allows_format("jpeg")


@pytest.mark.parametrize(
    "text",
    [
        "maximum_epsilom = 4",
        "maximum_epsilon = 0",
        "maximum_epsilon = nan",
        "maximum_mask = 1.5",
        'maximum_epsilon = "many"',
        'trusted_signers = ["someone"]',
        'recipients = ["age1nonsense"]',
        "not toml",
    ],
)
def test_a_policy_with_a_mistake_is_refused_as_a_whole(text, tmp_path):
    with pytest.raises(ConfigurationError):
        load_policy(write(tmp_path, text))


def test_a_policy_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        load_policy(tmp_path / "nothing.toml")
    assert caught.value.code == "policy-unreadable"


def test_a_method_that_is_not_allowed_is_refused():
    with pytest.raises(ConfigurationError) as caught:
        SitePolicy(allowed_methods=("salm",)).check_method("lsp")
    assert caught.value.code == "method-not-allowed"


def test_a_bundle_is_narrowed_and_a_call_that_asks_for_more_is_refused():
    assert narrowed("epsilon", None, 16.0, 8.0) == 8.0
    assert narrowed("epsilon", None, 4.0, 8.0) == 4.0
    assert narrowed("epsilon", 2.0, 4.0, 8.0) == 2.0
    for wrong in (9.0, 0.0, -1.0, float("nan")):
        with pytest.raises(ConfigurationError) as caught:
            narrowed("epsilon", wrong, 4.0, 8.0)
        assert caught.value.code == "epsilon"


def test_the_digest_covers_every_word():
    assert SitePolicy().digest() == SitePolicy().digest()
    assert SitePolicy(maximum_epsilon=4).digest() != SitePolicy().digest()


def test_windows_are_read_from_their_own_table(tmp_path):
    policy = load_policy(
        write(
            tmp_path,
            "name_source = false\n[windows]\nchoice = 'both'\npresets = { CT = [[40, 400], [-600, 1500]] }",
        )
    )
    assert policy.windows.choice == "both"
    assert policy.windows.presets == {"CT": ((40.0, 400.0), (-600.0, 1500.0))}
    assert not policy.name_source
    assert policy.digest() != SitePolicy(name_source=False).digest()


@pytest.mark.parametrize(
    "windows",
    [
        "choice = 'widest'",
        "presets = { CT = [[40, 0]] }",
        "nifti = [240, -160]",
        "percentiles = [0.5, 101]",
        "percentiles = [99, 1]",
        "width = 400",
    ],
)
def test_a_window_that_is_none_is_refused(windows, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        load_policy(write(tmp_path, f"[windows]\n{windows}"))
    assert caught.value.code == "policy"
