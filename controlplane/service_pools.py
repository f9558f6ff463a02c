"""Warm pools: parse, call, render. See pools.proto for every method's contract."""

from __future__ import annotations

from controlplane import keys
from controlplane.api.v1 import pools_pb2, pools_pb2_grpc
from controlplane.edge import pools as edge
from controlplane.edge.sandboxes import parse_name
from controlplane.gate import Context, Gate
from controlplane.listing import list_page
from controlplane.model import Pool
from controlplane.pools import Pools
from controlplane.store.contract import Store


class PoolsService(pools_pb2_grpc.PoolsServicer):
    """See the module."""

    def __init__(self, gate: Gate, store: Store, pools: Pools) -> None:
        self._gate, self._store, self._pools = gate, store, pools

    async def CreatePool(self, request: pools_pb2.CreatePoolRequest, context: Context) -> pools_pb2.Pool:
        """See pools.proto."""
        async with self._gate.admit(context) as caller:
            return self._rendered(await self._pools.create(caller.tenant, edge.parse_pool_creation(request)))

    async def GetPool(self, request: pools_pb2.GetPoolRequest, context: Context) -> pools_pb2.Pool:
        """See pools.proto."""
        async with self._gate.admit(context) as caller:
            return self._rendered(await self._pools.get(caller.tenant, parse_name(request.name)))

    async def ListPools(self, request: pools_pb2.ListPoolsRequest, context: Context) -> pools_pb2.ListPoolsResponse:
        """See pools.proto."""
        async with self._gate.admit(context) as caller:
            listed = await list_page(
                self._store,
                Pool,
                keys.pools_of(caller.tenant),
                page_size=request.page_size,
                page_token=request.page_token,
                of=f"pools/{caller.tenant}",
            )
            return pools_pb2.ListPoolsResponse(
                pools=[self._rendered(pool) for pool in listed.values],
                next_page_token=listed.next_token,
                resource_version=listed.revision,
            )

    async def ResizePool(self, request: pools_pb2.ResizePoolRequest, context: Context) -> pools_pb2.Pool:
        """See pools.proto."""
        async with self._gate.admit(context) as caller:
            name, size = parse_name(request.name), edge.parse_size(request.size)
            return self._rendered(await self._pools.resize(caller.tenant, name, size, request.etag))

    async def DeletePool(self, request: pools_pb2.DeletePoolRequest, context: Context) -> pools_pb2.DeletePoolResponse:
        """See pools.proto."""
        async with self._gate.admit(context) as caller:
            await self._pools.delete(caller.tenant, parse_name(request.name), allow_missing=request.allow_missing)
            return pools_pb2.DeletePoolResponse()

    def _rendered(self, pool: Pool) -> pools_pb2.Pool:
        return edge.render_pool(self._pools.state(pool))
