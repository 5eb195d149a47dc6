"""Timing of calls, and the table."""

import time

from hdlm_jax.benchmarks.timing import seconds, table


def test_the_median_of_the_calls_after_the_first():
    waits = iter([0.3, 0.01, 0.2, 0.01])
    assert 0.01 <= seconds(lambda: time.sleep(next(waits)), repeats=3) < 0.1
    assert next(waits, None) is None


def test_a_table_aligns_names_and_shortens_numbers():
    rows = [{"kind": "slide", "rate": "3/2", "tokens/s": 12345.678, "mfu": 0.1236, "calls": 123456}]
    rows.append(rows[0] | {"kind": "ar", "tokens/s": 1.0})
    lines = table(rows).splitlines()
    assert lines[0] == "kind   rate  tokens/s  mfu     calls"
    assert lines[1] == "slide  3/2   12,346    0.1236  123456"
    assert lines[2] == "ar     3/2   1         0.1236  123456"
