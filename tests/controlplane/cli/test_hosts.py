"""`sandloom hosts`, `host` and `context` as their users meet them."""

from __future__ import annotations

import json
from pathlib import Path

from controlplane import jointokens
from controlplane.api.channel import TlsFiles
from controlplane.api.status import Condition, Failure
from controlplane.api.v1 import hosts_pb2
from controlplane.ca import Authority
from controlplane.jointokens import Ticket
from tests.controlplane.cli.conftest import Cli
from tests.controlplane.cli.fakefabric import FakeFabric


def add(fabric: FakeFabric, name: str) -> None:
    fabric.hosts[name] = hosts_pb2.Host(name=name, state=hosts_pb2.READY, runtime_address="127.0.0.1:1", sandboxes=1)


def test_a_host_is_cordoned_drained_and_removed(fabric: FakeFabric, cli: Cli) -> None:
    add(fabric, "h1")
    assert cli.ok("hosts", "cordon", "h1") == "h1\n"
    assert "cordoned" in cli.ok("hosts", "ls")
    cli.ok("hosts", "uncordon", "h1")
    assert json.loads(cli.ok("hosts", "inspect", "h1"))["state"] == "READY"
    assert cli.ok("hosts", "drain", "h1") == "h1\n"
    assert cli.ok("hosts", "rm", "h1") == "h1\n"
    assert cli.ok("hosts", "-o", "name") == ""


def test_a_drain_names_what_stays(fabric: FakeFabric, cli: Cli) -> None:
    add(fabric, "h1")
    fabric.stuck["h1"] = hosts_pb2.DrainBlocker(sandbox="web", uid="u1", reason="its restart policy is never")
    done = cli("hosts", "drain", "h1")
    assert done.code == 1
    assert "host h1 is not drained yet: web (its restart policy is never)" in done.err and "--force" in done.err
    assert cli("hosts", "drain", "h1", "--force").code == 0


def test_a_token_is_printed_alone(fabric: FakeFabric, cli: Cli) -> None:
    done = cli("hosts", "token", "--host", "h2", "--lifetime", "60")
    assert (done.code, done.out) == (0, "sandloom-join-x\n")
    assert (fabric.tokens[0].host, fabric.tokens[0].lifetime_s) == ("h2", 60)
    assert cli.ok("host", "token") == "sandloom-join-x\n"


def test_a_token_goes_to_a_file_that_nobody_else_reads(fabric: FakeFabric, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "out" / "token"
    path.parent.mkdir()
    path.write_text("old")
    path.chmod(0o644)
    done = cli("hosts", "token", "--out", str(path))
    assert (done.code, done.out, path.read_text()) == (0, "", "sandloom-join-x\n")
    assert path.stat().st_mode & 0o777 == 0o600
    fabric.failing["CreateJoinToken"] = Failure(Condition.UNAVAILABLE, "StoreUnavailable", "no store")
    assert cli("host", "token", "--out", str(path)).code == 1
    assert path.read_text() == "sandloom-join-x\n" and list(path.parent.iterdir()) == [path]
    assert cli("host", "token", "--out", str(tmp_path / "no" / "token")).code == 1


def test_a_certificate_for_no_tenant_is_refused_unless_it_is_wanted(
    fabric: FakeFabric, cli: Cli, tmp_path: Path
) -> None:
    fabric.tenants.append("acme")
    assert cli.ok("tenants", "cert", "acme", "--out", str(tmp_path / "acme")) == f"{tmp_path}/acme/tenant.crt\n"
    typo = cli("tenants", "cert", "acne", "--out", str(tmp_path / "acne"))
    assert typo.code == 1 and "no certificate for tenant acne: there is no tenant acne" in typo.err
    assert "sandloom tenants create acne" in typo.err and not (tmp_path / "acne").exists()
    assert cli("tenants", "cert", "acne", "--force", "--out", str(tmp_path / "acne")).code == 0
    fabric.stop()
    offline = cli("tenants", "cert", "later", "--out", str(tmp_path / "later"))
    assert offline.code == 0 and "whether there is a tenant later could not be asked" in offline.err


def test_a_reserve_that_leaves_nothing_is_refused(cli: Cli, tmp_path: Path) -> None:
    ticket = jointokens.encode(Ticket("127.0.0.1:1", "id", "secret", "ca"))
    done = cli("host", "join", ticket, "--name", "h2", "--memory-reserve", "900T", "--home", str(tmp_path / "h"))
    assert done.code == 1 and "--memory-reserve leaves nothing for sandboxes: 943718400 MiB of" in done.err


def test_what_is_no_token_is_said_so(cli: Cli, tmp_path: Path) -> None:
    done = cli("host", "join", "sandloom-join-nonsense", "--name", "h2")
    assert done.code == 1 and "no join token" in done.err
    assert "cannot be read" in cli("host", "join", f"@{tmp_path / 'none'}").err
    assert cli("host", "join", "x", "--name", "Not A Name").code == 2


def test_certificates_are_issued_by_hand(cli: Cli, tmp_path: Path) -> None:
    missing = cli("tenants", "cert", "acme", "--out", str(tmp_path / "out"), "--ca", str(tmp_path / "ca"))
    assert missing.code == 1 and "--create" in missing.err
    out = tmp_path / "cp"
    cli.ok(
        "ca",
        "issue",
        "controlplane",
        "cp-1",
        "--create",
        "--ca",
        str(tmp_path / "ca"),
        "--out",
        str(out),
        "--ip",
        "::1",
    )
    assert TlsFiles(out / "ca.crt", out / "controlplane.crt", out / "controlplane.key").read()
    assert Authority.load(tmp_path / "ca").cert_pem == (out / "ca.crt").read_bytes()
    bad = cli("ca", "issue", "host", "h1", "--ca", str(tmp_path / "ca"), "--out", str(out), "--ip", "not-one")
    assert bad.code == 1 and "--ip" in bad.err


def test_a_context_is_added_used_and_forgotten(fabric: FakeFabric, cli: Cli, tmp_path: Path) -> None:
    add(fabric, "h1")
    config = {"SANDLOOM_CONFIG": str(tmp_path / "contexts.json")}
    tls = tmp_path / "home" / "tls"
    address = json.loads((tmp_path / "home" / "context.json").read_text())["address"]
    added = cli(
        "context", "add", "prod", "--address", address, "--tls-dir", str(tls), "--tenant", "acme", environ=config
    )
    assert (added.code, added.out) == (0, "prod\n")
    assert (tmp_path / "contexts.json").stat().st_mode & 0o777 == 0o600
    elsewhere = {**config, "SANDLOOM_HOME": ""}
    assert cli("--context", "prod", "hosts", "-o", "name", environ=elsewhere).out == "h1\n"
    assert cli("hosts", "-o", "name", environ={**elsewhere, "SANDLOOM_CONTEXT": "prod"}).out == "h1\n"
    assert cli("context", "use", "prod", environ=config).code == 0
    assert cli("hosts", "-o", "name", environ=elsewhere).out == "h1\n"
    rows = json.loads(cli("context", "ls", "-o", "json", environ=config).out)
    assert [(row["name"], row["current"], row["tenant"]) for row in rows] == [
        ("local", False, ""),
        ("prod", True, "acme"),
    ]
    assert cli("context", "use", "nowhere", environ=config).code == 1
    assert cli("context", "rm", "prod", environ=config).code == 0
    gone = cli("--context", "prod", "hosts", environ=elsewhere)
    assert gone.code == 1 and "there is no context prod" in gone.err


def test_a_context_that_is_not_right_is_named(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "contexts.json"
    path.write_text('{"current": "", "contexts": {"a": {"address": "x"}}}')
    done = cli("context", "ls", environ={"SANDLOOM_CONFIG": str(path)})
    assert done.code == 1 and "context a must have exactly" in done.err
    assert cli("context", "add", "x").code == 2


def test_an_operator_acts_for_a_tenant(fabric: FakeFabric, cli: Cli) -> None:
    assert cli.ok("--tenant", "acme", "hosts", "-o", "name") == ""
    assert fabric.tenants_asked == ["acme"]
