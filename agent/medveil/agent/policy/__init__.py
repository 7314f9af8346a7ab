"""What this site allows. The steward's word; nothing in a bundle or a campaign can widen it."""

from __future__ import annotations

from medveil.agent.policy.site_policy import SitePolicy, WindowSettings, load_policy, narrowed

__all__ = ["SitePolicy", "WindowSettings", "load_policy", "narrowed"]
