"""Evergreen: a recommender that keeps itself fresh, on Kubeflow."""
