"""The ways in which callers are recognised, one file each. gateway/auth.py asks them in turn."""
