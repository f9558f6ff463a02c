"""The small pure parts: lifecycle, transitions, names, page tokens, keys, configuration."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane import config, keys, lifecycle, names, paging, transitions
from controlplane.api.identity import NAME_PATTERN
from controlplane.api.v1 import sandboxes_pb2
from controlplane.edge import enums
from controlplane.errors import ConfigError, Invalid, Precondition
from controlplane.model import DesiredState, Phase, ResizeState, Resources, Sandbox, SandboxSpec, SandboxStatus
from controlplane.quotas import Quota
from controlplane.requests import Report, ResizeWish
from controlplane.store.opening import etcd_access

few = settings(max_examples=40, deadline=None)
BOX = Sandbox("box", "u1", "default", SandboxSpec("base", Resources(256, 1024, 256, 1000)), 1.5, 1)


def in_phase(phase: Phase, **how: object) -> Sandbox:
    return replace(BOX, host="h1", epoch=5, status=SandboxStatus(phase), **how)  # type: ignore[arg-type]


# Lifecycle.


def test_every_phase_is_in_the_table_and_nothing_leads_out_of_an_end() -> None:
    assert set(lifecycle.TRANSITIONS) == set(Phase)
    for phase in lifecycle.ENDED:
        assert lifecycle.TRANSITIONS[phase] == frozenset()
    for phase in set(Phase) - lifecycle.ENDED:
        assert lifecycle.TRANSITIONS[phase] >= lifecycle.ENDED  # anything may end at any time


def test_a_host_never_takes_a_sandbox_back() -> None:
    order = [Phase.STARTING, Phase.RUNNING, Phase.STOPPING]
    for earlier, later in itertools.combinations(order, 2):
        assert lifecycle.allowed(earlier, later)
        assert not lifecycle.allowed(later, earlier)


def test_the_apis_enums_and_ours_are_the_same_ones() -> None:
    for phase, number in enums.PHASES.items():
        assert sandboxes_pb2.Phase.Name(number) == phase.name
        assert enums.parse_phase(number, "x") is phase
    assert len(enums.PHASES) == len(Phase) == len(sandboxes_pb2.Phase.items()) - 1
    assert len(enums.RESIZES) == len(ResizeState) == len(sandboxes_pb2.ResizeState.items()) - 1
    with pytest.raises(Invalid, match=r"status\.phase"):
        enums.parse_phase(0, "status.phase")


# Transitions.


@few
@given(st.sampled_from(Phase), st.sampled_from(Phase), st.sampled_from(DesiredState))
def test_an_end_is_final_whatever_is_reported(now: Phase, said: Phase, desired: DesiredState) -> None:
    sandbox = in_phase(now, desired=desired)
    report = Report("u1", "h1", 5, SandboxStatus(said, reason="X", exit_code=9))
    after = transitions.observed(sandbox, report)
    if now in lifecycle.ENDED:
        assert after == sandbox
        assert not transitions.goes_back(sandbox, report)
    else:
        assert (after.status.phase, after.status.exit_code) == (said, 9)
        assert transitions.goes_back(sandbox, report) == (not lifecycle.allowed(now, said))
    assert after.desired is desired


@few
@given(st.sampled_from(Phase), st.integers(0, 100))
def test_stopping_twice_is_stopping_once(now: Phase, grace_s: int) -> None:
    once = transitions.stopped(in_phase(now), grace_s, 9.0)
    assert transitions.stopped(once, grace_s, 10.0) == once
    if now not in lifecycle.ENDED:
        assert once.desired is DesiredState.STOPPED


@few
@given(
    st.integers(0, 1500), st.integers(0, 1500), st.integers(0, 1500), st.sampled_from([Phase.PENDING, Phase.RUNNING])
)
def test_a_resize_keeps_min_memory_max_or_is_refused(memory: int, minimum: int, cpu: int, phase: Phase) -> None:
    wish = ResizeWish(memory, minimum, cpu)
    try:
        after = transitions.resized(in_phase(phase), wish)
    except (Invalid, Precondition):
        return
    sizes = after.spec.resources
    assert sizes.memory_min_mib <= sizes.memory_mib <= sizes.memory_max_mib == 1024
    assert sizes.vcpus <= after.vcpus
    if after.spec == BOX.spec:
        assert after.status.resize is None
    else:
        assert after.status.resize is not None
        assert after.status.resize.state is ResizeState.IN_PROGRESS
    assert transitions.resized(after, wish) == after  # a target: asking again changes nothing


def test_giving_up_fences_the_old_host() -> None:
    after = transitions.failed(in_phase(Phase.RUNNING), "HostLost", "gone", 9, 3.0)
    assert (after.host, after.epoch, after.status.phase, after.status.reason) == ("", 9, Phase.FAILED, "HostLost")


def test_an_etag_follows_what_is_asked_and_not_what_is_reported() -> None:
    tag = transitions.etag(BOX)
    assert transitions.etag(in_phase(Phase.RUNNING)) == tag
    assert transitions.etag(transitions.resized(BOX, ResizeWish(memory_mib=512))) != tag
    assert transitions.etag(transitions.stopped(in_phase(Phase.RUNNING), 3, 1.0)) != tag


# Names, keys, page tokens.


def test_names_are_names_and_do_not_run_out() -> None:
    choice = random.Random(3).randrange
    made = {names.made_up(choice, attempt) for attempt in range(12) for _ in range(200)}
    assert all(NAME_PATTERN.fullmatch(name) for name in made)
    assert len(made) > 1900


def test_names_have_no_word_twice() -> None:
    assert len(set(names.FIRST)) == len(names.FIRST)
    assert len(set(names.SECOND)) == len(names.SECOND)


label = st.from_regex(NAME_PATTERN, fullmatch=True)


@few
@given(label, st.lists(st.tuples(label, label), unique=True))
def test_sandbox_keys_sort_by_name_and_come_apart_again(tenant: str, boxes: list[tuple[str, str]]) -> None:
    made = [keys.sandbox(tenant, name, uid) for name, uid in boxes]
    assert [keys.split_sandbox(key) for key in made] == [(tenant, name, uid) for name, uid in boxes]
    assert [keys.split_sandbox(key)[1] for key in sorted(made)] == sorted(name for name, _ in boxes)
    for (name, _), key in zip(boxes, made, strict=True):
        assert key.startswith(keys.sandboxes_named(tenant, name))
        assert not any(
            other.startswith(keys.sandboxes_named(tenant, name)) and keys.split_sandbox(other)[1] != name
            for other in made
        )


@few
@given(st.text(), st.text(), st.integers(1, 1 << 60))
def test_page_tokens_come_back_as_they_were(of: str, after: str, revision: int) -> None:
    cursor = paging.Cursor(of, after, revision)
    assert paging.parse(paging.token(cursor), of) == cursor
    with pytest.raises(Invalid):
        paging.parse(paging.token(cursor), of + "?")


@few
@given(st.text(min_size=1))
def test_no_text_is_a_page_token_by_chance(text: str) -> None:
    with pytest.raises(Invalid):
        paging.parse(text, "hosts")


# Configuration.

WHOLE = {"listen": "127.0.0.1:0", "store": "sqlite:a.db", "tls_ca": "ca", "tls_cert": "cert", "tls_key": "/k"}


def test_a_whole_configuration_is_read_relative_to_its_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    lines = [f'{key} = "{value}"' for key, value in WHOLE.items()]
    path.write_text("\n".join([*lines, "lease_s = 3", "[quotas.acme]", "sandboxes = 2", "[quotas.b]", "cpu_milli = 1"]))
    loaded = config.load(path)
    assert loaded.sqlite_path == tmp_path / "a.db"
    assert (loaded.tls_ca, loaded.tls_key, loaded.lease_s) == (tmp_path / "ca", Path("/k"), 3)
    assert dict(loaded.quotas) == {"acme": Quota(sandboxes=2), "b": Quota(cpu_milli=1)}


def test_etcd_is_configured_by_its_endpoints_and_how_it_lets_us_in(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    values = WHOLE | {
        "store": "etcd:10.0.0.1:2379,[::1]:2379", "name": "cp-1", "etcd_prefix": "lab/one/", "etcd_ca": "e.ca",
        "etcd_cert": "e.crt", "etcd_key": "e.key", "etcd_user": "u", "etcd_password_file": "password",
    }  # fmt: skip
    loaded = config.parse(dict(values), "c.toml", tmp_path)
    assert (loaded.sqlite_path, loaded.name) == (None, "cp-1")
    access = etcd_access(loaded)
    assert access.endpoints == ("10.0.0.1:2379", "[::1]:2379")
    assert (access.prefix, access.ca, access.user, access.password) == ("lab/one/", tmp_path / "e.ca", "u", "secret")
    assert (access.cert, access.key, access.deadline_s) == (tmp_path / "e.crt", tmp_path / "e.key", 5.0)
    (tmp_path / "password").unlink()
    with pytest.raises(ConfigError, match="password cannot be read"):
        etcd_access(loaded)


def test_the_example_configuration_is_one() -> None:
    loaded = config.load(Path(__file__).parents[2] / "deploy" / "controlplane-etcd.toml")
    assert len(loaded.etcd_endpoints) == 3
    assert (loaded.etcd_cert is not None, loaded.name, loaded.sqlite_path) == (True, "cp-1", None)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"colour": 1}, "unknown key 'colour'; known are listen"),
        ({"listen": None}, "listen is missing"),
        ({"listen": "nowhere"}, "HOST:PORT"),
        ({"listen": "x:70000"}, "HOST:PORT"),
        ({"store": "zookeeper:x"}, "sqlite:PATH"),
        ({"store": "etcd:"}, "etcd:HOST:PORT"),
        ({"store": "etcd:a:1,b"}, "endpoint 'b' is not HOST:PORT"),
        ({"store": "etcd:a:1", "etcd_prefix": "x"}, "etcd_prefix = 'x'"),
        ({"store": "etcd:a:1", "etcd_cert": "c"}, "etcd_cert needs"),
        ({"store": "etcd:a:1", "etcd_user": "u"}, "etcd_user and etcd_password_file"),
        ({"store": "etcd:a:1", "etcd_deadline_s": 0}, "etcd_deadline_s = 0"),
        ({"store": "sqlite:"}, "sqlite:PATH"),
        ({"lease_s": 0}, "lease_s = 0"),
        ({"lease_s": "15"}, "lease_s = '15'"),
        ({"lease_s": True}, "lease_s = True"),
        ({"tls_ca": 7}, "tls_ca = 7"),
        ({"quotas": {"acme": {"sandwiches": 1}}}, "quotas.acme: unknown key 'sandwiches'"),
        ({"quotas": {"acme": {"sandboxes": -1}}}, "quotas.acme.sandboxes = -1"),
        ({"quotas": {"Not A Name": {}}}, "quotas.Not A Name"),
    ],
)
def test_a_wrong_configuration_names_the_key_and_the_file(change: dict[str, object], text: str) -> None:
    values = {key: value for key, value in (WHOLE | change).items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        config.parse(values, "c.toml")
    assert text in str(caught.value)
    assert "c.toml" in str(caught.value)
