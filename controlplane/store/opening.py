"""Which store the configuration means, opened."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from controlplane.config import Config
from controlplane.errors import ConfigError
from controlplane.store.contract import Store
from controlplane.store.etcd import open_etcd
from controlplane.store.etcdlink import EtcdAccess
from controlplane.store.sqlite import open_sqlite

START_S = 60.0
"""A control plane may start before its etcd does."""


def etcd_access(config: Config) -> EtcdAccess:
    """Where etcd is, by the configuration. ConfigError when the password cannot be read."""
    password = ""
    if config.etcd_password_file is not None:
        try:
            password = config.etcd_password_file.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"etcd_password_file {config.etcd_password_file} cannot be read: {error}") from error
    return EtcdAccess(
        config.etcd_endpoints, config.etcd_prefix, config.etcd_ca, config.etcd_cert, config.etcd_key,
        config.etcd_user, password, float(config.etcd_deadline_s),
    )  # fmt: skip


@asynccontextmanager
async def open_store(config: Config) -> AsyncGenerator[Store, None]:
    """The store while the block runs. StoreError, ConfigError."""
    if config.sqlite_path is not None:
        async with open_sqlite(config.sqlite_path) as embedded:
            yield embedded
    else:
        async with open_etcd(etcd_access(config), patience_s=START_S) as shared:
            yield shared
