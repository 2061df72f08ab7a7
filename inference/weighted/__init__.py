"""Weighted draws: importance sampling and enumeration."""
