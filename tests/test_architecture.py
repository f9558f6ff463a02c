"""The structure that ARCHITECTURE.md promises, read off the code: who may import whom, sizes, names, contracts."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("controlplane", "hostd", "guestagent", "sharedcache", "native")

ALLOWED: dict[str, frozenset[str]] = {
    "controlplane": frozenset(),
    "hostd": frozenset({"controlplane.api", "sharedcache", "guestagent", "native"}),
    "sharedcache": frozenset({"native"}),
    "guestagent": frozenset(),
    "native": frozenset(),
}
"""What each package may import of the others (its own modules always)."""

MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 60
"""Hard bounds; the aims are 300 and 40."""

BANNED_NAMES = re.compile(r"(^|_)(utils?|helpers?|managers?|misc|common)(_|$)")


@cache
def tracked(*patterns: str) -> tuple[Path, ...]:
    """Files of the checkout, tracked or new, but not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(ROOT / line for line in sorted(set(listed.stdout.splitlines())) if (ROOT / line).is_file())


def sources() -> tuple[Path, ...]:
    """Hand-written Python of the product."""
    return tuple(
        path
        for path in tracked("*.py")
        if path.relative_to(ROOT).parts[0] in PACKAGES and not re.search(r"_pb2(_grpc)?\.py$", path.name)
    )


def module_of(path: Path) -> str:
    """`hostd.drivers.contract` for hostd/drivers/contract.py."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all below it, except what stands under `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from at_run_time(child)


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports when it runs, in full; of `from a import b` both `a` and `a.b`."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in at_run_time(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_dependencies_go_one_way() -> None:
    broken: list[str] = []
    for path in sources():
        mine = module_of(path).split(".")[0]
        for name in imports(path):
            other = name.split(".")[0]
            if other not in PACKAGES or other == mine:
                continue
            if not any(within(name, allowed) for allowed in ALLOWED[mine]):
                broken.append(f"{path.relative_to(ROOT)} imports {name}")
    assert broken == []


def test_the_api_depends_on_nothing_else_of_the_control_plane() -> None:
    """Hosts import controlplane.api; it must not bring the control plane itself along."""
    broken = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        if within(module_of(path), "controlplane.api")
        for name in imports(path)
        if within(name, "controlplane") and name != "controlplane" and not within(name, "controlplane.api")
    ]
    assert broken == []


def test_the_product_never_imports_its_tests() -> None:
    assert [str(path) for path in sources() for name in imports(path) if within(name, "tests")] == []


def _import_graph() -> dict[str, set[str]]:
    modules = {module_of(path): path for path in sources()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for target in imports(path):
            if target in modules and target != name and not within(name, target):
                graph[name].add(target)
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of `graph` as the list of its nodes; [] when there is none."""
    state: dict[str, int] = {}
    trail: list[str] = []

    def visit(node: str) -> list[str]:
        state[node] = 1
        trail.append(node)
        for after in sorted(graph.get(node, ())):
            if state.get(after) == 1:
                return [*trail[trail.index(after) :], after]
            if after not in state and (found := visit(after)):
                return found
        trail.pop()
        state[node] = 2
        return []

    for start in sorted(graph):
        if start not in state and (found := visit(start)):
            return found
    return []


def test_a_cycle_would_be_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_cycles() -> None:
    assert find_cycle(_import_graph()) == []


@pytest.mark.parametrize("package", PACKAGES[:-1])
def test_one_error_root_a_package(package: str) -> None:
    """Every exception class of a package derives from one root (native raises OSError and ValueError only)."""
    bases: dict[str, list[str]] = {}
    for path in sources():
        if not within(module_of(path), package):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]

    def builtin_root(name: str) -> set[str]:
        if name not in bases:
            return set()
        found: set[str] = set()
        for base in bases[name]:
            found |= builtin_root(base) if base in bases else {name} if base.endswith(("Exception", "Error")) else set()
        return found

    roots = set().union(*(builtin_root(name) for name in bases))
    assert len(roots) == 1, f"{package} has these error roots: {sorted(roots)}"


def test_files_and_functions_keep_to_their_size() -> None:
    over: list[str] = []
    for path in sources():
        where = path.relative_to(ROOT)
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MOST_FILE_LINES:
            over.append(f"{where}: {count} lines")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_FUNCTION_LINES:
                    over.append(f"{where}:{node.lineno} {node.name}: {lines} lines")
    for path in tracked("*.c", "*.h"):
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MOST_FILE_LINES and "tests" not in path.parts:
            over.append(f"{path.relative_to(ROOT)}: {count} lines")
    assert over == []


def test_modules_are_named_for_what_they_are() -> None:
    assert [str(path.relative_to(ROOT)) for path in sources() if BANNED_NAMES.search(path.stem)] == []


def test_every_module_says_what_it_promises() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.stat().st_size > 0 and ast.get_docstring(parsed(path)) is None
    ]
    assert silent == []


def test_every_rpc_has_a_contract() -> None:
    """The comment above each rpc says whether it may be repeated, or names the rpc whose contract it shares."""
    bare: list[str] = []
    words = re.compile(r"[Ii]dempotent|[Rr]ead only|As [A-Z][a-z]+\.[A-Z]")
    for path in tracked("*.proto"):
        comment: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            text = line.strip()
            if text.startswith("//"):
                comment.append(text)
                continue
            if text.startswith("rpc ") and not words.search(" ".join(comment)):
                bare.append(f"{path.name}: {text}")
            comment = []
    assert bare == []


def test_no_wait_swallows_a_cancellation() -> None:
    """In Python 3.11 `asyncio.wait_for` returns instead of being cancelled when its future is done by then: a task that
    is asked once to end goes on for ever. `asyncio.timeout` does not."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and node.attr == "wait_for" and ast.unparse(node.value) == "asyncio"
    ]
    assert calls == []


def test_nothing_waits_a_fixed_time() -> None:
    """Tests wait for what they want to see, with a deadline; a fixed sleep hides a race or wastes time."""
    waits: list[str] = []
    for path in tracked("tests/*.py"):
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "sleep":
                continue
            inside_poll = any(
                isinstance(loop, ast.While | ast.For | ast.AsyncFor)
                and loop.lineno <= node.lineno <= (loop.end_lineno or 0)
                for loop in ast.walk(parsed(path))
            )
            zero = bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
            if not inside_poll and not zero:
                waits.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert waits == []
