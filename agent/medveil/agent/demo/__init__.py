"""A demonstration that needs nothing: it draws labelled phantoms and protects them with the bundle shipped here.

``phantom.medveil`` was trained by ``bench/demo_bundle.py``; ``phantom.fingerprint`` names who signed it.
"""

from __future__ import annotations

from medveil.agent.demo.demonstration import Demonstration, demonstrate

__all__ = ["Demonstration", "demonstrate"]
