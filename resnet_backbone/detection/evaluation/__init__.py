"""Detectors evaluated on DATASETS.TEST, each data set by its type."""
