"""What bundles and runs make of a dataset: metrics, results, table, picture."""
