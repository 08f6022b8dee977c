"""What all sections of the Settings tree share. It knows no setting."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """What all sections share: immutable, no unknown keys, documented by the strings under the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
