"""Fraud: which events no person made. Rules that a stream can keep as state, and a detector over users' windows."""
