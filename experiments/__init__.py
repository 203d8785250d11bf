"""Command lines: parse → build → fit → write. Run from a checkout, not installed."""
