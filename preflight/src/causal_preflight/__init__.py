"""Check a causal language model's label shift, PAD handling and causal mask by its behavior.

Needs torch alone. Start with `preflight`; `causal_preflight.lightning` has a Lightning callback.
"""

from causal_preflight.audit import preflight
from causal_preflight.report import Finding, Report, to_html

__all__ = ["Finding", "Report", "preflight", "to_html"]
