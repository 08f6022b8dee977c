"""treadle: an open training-as-a-service server that speaks the Tinker API."""

__version__ = "0.1.0"
