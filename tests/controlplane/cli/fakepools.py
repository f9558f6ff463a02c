"""The fake control plane's warm pools: as full as the test says."""

from __future__ import annotations

from typing import Any

import grpc

from controlplane.api.v1 import hosts_pb2, pools_pb2, pools_pb2_grpc


class FakePools(pools_pb2_grpc.PoolsServicer):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.pools: dict[str, pools_pb2.Pool] = {}

    def _find(self, name: str, context: Any) -> pools_pb2.Pool:
        if name not in self.pools:
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no pool {name}")
        return self.pools[name]

    def CreatePool(self, request: Any, context: Any) -> pools_pb2.Pool:
        if request.name in self.pools:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"pool {request.name} exists already")
        self.pools[request.name] = pools_pb2.Pool(name=request.name, uid="a1b2", spec=request.spec)
        return self.pools[request.name]

    def GetPool(self, request: Any, context: Any) -> pools_pb2.Pool:
        return self._find(request.name, context)

    def ListPools(self, request: Any, context: Any) -> pools_pb2.ListPoolsResponse:
        return pools_pb2.ListPoolsResponse(pools=[pool for _, pool in sorted(self.pools.items())])

    def ResizePool(self, request: Any, context: Any) -> pools_pb2.Pool:
        pool = self._find(request.name, context)
        pool.spec.size = request.size
        return pool

    def DeletePool(self, request: Any, context: Any) -> pools_pb2.DeletePoolResponse:
        if not request.allow_missing:
            self._find(request.name, context)
        self.pools.pop(request.name, None)
        return pools_pb2.DeletePoolResponse()

    def WatchPools(self, request: hosts_pb2.WatchPoolsRequest, context: Any) -> Any:
        yield pools_pb2.PoolAssignments()
