"""The paper's Table 1 for any network: counts parameters, multiply-adds, activations and receptive fields."""

from resnet_backbone.analysis.analyze import NetworkAnalysis, analyze, analyze_catalogue, analyze_network
from resnet_backbone.analysis.tables import format_overview, format_table

__all__ = [
    "NetworkAnalysis",
    "analyze",
    "analyze_catalogue",
    "analyze_network",
    "format_overview",
    "format_table",
]
