"""Staging: a function becomes a jaxpr in which random choices are equations. An interpreter runs it."""
