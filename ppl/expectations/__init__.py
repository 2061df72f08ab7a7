"""Expectations of programs, and unbiased estimates of their gradients."""
