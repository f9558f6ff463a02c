"""etcd's messages and stubs, out of the package etcd3, for today's protobuf and grpc.aio.

etcd3 0.12.0 ships code that was generated in 2019: importing it fails with protobuf >= 4 ("Descriptors cannot be
created directly"). What is in it is right all the same, so this takes it out without importing the package: each
`*_pb2.py` holds its serialized FileDescriptorProto as a literal, which becomes message classes in a descriptor pool of
our own (another library's `rpc.proto` does no harm there); `rpc_pb2_grpc.py`, which needs nothing but the messages, is
run with those in the place of its import. Its stubs work on grpc.aio channels as they are.

    proto = load()
    proto.PutRequest(key=b"a")             a message of etcdserverpb (mvccpb and authpb are reached through fields)
    proto.stubs["KVStub"](channel)         a stub
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from controlplane.errors import ConfigError

FILES = ("kv_pb2", "auth_pb2", "rpc_pb2")
"""In the order in which they import each other."""
PACKAGE = "etcdserverpb"


class EtcdProto:
    """The messages of etcdserverpb as attributes, and the stubs by class name."""

    def __init__(self, messages: dict[str, Any], stubs: dict[str, Callable[[Any], Any]]) -> None:
        self._messages, self.stubs = messages, stubs

    def __getattr__(self, name: str) -> Any:
        try:
            return self._messages[name]
        except KeyError:
            raise AttributeError(f"etcd3 has no message {name}") from None


@cache
def load() -> EtcdProto:
    """ConfigError when the package etcd3 is not there or is none of those this understands."""
    spec = importlib.util.find_spec("etcd3")  # finds it; does not import it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("store = etcd needs the Python package etcd3 0.12.0: pip install etcd3==0.12.0")
    folder = Path(next(iter(spec.submodule_search_locations))) / "etcdrpc"
    try:
        messages = _messages(folder)
        return EtcdProto(messages, _stubs(folder / "rpc_pb2_grpc.py", messages))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
        text = f"the package etcd3 in {folder.parent} is not 0.12.0 ({error}): pip install etcd3==0.12.0"
        raise ConfigError(text) from error


def _messages(folder: Path) -> dict[str, Any]:
    pool = DescriptorPool()
    for name in FILES:
        pool.AddSerializedFile(_serialized(folder / f"{name}.py"))
    file = pool.FindFileByName("rpc.proto")
    if file.package != PACKAGE:
        raise ValueError(f"rpc.proto is of package {file.package}")
    return {name: GetMessageClass(kind) for name, kind in file.message_types_by_name.items()}


def _serialized(path: Path) -> bytes:
    """The literal of `serialized_pb=_b('...')`: Latin-1 text of the bytes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb" and isinstance(node.value, ast.Call):
            (literal,) = node.value.args
            return bytes(ast.literal_eval(literal).encode("latin-1"))
    raise ValueError(f"{path.name} has no serialized_pb")


def _stubs(path: Path, messages: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    modules = {"grpc": grpc, "etcd3.etcdrpc": SimpleNamespace(rpc_pb2=SimpleNamespace(**messages))}

    def import_known(name: str, *_: Any) -> Any:
        return modules[name]

    built = {**vars(builtins), "__import__": import_known}
    namespace: dict[str, Any] = {"__builtins__": built, "__name__": "sandloom-etcd-stubs"}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    return dict(_named_stubs(namespace))


def _named_stubs(namespace: dict[str, Any]) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    for name, kind in namespace.items():
        if name.endswith("Stub") and isinstance(kind, type):
            yield name, kind
