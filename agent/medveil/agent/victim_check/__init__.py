"""What a model would learn from this site's release, tried at the site: victims trained in onnxruntime, no torch.

`check.check_release` does all of it; what is here is what others ask about a check that was made. The figures stay at
the site until the steward's policy lets their means leave (`medveil.agent.egress`).
"""

from __future__ import annotations

from medveil.agent.victim_check.record import recorded_check
from medveil.agent.victim_check.verdict import SiteCheck, VictimFinding

__all__ = ["SiteCheck", "VictimFinding", "recorded_check"]
