"""Demonstrations that need nothing: they draw labelled phantoms and protect them with the bundle shipped here.

    demonstration   one hospital, through `protect`
    federation      a coordinator and three hospitals, through a campaign

``phantom.medveil`` was trained by ``bench/demo_bundle.py``; ``phantom.fingerprint`` names who signed it.
"""

from __future__ import annotations

from medveil.agent.demo.demonstration import Demonstration, demonstrate
from medveil.agent.demo.federation import FederationWatch, show_campaign

__all__ = ["Demonstration", "FederationWatch", "demonstrate", "show_campaign"]
