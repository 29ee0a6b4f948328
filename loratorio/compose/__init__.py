"""Composition of predictions: tensors in, tensors out. Knows no model, no host and no file."""
