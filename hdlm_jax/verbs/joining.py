"""Flags that several verbs share: the mesh of devices, and the processes that are joined."""

from contextlib import AbstractContextManager

from hdlm_jax.errors import require

NAMES = ("coordinator", "num_processes", "process_id", "peer_timeout")


def add_arguments(parser) -> None:
    """Adds the flags that join processes."""
    joined = parser.add_argument_group("several processes, one per host, each with this command")
    mode = "'auto' (default): join those of a TPU slice, SLURM or Open MPI, if any; 'on': join or fail; 'off'"
    joined.add_argument("--distributed", default="auto", metavar="MODE", help=mode)
    joined.add_argument("--coordinator", metavar="HOST:PORT", help="an address of process 0, where nothing tells it")
    joined.add_argument("--num-processes", type=int, metavar="N", help="with --coordinator: how many there are")
    joined.add_argument("--process-id", type=int, metavar="I", help="with --coordinator: which one this is, from 0")
    timeout = "after so long without a sign a process counts as dead (default: 100)"
    joined.add_argument("--peer-timeout", type=int, default=100, metavar="SECONDS", help=timeout)


def joined(args) -> AbstractContextManager[None]:
    """The processes of the flags, joined for the block."""
    from hdlm_jax.training import distributed

    return distributed.joined(args.distributed, **{name: getattr(args, name) for name in NAMES})


def mesh_sizes(flag: str, text: str) -> tuple[int, int, int]:
    """(data, fsdp, tensor) of a flag; -1 is what is left.

    >>> mesh_sizes("--mesh", "-1,4,1")
    (-1, 4, 1)
    """
    words = text.split(",")
    whole = len(words) == 3 and all(word.strip().removeprefix("-").isdigit() for word in words)
    require(whole, flag, text, "three sizes data,fsdp,tensor, as 4,16,1")
    return tuple(int(word) for word in words)
