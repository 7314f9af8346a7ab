"""What a model would learn from this site's own release with masks: U-Nets trained in onnxruntime, no torch.

As `medveil.agent.victim_check` for labelled images. `check.check_masked_release` does all of it; what is here is what
others ask about a check that was made.
"""

from __future__ import annotations

from medveil.agent.segmentation.site_check.record import recorded_masked_check
from medveil.agent.segmentation.site_check.verdict import MaskedFinding, MaskedSiteCheck

__all__ = ["MaskedFinding", "MaskedSiteCheck", "recorded_masked_check"]
