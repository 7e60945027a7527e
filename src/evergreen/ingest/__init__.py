"""Ingest: a foreign log, read through a mapping, becomes a snapshot."""
