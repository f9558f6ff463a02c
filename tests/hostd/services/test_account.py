"""Refusals are all counted, and told at a bounded rate."""

from __future__ import annotations

from hostd.services.account import TOLD_AT_ONCE, Account, Refusal

REFUSAL = Refusal("sockets", 12, "connect", "tcp 10.0.0.1:80", "no rule allows it")


def test_a_refusal_says_who_what_and_why() -> None:
    assert str(REFUSAL) == "sockets: pid 12 connect(tcp 10.0.0.1:80): no rule allows it"


def test_the_rate_is_bounded_and_what_was_left_out_is_told() -> None:
    told: list[str] = []
    account = Account(tell=told.append)
    for _ in range(1000):
        account.refused(REFUSAL, 5.0)
    assert len(told) == TOLD_AT_ONCE
    account.refused(REFUSAL, 6.0)
    assert told[-1].endswith("980 more were not told")
    assert account.decisions["sockets: refused"] == 1001
