"""The fake driver keeps the contract of warm guests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from hostd.drivers.contract import StartPlan
from hostd.drivers.fake import FakeDriver
from tests.contract.driver_suite import Rig, spec_of
from tests.contract.warming_suite import WarmingSuite
from tests.hostd.drivers.test_fake import FakeRig


class WarmFakeRig(FakeRig):
    """With directories: a member has one."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def plan(self, uid: str) -> StartPlan:
        return StartPlan(spec_of(uid), (), 200_000, self._root / uid)

    def left(self, plan: StartPlan) -> list[str]:
        return [*super().left(plan), *([str(plan.folder)] if plan.folder.exists() else [])]


class TestFakeWarming(WarmingSuite):
    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def rig(cls, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
        rig = WarmFakeRig(tmp_path_factory.mktemp("warm"))
        yield rig
        assert rig.fake.machines == {}


async def test_destroy_never_removes_what_is_not_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    for folder in (tmp_path, Path()):
        await FakeDriver().destroy("a", folder, None)
    assert (tmp_path / "kept").read_text() == "kept"
