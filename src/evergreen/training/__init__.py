"""Stage: from feature tables to a training set, and from a training set to a model package."""
