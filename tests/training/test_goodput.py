"""Where the time goes: every second is booked once, restarts add up, steps that are done again are lost."""

import pytest

from hdlm_jax.training.goodput import KINDS, Account


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def spent(record):
    return {kind: record[f"goodput/{kind}"] for kind in KINDS if record[f"goodput/{kind}"]}


def test_what_is_not_booked_was_steps(clock):
    account = Account(now=clock)
    for kind, seconds in (("start", 2), ("compile", 3), ("data", 0.5)):
        with account.spend(kind):
            clock.passes(seconds)
    clock.passes(4.5)
    record = account.record(wall=7.0)
    assert spent(record) == {"start": 2, "compile": 3, "data": 0.5, "step": 4.5}
    assert record["goodput/share"] == 0.45 and record["goodput/time"] == 7.0


def test_time_is_booked_though_the_block_fails(clock):
    account = Account(now=clock)
    with pytest.raises(KeyError), account.spend("save"):
        clock.passes(1)
        raise KeyError
    assert spent(account.record(0.0)) == {"save": 1}


def test_a_restart_goes_on_and_counts_what_was_lost(clock):
    """Killed after step 6, checkpoint 4: the seconds of steps 5 and 6 move from `step` to `lost`."""
    account, records = Account(now=clock), []
    for step in range(1, 7):
        clock.passes(2)
        records.append({"step": step, **account.record(1000.0 + clock.now)})
        records.append({"step": step, "held_out/bits_per_byte": 1.0})
    killed = 1000.0 + clock.now
    clock.passes(50)
    again = Account(now=clock)
    with again.spend("restore"):
        clock.passes(3)
    again.resume(records, first=4, wall=killed + 50)
    clock.passes(2)
    assert spent(again.record(0.0)) == {"step": 8 + 2, "lost": 4, "down": 50, "restore": 3}


def test_a_first_start_has_nothing_to_go_on_from(clock):
    account = Account(now=clock)
    account.resume([{"step": 3, "train/loss": 1.0}], first=3, wall=5.0)
    clock.passes(1)
    assert spent(account.record(0.0)) == {"step": 1}
