"""Evaluation of detectors on DATASETS.TEST, with an evaluator for each type of data set."""
