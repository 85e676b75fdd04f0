"""Preflight: prove the alignments of a causal language model by behaviour. Needs torch alone."""

from causal_preflight.audit import preflight
from causal_preflight.html_page import to_html
from causal_preflight.report import Finding, Report

__all__ = ["Finding", "Report", "preflight", "to_html"]
