"""Lists as clients page through them: records of one prefix at one revision, filtered, in key order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from controlplane import codec, paging
from controlplane.store.contract import Store

T = TypeVar("T")
READ_RECORDS = 500


@dataclass(frozen=True)
class Listed(Generic[T]):
    """A page: values, the token of the next one (empty: none), and the revision of the whole list."""

    values: tuple[T, ...]
    next_token: str
    revision: int


async def list_page(
    store: Store, kind: type[T], prefix: str, *, page_size: int, page_token: str, of: str,
    keep: Callable[[T], bool] = lambda _: True,
) -> Listed[T]:  # fmt: skip
    """One page of the records below `prefix`. Compacted when the token's revision is no longer kept."""
    most = paging.page_size(page_size)
    cursor = paging.parse(page_token, of)
    after, revision = cursor.after, cursor.revision
    values: list[T] = []
    while True:
        page = await store.page(prefix, after=after, limit=min(READ_RECORDS, most + 1), revision=revision)
        revision = page.revision
        for record in page.records:
            value = codec.decode(kind, record.value, record.key, revision=record.mod_revision)
            if keep(value):
                if len(values) == most:
                    return Listed(tuple(values), paging.token(paging.Cursor(of, after, revision)), revision)
                values.append(value)
            after = record.key
        if not page.more:
            return Listed(tuple(values), "", revision)
