"""Variational inference: objectives, guides, fits and their diagnosis."""
