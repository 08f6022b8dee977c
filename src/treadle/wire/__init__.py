"""Bytes to domain and back: compression, JSON bodies, protobuf passes, stored payloads, encoded results.

Nothing here knows HTTP, the store or a model's weights. Every failure is a TreadleError: UnreadableBody when not
even the owner of a request can be read, InvalidRequest or NotSupported when the rest of it cannot be honoured.
"""
