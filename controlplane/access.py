"""Who may call what: one table, RPC by role. Pure.

The rule for refusals, everywhere: PERMISSION_DENIED follows from the caller's certificate and the method alone, never
from what there is; whatever a caller may not see is NOT_FOUND, in the same words as what does not exist. So no answer
tells a tenant of another's things. An RPC without an entry here is refused to everybody, and a test says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from controlplane.api.identity import Role

PACKAGE = "sandloom.v1"
USERS = frozenset({Role.OPERATOR, Role.TENANT})
OPERATORS = frozenset({Role.OPERATOR})
HOSTS = frozenset({Role.HOST})


def _all(service: str, roles: frozenset[Role], *methods: str) -> dict[str, frozenset[Role]]:
    return {f"/{PACKAGE}.{service}/{method}": roles for method in methods}


TABLE: Mapping[str, frozenset[Role]] = {
    **_all(
        "Sandboxes", USERS, "CreateSandbox", "CreateSandboxes", "GetSandbox", "ListSandboxes", "WatchSandboxes",
        "ResizeSandbox", "ParkSandbox", "UnparkSandbox", "StopSandbox", "DeleteSandbox", "AttachSandbox", "ExecSandbox",
        "GetLogs", "GetSharingLedger", "WatchEvents", "ListUsage", "ExplainSandbox", "SetServices",
        "GetServiceUsage",
    ),
    **_all("Images", USERS, "ImportImage", "PullImage", "GetImage", "ListImages", "DeleteImage"),
    **_all("Pools", USERS, "CreatePool", "GetPool", "ListPools", "ResizePool", "DeletePool"),
    **_all(
        "Checkpoints", USERS, "CreateCheckpoint", "ListCheckpoints", "DeleteCheckpoint", "RestoreCheckpoint",
        "ForkSandbox",
    ),
    **_all("Tenants", USERS, "GetTenant"),
    **_all("Tenants", OPERATORS, "CreateTenant", "ListTenants", "UpdateTenant", "DeleteTenant"),
    **_all(
        "Hosts", OPERATORS, "GetHost", "ListHosts", "CordonHost", "UncordonHost", "DrainHost", "RemoveHost",
        "CreateJoinToken",
    ),
    **_all(
        "HostSync", HOSTS, "ReportHost", "WatchAssignments", "WatchPools", "ReportSandbox", "RecordEvent",
        "LocateImage", "ReportImage",
    ),
}  # fmt: skip
"""By the method's full name, as gRPC has it."""

WITHOUT_CERTIFICATE = frozenset({f"/{PACKAGE}.HostJoin/JoinHost"})
"""Served on a listener of their own, to callers that have no certificate yet: what counts there is a token."""


def roles_of(method: str) -> frozenset[Role]:
    """Who may call a method; nobody when the table does not know it."""
    return TABLE.get(method, frozenset())
