"""Names become numbers in the image's own files, and in no other's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostd.drivers.oci.users import MAX_FILE_BYTES, Identity, identity_of, open_in_root, read_in_root, resolve
from hostd.errors import CommandFailed, HostdError

PASSWD = """root:x:0:0:root:/root:/bin/sh
# a comment:x:1:1
web:x:33:34:www:/var/www:/bin/false
broken:x:no:34::/:
short:x
"""
GROUP = """root:x:0:
www:x:34:
logs:x:50:web,other
media:x:51:other,web
"""


@pytest.mark.parametrize(
    ("user", "identity"),
    [
        ("", Identity(0, 0)),
        ("root", Identity(0, 0)),
        ("web", Identity(33, 34, (50, 51))),
        ("33", Identity(33, 34, (50, 51))),
        ("web:logs", Identity(33, 50)),
        ("web:7", Identity(33, 7)),
        ("1234", Identity(1234, 0)),
        ("1234:56", Identity(1234, 56)),
        (":50", Identity(0, 50)),
    ],
)
def test_as_docker_has_it(user: str, identity: Identity) -> None:
    assert resolve(user, PASSWD, GROUP) == identity


@pytest.mark.parametrize("user", ["nobody", "web:nogroup", "broken", "short", "-1", "4294967295", "٣", "99999999999"])
def test_who_is_not_there_is_named(user: str) -> None:
    with pytest.raises(ValueError, match="is not in the image's"):
        resolve(user, PASSWD, GROUP)


def image(root: Path) -> Path:
    (root / "etc").mkdir(parents=True)
    return root


def test_an_image_without_passwd_has_numbers_only(tmp_path: Path) -> None:
    assert identity_of("7:8", image(tmp_path)) == Identity(7, 8)
    with pytest.raises(CommandFailed, match="'web' is not in the image's /etc/passwd") as failed:
        identity_of("web", tmp_path)
    assert failed.value.exit_code == 126


@pytest.mark.parametrize("target", ["{secret}", "../../../../../../../../../../../{secret}"])
def test_a_link_out_of_the_image_leads_into_it(tmp_path: Path, target: str) -> None:
    secret = tmp_path / "host-passwd"
    secret.write_text("host:x:1:1::/:/bin/sh\n")
    root = image(tmp_path / "rootfs")
    (root / "etc" / "passwd").symlink_to(target.format(secret=secret))
    assert read_in_root(root, "/etc/passwd") == ""  # the path does not exist inside of the image
    inside = root / str(secret).lstrip("/")
    inside.parent.mkdir(parents=True)
    inside.write_text("image:x:2:3::/:/bin/sh\n")
    assert identity_of("image", root) == Identity(2, 3)


def test_a_linked_folder_leads_into_the_image_too(tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    root.mkdir()
    (root / "etc").symlink_to("/etc")
    assert read_in_root(root, "/etc/passwd") == ""  # a link to itself


def test_a_magic_link_is_not_followed(tmp_path: Path) -> None:
    root = image(tmp_path / "rootfs")
    (root / "etc" / "passwd").symlink_to("/proc/self/fd/0")
    assert read_in_root(root, "/etc/passwd") == ""


def test_a_pipe_or_a_huge_file_is_not_read(tmp_path: Path) -> None:
    root = image(tmp_path / "rootfs")
    os.mkfifo(root / "etc" / "passwd")
    with pytest.raises(HostdError, match="is no file"):
        read_in_root(root, "/etc/passwd")
    with (root / "etc" / "group").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(HostdError, match="of at most 1 MiB"):
        read_in_root(root, "/etc/group")


def test_dot_dot_stays_in_the_root(tmp_path: Path) -> None:
    root = image(tmp_path / "rootfs")
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        above = open_in_root(folder, "../..", os.O_RDONLY | os.O_DIRECTORY)
        assert os.fstat(above).st_ino == root.stat().st_ino
        os.close(above)
    finally:
        os.close(folder)
