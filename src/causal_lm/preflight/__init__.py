"""Preflight: prove the alignments of a causal language model by behaviour. Needs torch alone."""

from causal_lm.preflight.audit import preflight
from causal_lm.preflight.page import to_html
from causal_lm.preflight.report import Finding, Report

__all__ = ["Finding", "Report", "preflight", "to_html"]
