"""`time` by the real agent, sanitized, on this machine: reading stays, setting is refused and told."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.api.services import Answerer, ServicePolicy
from hostd.errors import AgentLost
from tests.guestagent.servicesagent import served
from tests.guestagent.test_sysview_agent import python

SCRIPT = """
import time
now = (ctypes.c_long * 2)(*divmod(time.time_ns(), 10**9))
zero = (ctypes.c_long * 2)(int(time.time()), 0)
timex, change = (ctypes.c_ulong * 26)(), (ctypes.c_ulong * 26)(0x8000)
print(raw(227, 0, now), raw(164, zero, None), raw(159, change), raw(305, 0, change), raw(305, 1, timex))
print(raw(159, timex) in range(6), abs(timex[9] - time.time()) < 60, raw(305, 0, timex) in range(6), raw(159, 8))
print(no(time.time), no(lambda: time.clock_gettime(time.CLOCK_REALTIME)), raw(228, 0, now))
"""


@pytest.mark.parametrize("answerer", [Answerer.TOOL, Answerer.DENY])
async def test_reading_stays_and_setting_is_refused(answerer: Answerer, sanitized_agent: Path, tmp_path: Path) -> None:
    async with served(sanitized_agent, tmp_path, ServicePolicy(time=answerer)) as agent:
        assert (await python(agent, SCRIPT)).splitlines() == [
            "EPERM " * 4 + "EPERM",
            "True True True EFAULT",
            "fine fine 0",
        ]
        for call in ("clock_settime", "settimeofday", "adjtimex", "clock_adjtime"):
            assert any(f" {call}(" in line and line.endswith(f": time: {answerer.value}") for line in agent.told)
        assert agent.tool is not None and agent.tool.account.decisions["time: refused"] == 5
        with pytest.raises(AgentLost, match="no clock of a sandbox's own"):
            await agent.link.clock(1)  # this machine's is not a sandbox's
