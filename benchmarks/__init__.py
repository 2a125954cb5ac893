"""Measurements. Nothing here is tested for speed, and nothing in the package imports it."""
