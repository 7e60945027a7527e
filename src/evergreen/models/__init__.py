"""Models: how a row becomes tensors, the networks that score it, and the package that carries both. A block."""
