"""Stored bytes: what is written is read, whatever the value; what is not ours is refused and named."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import codec
from controlplane.api.services import (
    MAX_PORT,
    AllowRule,
    Answerer,
    Publish,
    ServicePolicy,
    Transport,
    parse_allow,
    parse_publish,
)
from controlplane.errors import BadState
from controlplane.model import Event, Host, Image, Residency, Resources, Sandbox, SandboxSpec
from controlplane.requests import UsedRequest

few = settings(max_examples=40, deadline=None)
texts = st.text(max_size=8)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(str, texts)
ports = st.integers(1, MAX_PORT)
transports = st.sampled_from(Transport)
targets = st.sampled_from(("", "10.0.0.0/8", "192.0.2.7/32", "fd00::/8")).map(lambda network: {"network": network})
names = st.sampled_from(("example.org", "*.debian.org", "a-b.c.test")).map(lambda name: {"name": name})
ranges = st.tuples(st.integers(0, MAX_PORT), st.integers(0, MAX_PORT)).map(sorted)


def rules_of(where: st.SearchStrategy[dict[str, str]]) -> st.SearchStrategy[AllowRule]:
    return st.builds(
        lambda transport, target, ends: AllowRule(transport, **target, low_port=ends[0], high_port=ends[1]),
        transports, where, ranges,
    )  # fmt: skip


published = st.lists(
    st.builds(
        Publish, st.integers(0, MAX_PORT), ports, transports,
        st.sampled_from(("127.0.0.1", "0.0.0.0", "::1", "192.0.2.1")),
    ),
    max_size=4,
    unique_by=lambda port: (port.transport, port.host_address, port.host_port),
).map(tuple)  # fmt: skip
answerers = st.sampled_from(Answerer)
st.register_type_strategy(
    ServicePolicy,
    st.builds(ServicePolicy, files=answerers, sysview=answerers, allow=st.just(()), publish=st.just(()))
    | st.builds(
        ServicePolicy,
        sockets=st.just(Answerer.TOOL),
        dns=answerers,
        allow=st.lists(rules_of(targets), max_size=3).map(tuple),
        publish=published,
    )
    | st.builds(  # rules by name need the names' tool
        ServicePolicy,
        sockets=st.just(Answerer.TOOL),
        dns=st.just(Answerer.TOOL),
        allow=st.lists(rules_of(targets | names), max_size=3).map(tuple),
        publish=published,
    ),
)
KINDS: tuple[type[Any], ...] = (Sandbox, Image, Host, Residency, Event, UsedRequest)


@few
@given(st.one_of(*(st.from_type(kind) for kind in KINDS)))
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    stored = {field.name for field in fields(value)}
    if "revision" in stored:
        value = replace(value, revision=7)
        assert codec.decode(type(value), codec.encode(value), "key", revision=7) == value
        assert codec.encode(value) == codec.encode(replace(value, revision=8))  # it is not part of what is stored
    else:
        assert codec.decode(type(value), codec.encode(value), "key") == value


@few
@given(st.from_type(ServicePolicy))
def test_a_policy_s_rules_and_ports_are_read_as_they_are_written(policy: ServicePolicy) -> None:
    """In the store a policy is its fields; in the API and on the command line it is these texts."""
    assert tuple(parse_allow(str(rule)) for rule in policy.allow) == policy.allow
    assert tuple(parse_publish(str(port)) for port in policy.publish) == policy.publish


BOX = Sandbox("box", "u1", "default", SandboxSpec("base", Resources(1, 2, 1, 1000)), 1.5, 1)


def changed(**changes: Any) -> bytes:
    document = json.loads(codec.encode(BOX))
    for path, value in changes.items():
        *where, last = path.split("__")
        place = document
        for part in where:
            place = place[part]
        place[last] = value
    return json.dumps(document).encode()


def test_the_layout_is_the_one_that_is_written_down() -> None:
    assert json.loads(codec.encode(BOX)) == {
        "kind": "Sandbox",
        "schema": 1,
        "value": {
            "name": "box",
            "uid": "u1",
            "tenant": "default",
            "created_at_s": 1.5,
            "vcpus": 1,
            "spec": {
                "image": "base",
                "resources": {"memory_min_mib": 1, "memory_max_mib": 2, "memory_mib": 1, "cpu_milli": 1000},
            },
        },
    }


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "cannot be read"),
        (b"[]", "cannot be read"),
        (b"\xff", "cannot be read"),
        (changed(schema=2), "schema 2"),
        (changed(kind="Host"), "Host of schema 1, wanted Sandbox"),
        (changed(value__colour="blue"), "no field colour: upgrade"),
        (changed(value__vcpus="two"), "two"),
        (changed(value__vcpus=True), "True"),
        (changed(value__desired="sleeping"), "sleeping"),
        (changed(value__spec__resources=None), "None"),
        (changed(value__layers=[{"digest": "x"}]), "size_bytes"),
    ],
)
def test_what_is_no_such_record_is_refused_and_named(data: bytes, text: str) -> None:
    with pytest.raises(BadState, match="sandboxes/default/box,u1") as caught:
        codec.decode(Sandbox, data, "sandboxes/default/box,u1")
    assert text in str(caught.value)
