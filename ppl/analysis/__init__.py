"""Analyses of jaxprs: dependence, constants, equality of code."""
