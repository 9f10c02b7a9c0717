"""What every section is made of: a frozen table of strict types, and numbers with a range."""

from typing import Annotated, ClassVar

import pydantic
from pydantic import Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
    shorthands: ClassVar[dict[str, str]] = {}
    """Keys of the section's table, with their meaning, that are no fields: reading a config puts
    the fields they stand for in their place."""
