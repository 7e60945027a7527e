"""Metrics with confidence intervals: numpy only, pure functions, no clock and no file."""
