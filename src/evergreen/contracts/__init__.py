"""Contracts: the event schema, the layout of every artifact, and the exception tree. Imports nothing of ours."""
