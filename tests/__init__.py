"""Tests of martlet."""
