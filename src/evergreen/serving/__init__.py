"""Serving: a KServe model that ranks items for a user, the server it runs on, and a client for it."""
