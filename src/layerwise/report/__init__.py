"""What people read: tables for the terminal, pages for the docs, a report and its pictures."""

from layerwise.report.figures import evaluation
from layerwise.report.html import html
from layerwise.report.inspection_plots import inspection_svg
from layerwise.report.pages import page
from layerwise.report.plots import pareto_svg
from layerwise.report.tables import (
    agreement_table,
    byte_vote,
    claims_table,
    federation_table,
    forecast_line,
    layer_table,
    merge_table,
    methods_table,
    plan_table,
    signature_table,
    structure_json,
    structure_table,
    summary,
    sweep_table,
)

__all__ = [
    "agreement_table",
    "byte_vote",
    "claims_table",
    "evaluation",
    "federation_table",
    "forecast_line",
    "html",
    "inspection_svg",
    "layer_table",
    "merge_table",
    "methods_table",
    "page",
    "pareto_svg",
    "plan_table",
    "signature_table",
    "structure_json",
    "structure_table",
    "summary",
    "sweep_table",
]
