"""Kubeflow Pipelines steps, one a file: each a thin component around one call into evergreen."""
