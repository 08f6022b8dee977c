"""Bodies of operators' routes about losses. See bodies.py.

What they do not know is refused by name: an operator's mistake must not decide something else.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from treadle.wire.bodies import Body, Id

# More than all losses together have; and than all operations.
_MAX_BOUNDS = 64
_MAX_OPERATIONS = 2_000
_Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


class LossRuleBody(Body):
    """What a scope says about a loss, as it shall be: what is absent is not said."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    is_enabled: bool | None = None
    """Whether it may be run; null: as the next wider scope says."""
    bounds: Annotated[dict[Id, _Pair], Field(max_length=_MAX_BOUNDS)] = Field(default_factory=dict)
    """Lowest and highest value of settings, both included."""


class LossOperationsBody(Body):
    """The operations of traced and named losses that shall be switched off: these and no others."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    disabled: Annotated[list[Id], Field(max_length=_MAX_OPERATIONS)]
    """Names like torch.exp, Tensor.exp or operator.mul: an operation's other forms are names of their own."""
