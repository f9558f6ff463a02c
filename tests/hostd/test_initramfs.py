"""The guest's initramfs, read back by cpio itself."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
import zstandard

from hostd import initramfs, kernel
from hostd.errors import KernelMissing
from hostd.initramfs import WANTED, decompress, dependencies, load_order, module_name

CACHE = Path("/var/cache/sandloom")


def elf(depends: str = "", softdep: str = "") -> bytes:
    """As much of a module as is looked at: its .modinfo."""
    fields = [b"license=GPL", b"depends=" + depends.encode()]
    fields += [b"softdep=" + softdep.encode()] if softdep else []
    return b"\x7fELF\0" + b"\0".join(fields) + b"\0"


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio (Debian: cpio) to read the archive back")
def test_cpio_reads_what_was_written(tmp_path: Path) -> None:
    modules = {"a": elf(), "b": elf("a") + b"x" * 3}
    archive = initramfs.initramfs(b"#!agent", modules, ["a", "b"])
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True)
    assert listed.stdout.decode().split() == [
        "dev", "proc", "sys", "mod", "run", "l", "o", "init", "mod/order", "mod/a.ko", "mod/b.ko",
    ]  # fmt: skip
    assert listed.stderr == b""
    subprocess.run(["cpio", "-i", "--quiet", "--no-preserve-owner"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "init").read_bytes() == b"#!agent"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "mod/order").read_text() == "a.ko\nb.ko\n"
    assert (tmp_path / "mod/b.ko").read_bytes() == modules["b"]


def test_the_same_values_give_the_same_bytes() -> None:
    modules = {"a": elf()}
    assert initramfs.initramfs(b"x", modules, ["a"]) == initramfs.initramfs(b"x", modules, ["a"])


def test_dependencies_come_first_and_once() -> None:
    modules = {"top": elf("mid,base"), "mid": elf("base"), "base": elf(softdep="pre: nice post: later")}
    assert load_order(["top", "mid"], modules, frozenset()) == ["base", "mid", "top"]
    assert load_order(["top"], {**modules, "nice": elf(), "later": elf()}, frozenset()) == [
        "nice",
        "base",
        "mid",
        "top",
    ]


def test_what_is_built_in_is_not_loaded() -> None:
    assert load_order(["top"], {"top": elf("base")}, frozenset({"base"})) == ["top"]
    assert load_order(["base"], {}, frozenset({"base"})) == []


def test_a_module_that_is_nowhere_is_named_with_who_needs_it() -> None:
    with pytest.raises(KernelMissing, match=r"no module base \(needed by top"):
        load_order(["top"], {"top": elf("base")}, frozenset())
    with pytest.raises(KernelMissing, match="no module top"):
        load_order(["top"], {}, frozenset())


def test_an_algorithms_provider_is_loaded_before_its_user() -> None:
    modules = {"libcrc32c": elf(), "crc32c_generic": elf(), "erofs": elf("libcrc32c")}
    assert load_order(["erofs"], modules, frozenset()) == ["crc32c_generic", "libcrc32c", "erofs"]


def test_names_and_dashes() -> None:
    assert module_name("kernel/drivers/nvdimm/nd-pmem.ko.xz") == "nd_pmem"
    assert dependencies(elf("a-b,c", "pre: d-e")).hard == ("a_b", "c")
    assert dependencies(elf("", "pre: d-e")).soft == ("d_e",)
    assert dependencies(b"").hard == ()


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".xz", lzma.compress), (".zst", zstandard.ZstdCompressor().compress)],
    ids=["plain", "xz", "zstd"],
)
def test_modules_are_unpacked_whatever_packed_them(suffix: str, pack: object) -> None:
    assert decompress(f"a.ko{suffix}", pack(b"module")) == b"module"  # type: ignore[operator]


@pytest.mark.slow
def test_debians_own_kernel_has_all_that_is_wanted() -> None:
    kept = sorted((CACHE / "debs").glob("linux-image-*.deb")) if CACHE.exists() else []
    if not kept:
        pytest.skip("no guest kernel's package is in the cache yet: a run of hostd fetches it")
    files = kernel.extract(kept[-1])
    order = load_order(WANTED, files.modules, files.built_in)
    assert set(WANTED) <= {*order, *files.built_in}
    for position, name in enumerate(order):
        for need in dependencies(files.modules[name]).hard:
            assert need in order[:position] or need in files.built_in
    assert files.vmlinuz[0x202:0x206] == b"HdrS"  # a bzImage (Documentation/arch/x86/boot.rst)


def test_what_is_no_package_is_named(tmp_path: Path) -> None:
    deb = tmp_path / "linux-image-x.deb"
    deb.write_bytes(b"no archive")
    with pytest.raises(KernelMissing, match=r"linux-image-x\.deb"):
        kernel.extract(deb)
