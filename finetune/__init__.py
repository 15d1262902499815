"""encoder/ + features/ -> results: linear evaluation, ICU fusion, metrics, report."""
