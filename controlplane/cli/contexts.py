"""Named contexts: which fabric, as whom, for which tenant. The file that keeps them, and which one counts.

    $SANDLOOM_CONFIG, else $XDG_CONFIG_HOME/sandloom/contexts.json, else ~/.config/sandloom/contexts.json   0600
    {"current": "prod", "contexts": {"prod": {"address", "tls_ca", "tls_cert", "tls_key", "tenant"}}}

What counts, the first that there is: --address and --tls-dir, --context, $SANDLOOM_CONTEXT, a home that was named
(--home or $SANDLOOM_HOME), the current context, the fabric of `dev up` in the default home. `local` always means a
home's own fabric.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from controlplane.api.identity import NAME_PATTERN
from controlplane.cli.errors import CliError
from controlplane.cli.home import HOME_VARIABLE, replace_file

FILE_VARIABLE, NAME_VARIABLE = "SANDLOOM_CONFIG", "SANDLOOM_CONTEXT"
LOCAL = "local"
"""The fabric that `dev up` keeps in a home; no name for another one."""


@dataclass(frozen=True)
class NamedContext:
    """How to reach a control plane, and for which tenant an operator acts there (empty: its own)."""

    address: str
    tls_ca: str
    tls_cert: str
    tls_key: str
    tenant: str = ""


@dataclass(frozen=True)
class Contexts:
    """All that is in the file. `current` is empty when none was chosen."""

    path: Path
    current: str = ""
    named: Mapping[str, NamedContext] = field(default_factory=dict)

    def get(self, name: str) -> NamedContext:
        """CliError when there is none of that name."""
        if name not in self.named:
            known = ", ".join(sorted(self.named)) or "none"
            raise CliError(
                f"there is no context {name}", f"{self.path} has {known}", "`sandloom context add` makes one"
            )
        return self.named[name]

    def with_one(self, name: str, context: NamedContext) -> Contexts:
        """With one more, or another one of that name. CliError for a name that is none."""
        if name == LOCAL or not NAME_PATTERN.fullmatch(name):
            raise CliError(f"{name!r} is no name for a context", "", f"it must match {NAME_PATTERN.pattern}, not local")
        return replace(self, named={**self.named, name: context})

    def without(self, name: str) -> Contexts:
        """CliError when there is none of that name."""
        self.get(name)
        kept = {known: context for known, context in self.named.items() if known != name}
        return replace(self, named=kept, current="" if self.current == name else self.current)


def file_of(environ: Mapping[str, str]) -> Path:
    """Where this user's contexts are."""
    if environ.get(FILE_VARIABLE):
        return Path(environ[FILE_VARIABLE]).absolute()
    base = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or "/") / ".config")
    return Path(base) / "sandloom" / "contexts.json"


def load(path: Path) -> Contexts:
    """What is in the file; nothing when it is not there. CliError when it is not right."""
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Contexts(path)
    except (OSError, ValueError) as error:
        raise CliError("the contexts cannot be read", f"{path} ({error})", "mend or remove that file") from error
    names = {one.name for one in fields(NamedContext)}
    try:
        if set(raw) != {"current", "contexts"} or not isinstance(raw["current"], str):
            raise ValueError("it must have exactly current and contexts")
        named = {}
        for name, values in raw["contexts"].items():
            if set(values) != names or not all(isinstance(value, str) for value in values.values()):
                raise ValueError(f"context {name} must have exactly {', '.join(sorted(names))}")
            named[name] = NamedContext(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise CliError("the contexts are not right", f"{path} ({error})", "mend or remove that file") from error
    return Contexts(path, raw["current"], named)


def save(contexts: Contexts) -> None:
    """Writes the file whole or not at all."""
    contexts.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    body = {"current": contexts.current, "contexts": {name: asdict(one) for name, one in contexts.named.items()}}
    replace_file(contexts.path, json.dumps(body, indent=2, sort_keys=True) + "\n")


def chosen(asked: str, *, home_named: bool, environ: Mapping[str, str]) -> NamedContext | None:
    """The context that counts; None for the fabric of a home. CliError when the one that is named is not there."""
    if asked:
        return None if asked == LOCAL else load(file_of(environ)).get(asked)
    named = environ.get(NAME_VARIABLE, "")
    if named:
        return None if named == LOCAL else load(file_of(environ)).get(named)
    if home_named or environ.get(HOME_VARIABLE):
        return None
    contexts = load(file_of(environ))
    return contexts.get(contexts.current) if contexts.current else None
