"""Progress: plain lines now and then, a bar on a terminal."""

import io

from hdlm_jax.training.progress import Progress

RECORD = {"train/loss": 2.5, "train/tokens_per_second": 12345.0, "train/mfu": 0.123}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(updates, total=100, first=0):
    """What is printed when `update` comes at these (second, step, record)."""
    stream, clock = io.StringIO(), [0.0]
    with Progress(total, first, stream, now=lambda: clock[0]) as progress:
        for clock[0], step, record in updates:
            progress.update(step, record)
    return stream.getvalue().splitlines()


def test_plain_lines_come_first_at_once_then_every_ten_seconds_and_at_the_end():
    shown = lines([(t, t, RECORD) for t in (1, 5, 10, 11, 12, 22, 100)])
    assert [line.split(":")[0] for line in shown] == ["step 1/100", "step 11/100", "step 22/100", "step 100/100"]
    assert shown[1] == "step 11/100: loss 2.500, 12,345 tokens/s, MFU 12.3%, 1:29 left"


def test_the_time_left_counts_the_steps_of_this_process_only():
    assert lines([(10, 60, RECORD)], first=50)[0].endswith("0:40 left")


def test_what_a_record_lacks_is_not_shown():
    assert lines([(1, 1, {})]) == ["step 1/100: no finite loss, 1:39 left"]


def test_a_terminal_gets_a_bar_and_notes_above_it():
    stream = Terminal()
    with Progress(100, 40, stream) as progress:
        progress.update(41, RECORD)
        progress.note("saved")
        progress.update(100, RECORD)
    assert "100/100" in stream.getvalue() and "loss 2.500" in stream.getvalue()
    assert "saved\n" in stream.getvalue()
