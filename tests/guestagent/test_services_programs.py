"""`sockets: tool` with programs that nobody here wrote, at the real agent in a namespace without a device.

Each is skipped, by name, where this machine has it not. Clients reach a web server of the host's loopback as the
gateway; servers are published and asked by clients of the host.
"""

from __future__ import annotations

import asyncio
import functools
import http.server
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.api.services import GATEWAY, ServicePolicy
from tests.guestagent.realagent import built
from tests.guestagent.servicesagent import served, tool_policy

pytestmark = pytest.mark.slow
PAYLOAD = bytes(range(256)) * 4096
HOST_DEADLINE_S = 90.0


def need(*programs: str) -> None:
    missing = [one for one in programs if shutil.which(one, path="/usr/local/bin:/usr/bin:/usr/sbin:/bin") is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} on this machine")


@pytest.fixture(scope="module")
def agent_program() -> Path:
    return built("sandloom-agent")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A folder that a web server of the host's loopback shows, and its port."""
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "payload").write_bytes(PAYLOAD)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield folder, server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def run_in(program: Path, folder: Path, policy: ServicePolicy, script: str) -> str:
    async with served(program, folder, policy) as agent:
        code, said = await agent.run("/bin/bash", "-ec", script)
        assert code == 0, said
        return said


async def test_curl(agent_program: Path, tmp_path: Path, web: tuple[Path, int]) -> None:
    need("curl")
    script = (
        f"curl -sS --max-time 60 http://{GATEWAY}:{web[1]}/payload | cksum; curl -sS -m 9 http://1.2.3.4/ || echo $?"
    )
    said = await run_in(agent_program, tmp_path, tool_policy(f"tcp:{GATEWAY}:{web[1]}"), script)
    known = subprocess.run(["cksum"], input=PAYLOAD, capture_output=True, check=True).stdout.decode().strip()  # noqa: ASYNC221
    assert said.splitlines()[0] == known and said.splitlines()[-1] == "7"


async def test_pythons_requests(agent_program: Path, tmp_path: Path, web: tuple[Path, int]) -> None:
    has = subprocess.run(["/usr/bin/python3", "-c", "import requests"], capture_output=True, timeout=HOST_DEADLINE_S)  # noqa: ASYNC221
    if has.returncode:
        pytest.skip("needs python3-requests on this machine (deploy/install-packages.sh)")
    script = (
        "import requests\n"
        "with requests.Session() as session:\n"
        f"    print(*(len(session.get('http://{GATEWAY}:{web[1]}/payload', timeout=60).content) for _ in range(3)))\n"
        f"    try: session.get('http://1.2.3.4/', timeout=60)\n"
        "    except requests.ConnectionError: print('refused')\n"
    )
    async with served(agent_program, tmp_path, tool_policy(f"tcp:{GATEWAY}:{web[1]}")) as agent:
        code, said = await agent.run("/usr/bin/python3", "-c", script)
    assert (code, said.split()) == (0, [str(len(PAYLOAD))] * 3 + ["refused"]), said


async def test_git_clones_over_http(agent_program: Path, tmp_path: Path, web: tuple[Path, int]) -> None:
    need("git")
    make = (
        "git init -q src && cd src && git config user.email a@b && git config user.name a && echo 1 > f && git add f &&"
        " git commit -qm one && git clone -q --bare . ../r.git && cd ../r.git && git update-server-info"
    )
    subprocess.run(["/bin/sh", "-ec", make], cwd=web[0], check=True, timeout=HOST_DEADLINE_S)  # noqa: ASYNC221
    script = f"cd {tmp_path} && git clone -q http://{GATEWAY}:{web[1]}/r.git out && cat out/f"
    assert await run_in(agent_program, tmp_path, tool_policy(f"tcp:{GATEWAY}:{web[1]}"), script) == "1\n"


async def test_apt_updates_from_a_mirror(agent_program: Path, tmp_path: Path, web: tuple[Path, int]) -> None:
    need("apt-get")
    (web[0] / "Packages").write_text("Package: thing\nVersion: 1\nArchitecture: all\nFilename: ./t.deb\nSize: 1\n\n")
    (tmp_path / "list").write_text(f"deb [trusted=yes] http://{GATEWAY}:{web[1]}/ ./\n")
    state, cache = tmp_path / "state", tmp_path / "cache"
    (state / "lists" / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    options = {
        "Dir::Etc::sourcelist": tmp_path / "list", "Dir::Etc::sourceparts": "-", "Dir::State": state,
        "Dir::Cache": cache,
        "APT::Sandbox::User": "root", "Acquire::http::Proxy": "DIRECT", "APT::Update::Error-Mode": "any",
    }  # fmt: skip
    given = " ".join(f"-o {key}={value}" for key, value in options.items())
    script = f"apt-get {given} update && apt-cache {given} show thing"
    said = await run_in(agent_program, tmp_path, tool_policy(f"tcp:{GATEWAY}:{web[1]}"), script)
    assert "Package: thing" in said


async def test_redis_and_its_benchmark(agent_program: Path, tmp_path: Path) -> None:
    need("redis-server", "redis-benchmark", "redis-cli")
    async with served(agent_program, tmp_path, tool_policy(publish=("0:6379",))) as agent:
        assert agent.tool is not None
        port = str(agent.tool.published[0].host_port)
        options = f"--save '' --dir {tmp_path} --protected-mode no --bind 0.0.0.0"
        server = asyncio.create_task(agent.run("/bin/sh", "-c", f"exec redis-server {options}", deadline_s=200))
        code, inside = await agent.run(
            "/bin/bash",
            "-c",
            "for i in $(seq 100); do redis-cli ping && break; done; redis-benchmark -q -n 2000 -t set,get",
        )
        assert code == 0 and "requests per second" in inside, inside
        outside = await asyncio.create_subprocess_exec(
            "redis-benchmark",
            "-q",
            "-p",
            port,
            "-n",
            "2000",
            "-c",
            "20",
            "-t",
            "set,get",
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(HOST_DEADLINE_S):
            out, _ = await outside.communicate()
        assert outside.returncode == 0 and out.count(b"requests per second") == 2, out
        await agent.run("/bin/sh", "-c", "redis-cli shutdown nosave")
        await server


async def test_nginx_serves_a_published_page(agent_program: Path, tmp_path: Path) -> None:
    need("nginx", "curl")
    (tmp_path / "index.html").write_bytes(PAYLOAD)
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"worker_processes 2; daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; user root;\n"
        "events { worker_connections 64; }\n"
        f"http {{ access_log off; server {{ listen 8080 reuseport; root {tmp_path}; }} }}\n"
    )
    async with served(agent_program, tmp_path, tool_policy(publish=("0:8080",))) as agent:
        assert agent.tool is not None
        address = f"http://127.0.0.1:{agent.tool.published[0].host_port}/index.html"
        server = asyncio.create_task(agent.run("/bin/sh", "-c", f"exec nginx -c {config}", deadline_s=200))
        for _ in range(3):
            client = await asyncio.create_subprocess_exec(
                "curl", "-sS", "--retry", "50", "--retry-all-errors", "--retry-delay", "1", "--max-time", "60", address,
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            async with asyncio.timeout(HOST_DEADLINE_S):
                out, _ = await client.communicate()
            assert out == PAYLOAD
        await agent.run("/bin/sh", "-c", f"kill $(cat {tmp_path}/pid)")
        await server


async def test_openssl_talks_tls_both_ways(agent_program: Path, tmp_path: Path) -> None:
    need("openssl")
    key, cert = tmp_path / "key", tmp_path / "cert"
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    subprocess.run(  # noqa: ASYNC221
        [*request, "-subj", "/CN=thing", "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True
    )
    async with served(agent_program, tmp_path, tool_policy(f"tcp:{GATEWAY}:*")) as agent:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = await asyncio.create_subprocess_exec(
            "openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-key", str(key), "-cert", str(cert), "-rev",
            "-quiet",
            stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            talk = f"(echo hello; sleep 2) | timeout 20 openssl s_client -quiet -connect {GATEWAY}:{port} 2>/dev/null"
            script = f"for i in $(seq 50); do {talk} | grep olleh && break; sleep 0.2; done"
            code, said = await agent.run("/bin/bash", "-c", script)
            assert "olleh" in said, (code, said)
        finally:
            server.kill()
            await server.wait()
