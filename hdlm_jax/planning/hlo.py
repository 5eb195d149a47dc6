"""What a compiled program does, read from the text its compiler dumps: loops, collectives, cycles, buffers.

A loop's body counts as often as it runs, of a choice the branch of the most cycles. The text is that after code
generation, where a collective may stand in several clones of one fusion: clones share a channel and count once.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(\S+) = (\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|\S+) ([a-z][\w-]*)\((.*)$", re.DOTALL
)
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    op: str
    rest: str  # operands and attributes

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute names, as in `body=%region.1`."""
        found = re.search(rf"\b{name}=%([\w.-]+)", self.rest)
        return found and found.group(1)

    def called(self) -> list[str]:
        """The computations that it runs: a loop's body, a fusion's inside, all branches of a choice."""
        several = re.search(r"branch_computations=\{(.*?)\}", self.rest)
        if several:
            return re.findall(r"%([\w.-]+)", several.group(1))
        alone = ("body", "calls", "called_computation", "true_computation", "false_computation")
        names = [self.attribute(name) for name in (*alone, *(["to_apply"] if self.op == "call" else []))]
        return [name for name in names if name]


class Collective(NamedTuple):
    """All executions of one collective in a step, on one chip."""

    kind: str
    count: int
    bytes: float  # of the larger of operand and result, all executions together
    elements: int  # of the largest result
    source: str  # the operation of the program it stands for


class Buffer(NamedTuple):
    """One of the largest allocations."""

    bytes: float
    shapes: str
    source: str


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of every computation by name, and the name of the entry."""
    found, entry, lines = {}, "", []
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%([\w.-]+) \(.*\{\s*$", line)
        if head:
            lines = found.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif re.match(r"^\s+(ROOT )?%\S+ = ", line):
            lines.append(line)
        elif lines:  # a kernel's configuration goes over several lines, some of which look like an end
            lines[-1] += "\n" + line
    matches = {name: [INSTRUCTION.match(one) for one in lines] for name, lines in found.items()}
    return {name: [Instruction(*one.groups()) for one in all_of if one] for name, all_of in matches.items()}, entry


def size(type_text: str) -> int:
    """Bytes of a type, tuples summed.

    >>> size("(bf16[2,3]{1,0:T(8,128)}, f32[])")
    16
    """
    return sum(BYTES.get(kind, 4) * elements for kind, elements in _shapes(type_text))


def _shapes(type_text: str) -> list[tuple[str, int]]:
    return [(kind, math.prod(int(n) for n in dims.split(",") if n)) for kind, dims in SHAPE.findall(type_text)]


def trips(condition: list[Instruction]) -> int:
    """How often a loop runs whose condition compares its counter, from 0, with a constant; 1 if it is another."""
    constants = {i.name: re.match(r"(\d+)\)", i.rest) for i in condition if i.op == "constant"}
    for i in condition:
        if i.op == "compare" and "direction=LT" in i.rest:
            names = re.findall(r"%([\w.-]+)", i.rest.split(")")[0])
            counts = [int(constants[name].group(1)) for name in names if constants.get(name)]
            if counts:
                return max(counts)
    fused = [i for i in condition if i.op == "fusion"]
    counts = [int(match.group(1)) for match in constants.values() if match] if fused else []
    return max(counts, default=1)


class Program:
    """A dumped program: every computation with how often a step runs it."""

    def __init__(self, text: str):
        self.parts, self.entry = computations(text)
        self.runs, self.fused = self._visit(self.entry)  # computations that are scheduled; those inside fusions

    def _visit(self, name: str) -> tuple[Counter[str], Counter[str]]:
        """How often one run of a computation runs others, itself included, and those inside fusions."""
        runs, fused = Counter([name]), Counter()
        for i in self.parts.get(name, ()):
            repeats = trips(self.parts.get(i.attribute("condition") or "", [])) if i.op == "while" else 1
            inside = [self._visit(called) for called in i.called()]
            if i.op == "conditional":
                inside = [max(inside, key=lambda branch: self._cycles(branch[0]))]
            for more, more_fused in inside:
                for called, count in more.items():
                    (fused if i.op == "fusion" else runs)[called] += repeats * count
                for called, count in more_fused.items():
                    fused[called] += repeats * count
        return runs, fused

    def cycles(self) -> float:
        """The compiler's own estimate of a step's cycles, without collectives and kernels."""
        return self._cycles(self.runs)

    def _cycles(self, runs: Counter[str]) -> float:
        found = 0.0
        for name, count in runs.items():
            for i in self.parts.get(name, ()):
                estimate = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
                found += count * int(estimate.group(1)) if estimate else 0
        return found

    def collectives(self) -> list[Collective]:
        """Every collective of a step, clones once, largest first."""
        found: dict[tuple, Collective] = {}
        for runs in (self.runs, self.fused):
            for name, count in runs.items():
                types = {i.name: i.type for i in self.parts.get(name, ())}
                for i in self.parts.get(name, ()):
                    kind = next((k for k in COLLECTIVES if i.op in (k, f"{k}-start")), None)
                    if kind is None:
                        continue
                    channel = re.search(r"channel_id=(\d+)", i.rest)
                    cloned = channel is not None and runs is self.fused
                    key = (kind, channel.group(1), _shapes(i.type)[0]) if cloned else (name, i.name)
                    if key in found and found[key].count >= count:
                        continue
                    operands = re.findall(r"%([\w.-]+)", i.rest.split("), ")[0])
                    given = sum(size(types.get(operand, "")) for operand in operands)
                    result = size(i.type) - (given if i.op.endswith("-start") and kind != "all-reduce" else 0)
                    scattered = kind == "all-reduce" and "all-reduce-scatter" in name
                    source = re.search(r'op_name="([^"]*)"', i.rest)
                    found[key] = Collective(
                        "reduce-scatter" if scattered else kind,
                        count,
                        float(count * max(given, result)),
                        max((elements for _, elements in _shapes(i.type)), default=0),
                        source.group(1) if source else "",
                    )
        return sorted(found.values(), key=lambda c: -c.bytes)

    def source_of(self, shape: str) -> str:
        """The operation of the program that makes an array of a shape, as `f32[2,3]`; the last one found."""
        for instructions in reversed(self.parts.values()):
            for i in instructions:
                named = i.type.startswith(shape) and re.search(r'op_name="([^"]*)"', i.rest)
                if named:
                    return named.group(1)
        return ""


def buffers(report: str, program: Program, count: int = 8) -> list[Buffer]:
    """The largest allocations of a memory-usage report."""
    row = re.compile(r"^\s*\S+\(\s*\d+%\);\s*([\d.]+)(\w*iB|B);\s*\d+;\s*\d+; (.*)$", re.MULTILINE)
    units = {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
    found = []
    for amount, unit, shapes in row.findall(report)[:count]:
        first = re.sub(r"^\d+×", "", shapes.split(", ")[0])
        found.append(Buffer(float(amount) * units[unit], shapes, program.source_of(first)))
    return found
