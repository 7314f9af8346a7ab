"""The site's key and its sidecars: exact, bound to one file, refused by name when anything is swapped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyrage
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from medveil.agent.sealing import Binding, SiteKey, frame_change, load_site_key, open_sidecar, write_sidecar
from medveil.agent.sealing.sidecar import difference, undo
from medveil.models.errors import ConfigurationError, RefusedError

BINDING = Binding("11" * 32, "22" * 32, "33" * 32, False)
DTYPES = st.sampled_from([np.uint8, np.int16, np.uint16, np.float32])


@pytest.fixture
def key() -> SiteKey:
    return load_site_key(create=True)


def test_the_first_use_makes_a_key_that_only_its_owner_may_read(home):
    key = load_site_key(create=True)
    assert key.created
    assert key.path.parent == home
    assert key.path.stat().st_mode & 0o077 == 0
    again = load_site_key(create=True)
    assert not again.created
    assert again.recipient == key.recipient


def test_a_secret_belongs_to_one_key_and_one_purpose(key, tmp_path):
    other = load_site_key(tmp_path / "other.age", create=True)
    secrets = {key.secret_for("a"), key.secret_for("b"), other.secret_for("a")}
    assert len(secrets) == 3
    assert {len(secret) for secret in secrets} == {32}
    assert load_site_key().secret_for("a") == key.secret_for("a")


def test_without_leave_no_key_is_made(home):
    with pytest.raises(ConfigurationError) as caught:
        load_site_key()
    assert caught.value.code == "no-key"
    assert not home.exists()


def test_a_key_that_others_may_read_is_refused(key):
    key.path.chmod(0o640)
    with pytest.raises(ConfigurationError) as caught:
        load_site_key()
    assert caught.value.code == "key-permissions"


def test_a_file_that_is_no_key_is_refused(tmp_path):
    (tmp_path / "k").write_text("hello")
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(ConfigurationError) as caught:
        load_site_key(tmp_path / "k")
    assert caught.value.code == "key-unreadable"


def test_a_key_never_shows_its_secret(key):
    assert "AGE-SECRET" not in repr(key)


@given(st.data(), DTYPES)
def test_the_difference_is_exact_for_every_stored_type(data, dtype):
    shape = data.draw(stn.array_shapes(min_dims=2, max_dims=2, max_side=5))
    clean = data.draw(stn.arrays(dtype, shape))
    protected = data.draw(stn.arrays(dtype, shape))
    back = undo(protected, difference(clean, protected), shape, np.dtype(dtype))
    assert back.tobytes() == clean.tobytes()


@pytest.mark.parametrize("frames", [1, 3])
def test_what_was_sealed_comes_back(key, tmp_path, frames, rng):
    clean = [rng.integers(0, 4096, (700, 600, 3)).astype(np.int16) for _ in range(frames)]
    protected = [a + 1 for a in clean[1:]]
    changes = [frame_change(clean[0], None)] + [
        frame_change(c, p) for c, p in zip(clean[1:], protected, strict=True)
    ]
    write_sidecar(tmp_path / "s", BINDING, b"patch", changes, [key.recipient])
    with open_sidecar(tmp_path / "s", key, protected_sha256=BINDING.protected_sha256) as found:
        assert found.binding == BINDING
        assert found.patch == b"patch"
        back = list(found.clean_frames(iter(protected)))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(back, clean, strict=True))


def seal(path: Path, key: SiteKey, binding: Binding = BINDING, size: int = 3_000_000) -> None:
    noise = np.random.default_rng(5).bytes(size)
    write_sidecar(path, binding, noise, [frame_change(np.ones((2, 2), np.uint8), None)], [key.recipient])


def open_all(path: Path, key: SiteKey) -> bytes:
    with open_sidecar(path, key, protected_sha256=BINDING.protected_sha256) as found:
        list(found.clean_frames(iter(())))
        return found.patch


def test_another_key_is_refused_by_name(key, tmp_path):
    seal(tmp_path / "s", key)
    other = load_site_key(tmp_path / "other", create=True)
    with pytest.raises(RefusedError) as caught:
        open_all(tmp_path / "s", other)
    assert caught.value.code == "wrong-key"


def test_every_recipient_can_open(key, tmp_path):
    other = load_site_key(tmp_path / "other", create=True)
    write_sidecar(tmp_path / "s", BINDING, b"p", [], [key.recipient, other.recipient])
    assert open_all(tmp_path / "s", key) == open_all(tmp_path / "s", other) == b"p"


def test_a_recipient_that_is_no_key_is_refused(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        write_sidecar(tmp_path / "s", BINDING, b"", [], ["age1nonsense"])
    assert caught.value.code == "recipient"


def test_a_sidecar_of_another_file_is_refused(key, tmp_path):
    seal(tmp_path / "s", key, Binding("44" * 32, "22" * 32, "33" * 32, False))
    with pytest.raises(RefusedError) as caught:
        open_all(tmp_path / "s", key)
    assert caught.value.code == "wrong-sidecar"


def test_a_missing_sidecar_is_refused(key, tmp_path):
    with pytest.raises(RefusedError) as caught:
        open_all(tmp_path / "nothing", key)
    assert caught.value.code == "no-sidecar"


def test_one_flipped_bit_anywhere_is_refused(key, tmp_path):
    seal(tmp_path / "s", key, size=200)
    data = (tmp_path / "s").read_bytes()
    for at in range(len(data)):
        (tmp_path / "t").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(RefusedError):
            open_all(tmp_path / "t", key)


@pytest.mark.parametrize("kept", [0, 10, 200, 1_500_000, -1, -17])
def test_a_cut_sidecar_is_refused(key, tmp_path, kept):
    seal(tmp_path / "s", key)
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:kept])
    with pytest.raises(RefusedError) as caught:
        open_all(tmp_path / "s", key)
    assert caught.value.code == "wrong-sidecar"


def test_blocks_cannot_change_places(key, tmp_path):
    seal(tmp_path / "s", key)
    data = (tmp_path / "s").read_bytes()
    block = 2**20 + 16
    start = len(data) % block if len(data) % block > 2000 else 0
    head = data.index(b"}", 20) + 1
    body = data[head:]
    swapped = body[block : 2 * block] + body[:block] + body[2 * block :]
    assert start >= 0
    (tmp_path / "s").write_bytes(data[:head] + swapped)
    with pytest.raises(RefusedError) as caught:
        open_all(tmp_path / "s", key)
    assert caught.value.code == "wrong-sidecar"


def test_nothing_readable_of_the_payload_stands_in_the_file(key, tmp_path):
    write_sidecar(tmp_path / "s", BINDING, b"CANARY" * 100, [], [key.recipient])
    assert b"CANARY" not in (tmp_path / "s").read_bytes()
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_the_key_file_is_an_ordinary_age_identity(key):
    sealed = pyrage.encrypt(b"x", [pyrage.x25519.Recipient.from_str(key.recipient)])
    secret = [line for line in key.path.read_text().splitlines() if not line.startswith("#")]
    assert pyrage.decrypt(sealed, [pyrage.x25519.Identity.from_str(secret[0])]) == b"x"
