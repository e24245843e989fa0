"""The deployment files as data: the compose file, and the Dockerfile stage by stage. No engine is needed."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"


@dataclass(slots=True)
class Stage:
    """One FROM and what follows. steps: (instruction, its arguments), continuation lines joined."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.steps if name == instruction]


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def stages() -> dict[str, Stage]:
    """The Dockerfile's stages by name, in their order."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    found: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in text.splitlines():
        instruction, _, arguments = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = arguments.split()
            stage = found[name] = Stage(name, base)
        elif instruction and not instruction.startswith("#"):
            assert stage is not None, f"{instruction} before FROM"
            stage.steps.append((instruction, arguments.strip()))
    return found


def lineage(name: str) -> list[Stage]:
    """A stage and those that it builds upon, the first of them first."""
    known = stages()
    found = [known[name]]
    while found[0].base in known:
        found.insert(0, known[found[0].base])
    return found


def environment(stage: Stage) -> dict[str, str]:
    return dict(item.split("=", 1) for line in stage.all("ENV") for item in shlex.split(line))
