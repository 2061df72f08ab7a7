"""Exact marginalisation: choices summed or integrated out, and recovered."""
