"""`sockets: tool` with programs that nobody here wrote, in real containers on the host's kernel.

The same programs run beside the in-guest agent in tests/guestagent/test_services_programs.py; here they are in an image
of this machine's own files, with nothing but a supervisor between them and the world.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.server
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from controlplane.api.services import GATEWAY
from hostd.drivers.contract import LayerFile
from tests.guestagent.servicesagent import tool_policy
from tests.hostd.drivers.oci.rig import Surroundings, layer_of
from tests.hostd.drivers.oci.test_services import DEADLINE_S, Box, served
from tests.hostd.programimage import programs_tar, which

pytestmark = pytest.mark.slow
PAYLOAD = bytes(range(256)) * 2048
PYTHON = "/usr/bin/python3"
PROGRAMS = ("curl", "redis-server", "redis-cli", "redis-benchmark", "nginx", PYTHON)
FOREIGN = """
int main(void) {
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(20) : "memory");  /* getpid by its 32-bit number */
    return 0;
}
"""


def need(*programs: str) -> None:
    missing = [one for one in programs if which(one) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} on this machine (deploy/install-packages.sh)")


@pytest.fixture(scope="module")
def layers(around: Surroundings, tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerFile, ...]:
    """The busybox image with those programs above it, and one that calls by 32-bit numbers."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "foreign.c").write_text(FOREIGN)
    argv = ["gcc", "-O1", "-static", str(folder / "foreign.c"), "-o", str(folder / "foreign")]
    subprocess.run(argv, check=True, timeout=120)
    version = subprocess.run(
        [PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    extra = {"usr/local/bin/foreign": (folder / "foreign").read_bytes(), "page/index.html": PAYLOAD}
    tar = programs_tar(PROGRAMS, [Path(f"/usr/lib/python{version}")], extra)
    return (*around.layers, layer_of(tar, around.root / "programs"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[int]:
    """The port of a web server on the host's loopback."""
    (tmp_path / "payload").write_bytes(PAYLOAD)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def fetched(box: Box, path: str = "index.html") -> bytes:
    """What the published web server gives, once it serves."""
    url = f"http://127.0.0.1:{box.host_port}/{path}"

    def get() -> bytes:
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            body: bytes = answer.read()
            return body

    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(OSError):
                return await asyncio.to_thread(get)
            await asyncio.sleep(0.1)


async def test_curl_and_python_fetch(around: Surroundings, layers: tuple[LayerFile, ...], web: int) -> None:
    need("curl")
    policy = tool_policy(f"tcp:{GATEWAY}:{web}")
    known = subprocess.run(["sha256sum"], input=PAYLOAD, capture_output=True, check=True).stdout.decode().strip()  # noqa: ASYNC221
    async with served(around, "curl", policy, layers=layers) as box:
        said = await box.sh(f"curl -sS --max-time 60 http://{GATEWAY}:{web}/payload | sha256sum")
        assert said.strip() == known
        assert (await box.sh("curl -s -m 30 http://1.2.3.4/; echo $?")).strip() == "7"
        script = f"import urllib.request; print(len(urllib.request.urlopen('http://{GATEWAY}:{web}/payload').read()))"
        assert (await box.sh(f'{PYTHON} -c "{script}"')).strip() == str(len(PAYLOAD))


async def test_pythons_web_server_is_published(around: Surroundings, layers: tuple[LayerFile, ...]) -> None:
    argv = (PYTHON, "-m", "http.server", "--directory", "/page", "8000")
    async with served(around, "pyweb", tool_policy(publish=("0:8000",)), argv, layers) as box:
        for _ in range(3):
            assert await fetched(box) == PAYLOAD
        assert box.engine.supervisor is not None
        usage = box.engine.service_usage()
        assert usage is not None and usage.bytes_out > 3 * len(PAYLOAD) and usage.connections >= 3


async def test_nginx_is_published(around: Surroundings, layers: tuple[LayerFile, ...]) -> None:
    need("nginx")
    config = (
        "worker_processes 2; daemon off; pid /tmp/pid; error_log /tmp/error.log; user root root; "
        "events { worker_connections 64; } "
        "http { access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; "
        "fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s; "
        "server { listen 8080 reuseport; root /page; } }"
    )
    argv = ("sh", "-c", f"echo '{config}' > /tmp/conf; exec /usr/sbin/nginx -e /tmp/error.log -c /tmp/conf")
    async with served(around, "nginx", tool_policy(publish=("0:8080",)), argv, layers) as box:
        for _ in range(3):
            assert await fetched(box) == PAYLOAD


async def test_redis_and_its_benchmark(around: Surroundings, layers: tuple[LayerFile, ...]) -> None:
    need("redis-server", "redis-benchmark", "redis-cli")
    argv = ("redis-server", "--save", "", "--protected-mode", "no", "--bind", "0.0.0.0")
    async with served(around, "redis", tool_policy(publish=("0:6379",)), argv, layers) as box:
        said = await box.sh("until redis-cli ping; do :; done 2>&0; redis-benchmark -q -n 1000 -t set,get")
        assert said.count("requests per second") == 2, said
        outside = await asyncio.create_subprocess_exec(
            "redis-benchmark", "-q", "-p", str(box.host_port), "-n", "500", "-c", "10", "-t", "set,get",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(DEADLINE_S):
            out, _ = await outside.communicate()
        assert outside.returncode == 0 and out.count(b"requests per second") == 2, out


async def test_calls_by_32_bit_numbers_end_their_caller(around: Surroundings, layers: tuple[LayerFile, ...]) -> None:
    async with served(around, "foreign", tool_policy(f"tcp:{GATEWAY}:80"), layers=layers) as box:
        assert "159" in await box.sh("/usr/local/bin/foreign; echo $?")  # 128 + SIGSYS
