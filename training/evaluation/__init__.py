"""Evaluation of bundles and runs on a dataset: metrics, results, table and picture."""
