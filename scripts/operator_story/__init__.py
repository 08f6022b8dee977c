"""The story of an operator who opens a server to strangers. See run.py."""
