"""Contracts and builders for tests of treadle and of programs built on it: shipped, and free of any test framework."""
