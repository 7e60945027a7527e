"""Evaluation: all models on the same test rows, the champion and why, and a report for people."""
