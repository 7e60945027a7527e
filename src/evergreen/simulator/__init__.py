"""Simulator: the world outside. Nothing imports it but its own command and the tests."""
