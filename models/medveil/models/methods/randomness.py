"""Randomness that belongs to one image: the same wherever, whenever and beside whatever it is drawn."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["generator_for"]


def generator_for(key: bytes, seed: int, purpose: str) -> np.random.Generator:
    """Return the generator that ``key`` (an image's digest) has under ``seed`` for one named ``purpose``.

    The key's length goes first, so that no two different triples hash the same bytes.
    """
    message = b"%d:%b|%d|%b" % (len(key), key, seed, purpose.encode())
    return np.random.default_rng(int.from_bytes(hashlib.sha256(message).digest(), "big"))
