"""What each process leaves about itself: a heartbeat line, to find the host that is slow, full or gone."""

import json
import os
import resource
import socket
import time
from pathlib import Path

import jax

from hdlm_jax import files

FOLDER = "hosts"


def beat(workdir: Path, done: int, seconds_per_step: float) -> None:
    """Appends a line to hosts/process<i>.jsonl of a run folder.

    The line holds the step, the time of day, host and process id, seconds per step here, and memory in bytes: the
    largest of the host's process so far and what its fullest device holds (None where the device does not tell).

    Raises:
      UserError: the folder cannot be written to.
    """
    held = [(device.memory_stats() or {}).get("bytes_in_use") for device in jax.local_devices()]
    line = {
        "step": done,
        "time": round(time.time(), 3),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "seconds_per_step": round(seconds_per_step, 6),
        "host_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "device_memory": max((x for x in held if x is not None), default=None),
    }
    files.append(workdir / FOLDER / f"process{jax.process_index()}.jsonl", json.dumps(line))
