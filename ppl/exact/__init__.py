"""Exact marginalisation: choices are summed or integrated out, and recovered."""
