"""Loops in virtual time: a simulated world and the stages of the pipelines in one process, under several policies."""
