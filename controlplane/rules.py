"""Where a sandbox may go, in its user's words: affinity, tolerations, spread and trust. Values and their text. Pure.

    affinity     zone=eu | zone!=eu | ssd | !ssd      of a host's labels; all of them must hold
    toleration   gpu | gpu=a100                       a host's taint keeps away whoever does not tolerate it
    spread       zone | zone:1 | host:2               evenly over that label's values (`host`: over hosts); the number
    is
                                                      the most by which two may differ, without one it is a preference
    trust        no-smt | kvm | dedicated             no shared hyperthreads, a VM by KVM, no other tenant on the host

Sandboxes are spread among those of the same tenant that have the same label `app`, or else the same image.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

HOST_KEY = "host"
"""The spread key under which every host is a value of its own."""
GROUP_LABEL = "app"
MAX_RULES = 32
KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
Pair = tuple[str, str]


class Operator(Enum):
    """What is asked of a label."""

    IS = "="
    IS_NOT = "!="
    EXISTS = "exists"
    ABSENT = "absent"


@dataclass(frozen=True)
class Affinity:
    """One condition on a host's labels. `value` is empty for EXISTS and ABSENT."""

    key: str
    operator: Operator
    value: str = ""

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether a host with these labels meets it. A host without the label meets `!=`."""
        if self.operator is Operator.EXISTS:
            return self.key in labels
        if self.operator is Operator.ABSENT:
            return self.key not in labels
        return (labels.get(self.key) == self.value) == (self.operator is Operator.IS)

    def __str__(self) -> str:
        if self.operator is Operator.EXISTS:
            return self.key
        return f"!{self.key}" if self.operator is Operator.ABSENT else f"{self.key}{self.operator.value}{self.value}"


@dataclass(frozen=True)
class Spread:
    """Evenly over a label's values. `max_skew` 0: as evenly as may be, never a reason to refuse."""

    key: str
    max_skew: int = 0

    def __str__(self) -> str:
        return f"{self.key}:{self.max_skew}" if self.max_skew else self.key


@dataclass(frozen=True)
class Trust:
    """What must hold of a host beside its size."""

    no_smt: bool = False
    kvm: bool = False
    dedicated: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """As users write them."""
        return tuple(
            word for word, asked in zip(TRUST_WORDS, (self.no_smt, self.kvm, self.dedicated), strict=True) if asked
        )


TRUST_WORDS = ("no-smt", "kvm", "dedicated")


@dataclass(frozen=True)
class Rules:
    """All of it. A taint or toleration is (key, value), the value empty when only the key counts."""

    affinity: tuple[Affinity, ...] = ()
    tolerations: tuple[Pair, ...] = ()
    spread: Spread | None = None
    trust: Trust = Trust()

    def tolerates(self, taint: Pair) -> bool:
        """A toleration without a value tolerates every value of its key."""
        return any(key == taint[0] and value in ("", taint[1]) for key, value in self.tolerations)


NO_RULES = Rules()


def parse_affinity(text: str) -> Affinity:
    """See the module. ValueError says what is wrong with it."""
    if "=" in text:
        key, _, value = text.partition("=")
        operator = Operator.IS_NOT if key.endswith("!") else Operator.IS
        key = key.removesuffix("!")
        return Affinity(_checked(KEY, key, text), operator, _checked(VALUE, value, text))
    operator = Operator.ABSENT if text.startswith("!") else Operator.EXISTS
    return Affinity(_checked(KEY, text.removeprefix("!"), text), operator)


def parse_pair(text: str) -> Pair:
    """A taint or a toleration: KEY or KEY=VALUE. ValueError."""
    key, equals, value = text.partition("=")
    return _checked(KEY, key, text), _checked(VALUE, value, text) if equals else ""


def parse_spread(text: str) -> Spread:
    """KEY or KEY:N. ValueError."""
    key, colon, skew = text.partition(":")
    if colon and not re.fullmatch(r"[1-9][0-9]{0,3}", skew):
        raise ValueError(f"{text!r}: what follows the colon is the most by which two values may differ, 1 to 9999")
    return Spread(_checked(KEY, key, text), int(skew) if colon else 0)


def parse_trust(words: Iterable[str]) -> Trust:
    """Of TRUST_WORDS. ValueError."""
    asked = set(words)
    if unknown := sorted(asked - set(TRUST_WORDS)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(TRUST_WORDS)}")
    return Trust(*(word in asked for word in TRUST_WORDS))


def text_of(pair: Pair) -> str:
    """A taint, label or toleration as it is written."""
    return f"{pair[0]}={pair[1]}" if pair[1] else pair[0]


def _checked(pattern: re.Pattern[str], part: str, text: str) -> str:
    if not pattern.fullmatch(part):
        raise ValueError(f"{text!r}: {part!r} does not match {pattern.pattern}")
    return part
