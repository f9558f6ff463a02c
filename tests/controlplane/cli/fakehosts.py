"""The fake fabric's Hosts: what operators do with them, without any host behind."""

from __future__ import annotations

from typing import Any

from controlplane.api.identity import TENANT_HEADER
from controlplane.api.v1 import hosts_pb2, hosts_pb2_grpc


class FakeHosts(hosts_pb2_grpc.HostsServicer):
    """`hosts` is what there is. A host that `stuck` names keeps its drain waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.hosts: dict[str, hosts_pb2.Host] = {}
        self.tokens: list[hosts_pb2.CreateJoinTokenRequest] = []
        self.tenants_asked: list[str] = []
        self.stuck: dict[str, hosts_pb2.DrainBlocker] = {}

    def _called(self, name: str, request: Any, context: Any) -> None:
        raise NotImplementedError

    def GetHost(self, request: Any, context: Any) -> hosts_pb2.Host:
        return self.hosts[request.name]

    def ListHosts(self, request: Any, context: Any) -> hosts_pb2.ListHostsResponse:
        self.tenants_asked += [value for key, value in context.invocation_metadata() if key == TENANT_HEADER]
        return hosts_pb2.ListHostsResponse(hosts=list(self.hosts.values()))

    def CordonHost(self, request: Any, context: Any) -> hosts_pb2.Host:
        return self._become(request.name, hosts_pb2.CORDONED)

    def UncordonHost(self, request: Any, context: Any) -> hosts_pb2.Host:
        return self._become(request.name, hosts_pb2.READY)

    def DrainHost(self, request: Any, context: Any) -> hosts_pb2.Host:
        blocker = None if request.force else self.stuck.get(request.name)
        host = self._become(request.name, hosts_pb2.DRAINING if blocker else hosts_pb2.DRAINED)
        if blocker is not None:
            host.blockers.append(blocker)
        return host

    def RemoveHost(self, request: Any, context: Any) -> hosts_pb2.RemoveHostResponse:
        del self.hosts[request.name]
        return hosts_pb2.RemoveHostResponse()

    def CreateJoinToken(self, request: Any, context: Any) -> hosts_pb2.JoinToken:
        self._called("CreateJoinToken", request, context)
        self.tokens.append(request)
        return hosts_pb2.JoinToken(token="sandloom-join-x", id="x")

    def _become(self, name: str, state: hosts_pb2.HostState.ValueType) -> hosts_pb2.Host:
        host = self.hosts[name]
        host.state = state
        return host
