"""Nouns and rules of treadle, on the standard library and numpy only.

Every other layer speaks in these types. Nothing here does I/O, reads a clock or imports torch.
"""
