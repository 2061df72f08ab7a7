"""Markov kernels, and the samplers that run chains of them."""
