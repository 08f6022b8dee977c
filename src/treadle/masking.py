"""Texts without secrets: what looks like a key or a token is replaced by its first characters.

The second line of defence. The first is that no credential is put into a text at all; this is for what clients put into
places where no credential belongs, and what libraries repeat of it. It refuses to know whether a key is a real one.
Invariant: a masked text holds no more than the prefix of anything that has the form of a key or a token.
"""

from __future__ import annotations

import re

# Our keys and whatever else follows their prefix, JWTs (parts of base64, the first of which is a JSON object), and the
# access tokens of ModelScope and Hugging Face.
_SECRET = re.compile(
    r"(tml-)[A-Za-z0-9._~+/=%-]+"
    r"|(eyJ)[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"
    r"|\b(ms-)[A-Za-z0-9-]{12,}"
    r"|\b(hf_)[A-Za-z0-9]{12,}"
)


def masked(text: str) -> str:
    """`text`, with "tml-***" for "tml-5f3c...", and likewise for tokens. Texts without any are returned as they are."""
    return _SECRET.sub(lambda found: f"{found[found.lastindex or 0]}***", text)
