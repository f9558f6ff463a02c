"""Between sandloom.v1's texts for labels, taints and placement rules and values. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from controlplane import rules
from controlplane.api.v1 import sandboxes_pb2
from controlplane.errors import Invalid
from controlplane.explaining import Explanation
from controlplane.rules import MAX_RULES, NO_RULES, Pair, Rules

S = TypeVar("S")
T = TypeVar("T")
DEFAULT_VERDICTS, MAX_VERDICTS = 20, 1000


def parse_rules(message: sandboxes_pb2.PlacementRules) -> Rules:
    """Where a sandbox may go. Invalid names the field."""
    parsed = Rules(
        affinity=tuple(_each("spec.rules.affinity", rules.parse_affinity, message.affinity)),
        tolerations=tuple(_each("spec.rules.tolerations", rules.parse_pair, message.tolerations)),
        spread=next(iter(_each("spec.rules.spread", rules.parse_spread, filter(None, [message.spread]))), None),
        trust=_said("spec.rules.trust", rules.parse_trust, list(message.trust)),
    )
    return NO_RULES if parsed == NO_RULES else parsed


def render_rules(value: Rules) -> sandboxes_pb2.PlacementRules:
    """As they were written."""
    return sandboxes_pb2.PlacementRules(
        affinity=[str(term) for term in value.affinity],
        tolerations=[rules.text_of(pair) for pair in value.tolerations],
        spread=str(value.spread) if value.spread else "",
        trust=value.trust.words,
    )


def parse_labels(field: str, labels: Mapping[str, str]) -> tuple[Pair, ...]:
    """A host's labels."""
    return tuple(sorted(_each(field, rules.parse_pair, (rules.text_of(pair) for pair in labels.items()))))


def parse_taints(field: str, texts: Iterable[str]) -> tuple[Pair, ...]:
    """A host's taints."""
    return tuple(sorted(set(_each(field, rules.parse_pair, texts))))


def parse_most(request: sandboxes_pb2.ExplainSandboxRequest) -> int:
    """How many hosts to tell of."""
    if not 0 <= request.hosts <= MAX_VERDICTS:
        raise Invalid("hosts", f"{request.hosts} is not between 0 and {MAX_VERDICTS}")
    return request.hosts or DEFAULT_VERDICTS


def render_explanation(explained: Explanation) -> sandboxes_pb2.Explanation:
    """For users."""
    sandbox, placed = explained.sandbox, explained.sandbox.placed
    message = sandboxes_pb2.Explanation(
        name=sandbox.name,
        uid=sandbox.uid,
        host=sandbox.host,
        message=explained.message,
        refused=[sandboxes_pb2.ReasonCount(reason=reason, hosts=count) for reason, count in explained.refused],
        fitting=explained.fitting,
    )
    if placed is not None and placed.host == sandbox.host:
        message.placed_because.extend(_reasons(placed.parts))
        message.hosts_then, message.marginal_mib = placed.hosts, placed.marginal_mib
        message.shared_mib, message.charge_mib = placed.shared_mib, placed.charge_mib
    for verdict in explained.verdicts:
        told = message.verdicts.add(host=verdict.host, fits=verdict.refusal is None)
        if verdict.score is not None:
            told.score.extend(
                _reasons(verdict.score.parts(explained.policy, spread=sandbox.spec.rules.spread is not None))
            )
        if verdict.refusal is not None:
            told.reason, told.message = verdict.refusal.reason, verdict.refusal.message
            told.lacking, told.for_now = verdict.refusal.lacking, verdict.refusal.for_now
    return message


def _reasons(parts: Iterable[tuple[str, str]]) -> list[sandboxes_pb2.Reason]:
    return [sandboxes_pb2.Reason(what=what, why=why) for what, why in parts]


def _each(field: str, parse: Callable[[str], T], texts: Iterable[str]) -> list[T]:
    texts = list(texts)
    if len(texts) > MAX_RULES:
        raise Invalid(field, f"{len(texts)} of them, {MAX_RULES} is the most")
    return [_said(field, parse, text) for text in texts]


def _said(field: str, parse: Callable[[S], T], text: S) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise Invalid(field, str(error)) from error
