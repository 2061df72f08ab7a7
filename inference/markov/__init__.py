"""Markov kernels, and the samplers that run them as chains."""
