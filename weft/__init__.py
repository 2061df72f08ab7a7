"""Weft: a probabilistic programming language inside JAX."""
