"""Settings that every process shares, and how all settings are read.

Each worker extends `CoreSettings` beside its own code. A settings object is built once, in a `__main__`, from
the environment (prefix ECHOSIGHT_), and passed in; nothing else reads the environment.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.core.errors import SettingsError


class CoreSettings(BaseSettings):
    """What every process must agree on."""

    model_config = SettingsConfigDict(env_prefix="ECHOSIGHT_", extra="ignore", frozen=True)

    redis_url: str = Field(
        default="",
        validation_alias=AliasChoices("REDIS_URL", "ECHOSIGHT_REDIS_URL"),
        description="redis://, rediss:// or redis+cluster://, 7.0 or newer; empty: the embedded server",
    )
    data_dir: Path = Field(
        default=Path("var"), description="where store, registry, checkpoints and the embedded server live"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe log event to print"
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="console: for people; json: one object a line, for collectors"
    )
    model_name: str = Field(
        default="radar",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="name under which the trainer publishes and the API serves",
    )

    @property
    def store_dir(self) -> Path:
        return self.data_dir / "store"

    @property
    def registry_dir(self) -> Path:
        return self.data_dir / "models"

    @classmethod
    def read(cls, **overrides: Any) -> Self:
        """Settings from the environment. Raises SettingsError naming the variable, its value and the remedy."""
        try:
            return cls(**overrides)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            variable = environment_name(cls, name) if name in cls.model_fields else name
            raise SettingsError(
                f"setting {variable} is {first.get('input')!r}: {first['msg']}",
                remedy="see the table in docs/settings.md",
            ) from None


def environment_name(settings: type[CoreSettings], field: str) -> str:
    """The environment variable behind one field."""
    alias = settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return f"ECHOSIGHT_{field.upper()}"
