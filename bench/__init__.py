"""Measurements; run as `./dev bench NAME` or `python -m bench NAME`."""
