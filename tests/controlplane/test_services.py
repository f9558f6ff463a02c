"""Service policies: what people write, what is refused and why, what travels."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import grpc.aio
import pytest

from controlplane import codec, config
from controlplane.api.errors import PolicyError
from controlplane.api.policies import ANSWERERS, parse_change, parse_policy, render_policy, require_servable
from controlplane.api.servicechange import ServiceChange, changed
from controlplane.api.services import (
    ALL_KERNEL,
    AllowRule,
    Answerer,
    Publish,
    Service,
    ServicePolicy,
    Transport,
    parse_allow,
    parse_publish,
    parse_time_offset,
)
from controlplane.api.status import Condition, parse_error
from controlplane.api.v1 import sandboxes_pb2
from controlplane.edge.sandboxes import parse_services
from controlplane.errors import ConfigError, Invalid
from controlplane.model import SandboxClass
from tests.controlplane.conftest import Plane

RULES = (
    "tcp:10.0.0.0/8:443", "udp:1.1.1.1:53-54", "tcp:*:*", "tcp:[2001:db8::/32]:80", "tcp:*.example.org:80",
    "tcp:mirror.example.org:443", "udp:*:123",
)  # fmt: skip
TOOL = ServicePolicy(
    sockets=Answerer.TOOL,
    dns=Answerer.TOOL,
    allow=tuple(map(parse_allow, RULES)),
    publish=(Publish(8080, 80), Publish(0, 53, Transport.UDP, "::1")),
)


@pytest.mark.parametrize("text", RULES)
def test_a_rule_reads_as_it_was_written(text: str) -> None:
    assert str(parse_allow(text)) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.0.0.0/8:443", "no rule"), ("tcp:10.0.0.1/8:443", "host bits"), ("tcp:443", "no rule"),
        ("tcp:1.2.3.4:http", "no port"), ("tcp:1.2.3.4:90-80", "no range"), ("tcp:1.2.3.4:70000", "no range"),
        ("tcp:a..b:80", "no DNS name"), ("tcp:*.*.org:80", "no DNS name"), ("tcp:[zz]:80", "no network"),
        ("icmp:1.2.3.4:1", "neither tcp nor udp"), ("", "no rule"),
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        parse_allow(text)


def test_a_published_port_is_on_loopback_unless_it_says_otherwise() -> None:
    assert parse_publish("8080:80") == Publish(8080, 80, Transport.TCP, "127.0.0.1")
    assert parse_publish("0.0.0.0:53:5353/udp") == Publish(53, 5353, Transport.UDP, "0.0.0.0")
    assert str(parse_publish("[::]:8080:80")) == "[::]:8080:80/tcp"
    for text in ("80", "x:80", "8080:0", "70000:1", "8080:80/sctp", "nowhere:8080:80"):
        with pytest.raises(PolicyError):
            parse_publish(text)


def test_a_rule_over_everything_leaves_the_hosts_own_out() -> None:
    everything, loopback = parse_allow("tcp:*:*"), parse_allow("tcp:127.0.0.0/8:*")
    own = ("127.0.0.1", "169.254.169.254", "::1", "fe80::1", "0.0.0.0", "100.64.0.1", "fd73:616e:646c::1", "224.0.0.1")
    for text in own:
        assert not everything.has_address(ipaddress.ip_address(text)), text
    assert everything.has_address(ipaddress.ip_address("10.1.2.3"))
    assert loopback.has_address(ipaddress.ip_address("127.0.0.1"))


def test_a_name_rule_is_for_the_name_or_for_all_below_it() -> None:
    below, exact = parse_allow("tcp:*.example.org:80"), parse_allow("tcp:example.org:80")
    assert below.has_name("mirror.example.org") and below.has_name("a.b.example.org")
    assert not below.has_name("example.org") and not below.has_name("evilexample.org")
    assert exact.has_name("example.org") and not exact.has_name("mirror.example.org")
    assert not below.has_address(ipaddress.ip_address("10.0.0.1"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"allow": (AllowRule(Transport.TCP),)}, {"publish": (Publish(1, 1),)}, {"dns": Answerer.TOOL},
        {"sockets": Answerer.TOOL, "allow": (AllowRule(Transport.TCP, name="a.b"),)},
        {"sockets": Answerer.TOOL, "publish": (Publish(80, 1), Publish(80, 2))},
    ],
)  # fmt: skip
def test_a_policy_that_contradicts_itself_cannot_exist(wrong: dict[str, object]) -> None:
    with pytest.raises(PolicyError):
        ServicePolicy(**wrong)  # type: ignore[arg-type]


def test_a_policy_travels_whole() -> None:
    assert parse_policy(render_policy(TOOL)) == TOOL
    assert parse_policy(render_policy(ALL_KERNEL), TOOL) == ALL_KERNEL
    assert codec.decode(ServicePolicy, codec.encode(TOOL), "here") == TOOL


def test_what_a_request_leaves_open_is_the_tenants_default() -> None:
    assert parse_policy(sandboxes_pb2.ServicePolicy(), TOOL) == TOOL
    asked = sandboxes_pb2.ServicePolicy(sockets=sandboxes_pb2.ANSWER_DENY)
    assert parse_policy(asked, TOOL) == ServicePolicy(sockets=Answerer.DENY)
    more = sandboxes_pb2.ServicePolicy(publish=["8080:80"])
    assert parse_policy(more, TOOL).publish == (Publish(8080, 80),)
    assert parse_policy(more, TOOL).allow == TOOL.allow


def test_what_a_class_cannot_have_is_refused_by_name() -> None:
    who = "guest-kernel, host-kernel"
    with pytest.raises(Invalid, match=rf"sockets: tool is not to be had with class user-kernel.*{who}"):
        parse_services(render_policy(TOOL), SandboxClass.USER_KERNEL, ALL_KERNEL)
    for sandbox_class in SandboxClass:
        require_servable(sandbox_class.value, ALL_KERNEL, veth=True)
    for sandbox_class in (SandboxClass.GUEST_KERNEL, SandboxClass.HOST_KERNEL):
        require_servable(sandbox_class.value, TOOL)
        with pytest.raises(Invalid, match="sockets: tool is for a sandbox without a network"):
            parse_services(render_policy(TOOL), sandbox_class, ALL_KERNEL, veth=True)


@pytest.mark.parametrize("sandbox_class", SandboxClass)
@pytest.mark.parametrize("answerer", [Answerer.TOOL, Answerer.DENY])
@pytest.mark.parametrize("service", ["files", "secrets", "devices"])
def test_a_service_that_has_no_tool_yet_is_refused_by_name(
    service: str, answerer: Answerer, sandbox_class: SandboxClass
) -> None:
    asked = sandboxes_pb2.ServicePolicy()
    setattr(asked, service, ANSWERERS[answerer])
    with pytest.raises(Invalid, match=f"{service}: {answerer.value} is not to be had.*leave {service} to the kernel"):
        parse_services(asked, sandbox_class, ALL_KERNEL)
    default = parse_policy(asked)
    with pytest.raises(Invalid, match=f"{service}: {answerer.value} is not to be had"):
        parse_services(sandboxes_pb2.ServicePolicy(), sandbox_class, default)


@pytest.mark.parametrize("sandbox_class", [SandboxClass.USER_KERNEL, SandboxClass.HOST_KERNEL])
@pytest.mark.parametrize("answerer", [Answerer.TOOL, Answerer.DENY])
@pytest.mark.parametrize("service", ["time", "sysview"])
def test_what_needs_a_kernel_of_ones_own_is_refused_to_classes_without_one(
    service: str, answerer: Answerer, sandbox_class: SandboxClass
) -> None:
    asked = sandboxes_pb2.ServicePolicy()
    setattr(asked, service, ANSWERERS[answerer])
    with pytest.raises(Invalid, match=rf"{service}: {answerer.value} is not.*{sandbox_class.value}.*guest-kernel"):
        parse_services(asked, sandbox_class, ALL_KERNEL)
    assert parse_services(asked, SandboxClass.GUEST_KERNEL, ALL_KERNEL).of(Service(service)) is answerer


@pytest.mark.parametrize(
    ("text", "offset_ms"),
    [
        ("-1d", -86_400_000), ("+3h", 10_800_000), ("+1w2d3h4m5s", 788_645_000), ("-90s", -90_000),
        ("2027-01-01T00:00:00Z", 1000), ("2027-01-01T01:00:00+01:00", 1000),
    ],
)  # fmt: skip
def test_a_clock_is_told_by_an_offset_or_a_moment(text: str, offset_ms: int) -> None:
    assert parse_time_offset(text, 1_798_761_599.0) == offset_ms
    policy = ServicePolicy(time=Answerer.TOOL, time_offset_ms=offset_ms)
    assert parse_policy(render_policy(policy)) == policy
    assert codec.decode(ServicePolicy, codec.encode(policy), "here") == policy


@pytest.mark.parametrize("text", ["", "3h", "+3", "-", "+1y", "2027-01-01T00:00:00", "tomorrow", "+99999w", "+1d 2h"])
def test_a_clock_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        parse_time_offset(text, 1_798_761_599.0)


def test_a_clock_of_its_own_needs_its_tool_and_ends_with_it() -> None:
    with pytest.raises(PolicyError, match="needs time: tool"):
        parse_policy(sandboxes_pb2.ServicePolicy(time_offset_ms=1))
    with pytest.raises(PolicyError, match="50 years"):
        ServicePolicy(time=Answerer.TOOL, time_offset_ms=1 << 42)
    default = ServicePolicy(time=Answerer.TOOL, time_offset_ms=5)
    assert parse_policy(sandboxes_pb2.ServicePolicy(), default) == default
    assert parse_policy(sandboxes_pb2.ServicePolicy(time=sandboxes_pb2.ANSWER_DENY), default).time_offset_ms == 0


@pytest.mark.parametrize("sandbox_class", SandboxClass)
def test_names_are_not_refused_where_the_kernel_has_the_sockets(sandbox_class: SandboxClass) -> None:
    asked = sandboxes_pb2.ServicePolicy(dns=sandboxes_pb2.ANSWER_DENY)
    with pytest.raises(Invalid, match=r"dns: deny.*sockets: tool"):
        parse_services(asked, sandbox_class, ALL_KERNEL)
    for sockets in (Answerer.TOOL, Answerer.DENY):
        require_servable("guest-kernel", ServicePolicy(sockets=sockets, dns=Answerer.DENY))


def test_every_service_has_a_field_and_a_number() -> None:
    for service in Service:
        assert ALL_KERNEL.of(service) is Answerer.KERNEL
        assert service.value in sandboxes_pb2.ServicePolicy.DESCRIPTOR.fields_by_name
    with pytest.raises(PolicyError, match="no answerer"):
        parse_policy(sandboxes_pb2.ServicePolicy.FromString(b"\x08\x09"))


BASE = {"listen": "a:1", "store": "sqlite:s", "tls_ca": "ca", "tls_cert": "c", "tls_key": "k"}


def test_tenants_defaults_come_from_the_configuration() -> None:
    values = {**BASE, "services": {"acme": {"sockets": "tool", "allow": ["tcp:10.0.0.0/8:443"]}}}
    parsed = config.parse(values, "here", Path())
    assert parsed.services == (("acme", ServicePolicy(sockets=Answerer.TOOL, allow=(parse_allow(RULES[0]),))),)


@pytest.mark.parametrize(
    "keys", [{"sockets": "maybe"}, {"socket": "tool"}, {"allow": "tcp:*:*"}, {"allow": [1]}, {"dns": "tool"}, 3]
)
def test_a_default_that_cannot_be_read_names_the_tenant(keys: object) -> None:
    with pytest.raises(ConfigError, match=r"here: services\.acme"):
        config.parse({**BASE, "services": {"acme": keys}}, "here", Path())


# Live change.


def test_what_began_as_a_tool_can_deny_and_serve_again() -> None:
    deny = ServiceChange(((Service.SOCKETS, Answerer.DENY),))
    denied = changed(TOOL, deny)
    assert (denied.sockets, denied.now(Service.SOCKETS)) == (Answerer.TOOL, Answerer.DENY)
    assert changed(denied, deny) == denied
    assert parse_policy(render_policy(denied)) == denied
    assert codec.decode(ServicePolicy, codec.encode(denied), "here") == denied
    assert changed(denied, ServiceChange(((Service.SOCKETS, Answerer.TOOL),))) == TOOL
    rules = (parse_allow("tcp:10.9.0.0/16:80"),)
    assert changed(denied, ServiceChange(allow=rules)).allow == rules
    assert changed(TOOL, ServiceChange(allow=())).allow == ()


@pytest.mark.parametrize(
    ("policy", "service", "answerer", "why"),
    [
        (TOOL, Service.SOCKETS, Answerer.KERNEL, "no network"),
        (ALL_KERNEL, Service.SOCKETS, Answerer.TOOL, "sockets: kernel cannot become tool.*began as kernel"),
        (ServicePolicy(sockets=Answerer.DENY), Service.SOCKETS, Answerer.TOOL, "began as deny"),
        (TOOL, Service.TIME, Answerer.TOOL, "only sockets and dns can change"),
    ],
)
def test_what_cannot_change_while_it_runs_is_refused_by_name(
    policy: ServicePolicy, service: Service, answerer: Answerer, why: str
) -> None:
    with pytest.raises(PolicyError, match=why):
        changed(policy, ServiceChange(((service, answerer),)))
    with pytest.raises(PolicyError, match="rules need sockets: tool"):
        changed(ALL_KERNEL, ServiceChange(allow=(parse_allow("tcp:*:*"),)))
    with pytest.raises(PolicyError, match="only what a tool answers"):
        ServicePolicy(withdrawn=(Service.SOCKETS,))


async def test_services_change_through_the_api_and_reach_the_host(plane: Plane) -> None:
    host, client = await plane.host(), await plane.client()
    await client.import_image()
    spec = sandboxes_pb2.SandboxSpec(
        image="base",
        resources=sandboxes_pb2.Resources(memory_min_mib=256, memory_max_mib=256),
        process=sandboxes_pb2.Process(argv=("sleep", "1")),
        services=render_policy(TOOL),
    )
    spec.services.withdrawn.append("sockets")  # output only: it is not looked at
    box = await client.sandboxes.CreateSandbox(sandboxes_pb2.CreateSandboxRequest(name="box", spec=spec))
    assert not box.spec.services.withdrawn
    await host.until(lambda: box.uid in host.assigned)
    await host.tell(box.uid, sandboxes_pb2.RUNNING)
    asked = sandboxes_pb2.SetServicesRequest(
        name="box", services=sandboxes_pb2.ServicePolicy(sockets=sandboxes_pb2.ANSWER_DENY)
    )
    for _ in range(2):  # idempotent
        after = await client.sandboxes.SetServices(asked)
        assert list(after.spec.services.withdrawn) == ["sockets"]
    await host.until(lambda: list(host.assigned[box.uid].spec.services.withdrawn) == ["sockets"])
    assert host.assigned[box.uid].assignment == box.assignment
    host.service_usage.bytes_out = 7
    usage = await client.sandboxes.GetServiceUsage(sandboxes_pb2.GetServiceUsageRequest(name="box"))
    assert usage.bytes_out == 7 and host.usage_asked == [box.uid]
    for wish, condition, said in (
        (
            sandboxes_pb2.ServicePolicy(sockets=sandboxes_pb2.ANSWER_KERNEL),
            Condition.PRECONDITION,
            "sockets: deny cannot become kernel",
        ),
        (sandboxes_pb2.ServicePolicy(publish=["80:80"]), Condition.INVALID, "published ports"),
        (sandboxes_pb2.ServicePolicy(allow=["tcp:*:*"]), Condition.INVALID, "replace_allow"),
        (sandboxes_pb2.ServicePolicy(), Condition.INVALID, "nothing to change"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.sandboxes.SetServices(sandboxes_pb2.SetServicesRequest(name="box", services=wish))
        failure = parse_error(caught.value)
        assert failure.condition is condition and said in failure.message
    stale = sandboxes_pb2.SetServicesRequest(name="box", replace_allow=True, etag="old")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.sandboxes.SetServices(stale)
    assert parse_error(caught.value).reason == "EtagMismatch"


def test_a_clock_does_not_change_while_it_runs() -> None:
    asked = sandboxes_pb2.ServicePolicy(time_offset_ms=1)
    with pytest.raises(PolicyError, match="offset cannot change while it runs"):
        parse_change(asked, replace_allow=False)
