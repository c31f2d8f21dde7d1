"""Reading NVIDIA machine code (SASS): instructions of a kernel and its loops.

A loop cannot be told from label order alone: waits on barriers put their retry paths behind the end of a kernel, and
the jump back from there is no loop. So loops are found as in a compiler: blocks, dominators, back edges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<text>.+?)\s*;")
_BRANCH = re.compile(r"\bBRA\b(?P<operands>.*)`\((?P<target>\.L_x_\d+)\)")
_TABLE = re.compile(r"\bBRX\b.*BRANCH_TARGETS (?P<targets>[^\"]+)\"")
_END = re.compile(r"\b(EXIT|RET)\b")
_PREDICATED = re.compile(r"^@|^BRA(\.\S+)? +!?U?P\d")
_SPILL = re.compile(r"\b(STL|LDL)\b")
_TEST = re.compile(r"\bFSETP\.NEU\.\w+ P\d, PT, (R\d+)(?:\.reuse)?, 1,")
_PRODUCT_IN_PLACE = re.compile(r"\bFMUL (R\d+), \1(?:\.reuse)?, (R\d+)")
# Matrix products, waits until one or none of them is under way, and exponentials.
_PRODUCT_EVENTS = {
    "M": re.compile(r"\bHGMMA\b"),
    "1": re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x1$"),
    "0": re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0$"),
    "E": re.compile(r"\bMUFU\.EX2\b"),
}
# Meetings of warps, waits for matrix products, fences, and arrivals (those that announce no bytes).
_ARRIVAL_EVENTS = {
    "B": re.compile(r"\bBAR\.SYNC\b"),
    "W": re.compile(r"\bWARPGROUP\.DEPBAR\b"),
    "F": re.compile(r"\bFENCE\.VIEW\.ASYNC\b"),
    "A": re.compile(r"\bSYNCS\.ARRIVE\.TRANS64\.A[1R]T0\b"),
}

# Reading and writing of tensor memory, and arrivals.
_TENSOR_MEMORY_EVENTS = {
    "R": re.compile(r"\bLDTM\b"),
    "W": re.compile(r"\bSTTM\b"),
    "A": _ARRIVAL_EVENTS["A"],
}


@dataclass(frozen=True)
class MachineCode:
    """One kernel's instructions in order, and its natural loops as instruction indices."""

    instructions: tuple[str, ...]
    loops: tuple[tuple[int, ...], ...]

    def count(self, opcode: str) -> int:
        """Instructions with that opcode, whatever its modifiers; `*` stands for any letters."""
        return len(self._matching(opcode))

    def loops_with(self, opcode: str, among: Iterable[Sequence[int]] | None = None) -> int:
        """Loops, all or some, that contain an instruction with that opcode."""
        matching = self._matching(opcode)
        return sum(not matching.isdisjoint(loop) for loop in (self.loops if among is None else among))

    def innermost_with(self, opcode: str) -> tuple[tuple[int, ...], ...]:
        """Loops that contain an instruction with that opcode, and no smaller loop that does."""
        matching = self._matching(opcode)
        loops = [frozenset(loop) for loop in self.loops if not matching.isdisjoint(loop)]
        return tuple(tuple(sorted(loop)) for loop in loops if not any(other < loop for other in loops))

    def around(self, loop: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The smallest loop around another one, without what lies in the loops within it; empty where there is none."""
        inside = frozenset(loop)
        outer = min((frozenset(other) for other in self.loops if inside < frozenset(other)), key=len, default=None)
        if outer is None:
            return ()
        within = frozenset().union(*(other for other in self.loops if frozenset(other) < outer))
        return (tuple(sorted(outer - within)),)

    def hides_softmax(self, loop: tuple[int, ...]) -> bool:
        """Whether a loop computes its exponentials under a matrix product on Hopper.

        It starts two products, waits until one of them is under way still, computes all exponentials, and only then
        waits for the other; before or after that, there may be products alone. The order of addresses is that of
        execution but for the retries of waits, which hold none of these.
        """
        return bool(re.fullmatch("(M+0)?M+1E+0(M+0)?", self._events(loop, _PRODUCT_EVENTS)))

    def tests_all_factors(self, loop: tuple[int, ...]) -> bool:
        """Whether a loop compares with 1 all registers by which it multiplies others in place.

        So where it skips these products because all factors are 1, it has looked at each of them.
        """
        instructions = [self.instructions[index] for index in loop]
        tested = {found[1] for text in instructions if (found := _TEST.search(text))}
        factors = {found[2] for text in instructions if (found := _PRODUCT_IN_PLACE.search(text))}
        return factors != set() and factors <= tested

    def arrives_as_one(self, loop: tuple[int, ...]) -> bool:
        """Whether every arrival of one thread at a shared-memory barrier follows a meeting of its warps.

        So the thread speaks for the others, which may still have been reading, or before their fence after writing.
        """
        return not re.search("(^|[^B])A", self._events(loop, _ARRIVAL_EVENTS))

    def feeds_tensor_cores(self, loop: tuple[int, ...]) -> bool:
        """Whether a loop on Blackwell reads all scores before it writes weights over them, and then perhaps reads and
        writes the output, before it says that the weights are there."""
        return bool(re.fullmatch("R+W+(R+W+)?A", self._events(loop, _TENSOR_MEMORY_EVENTS)))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self._spills(range(len(self.instructions)))

    @property
    def spills_in_loops(self) -> int:
        """Those of them that some loop repeats."""
        return self.spills_within(self.loops)

    def spills_within(self, loops: Iterable[Sequence[int]]) -> int:
        """Loads and stores of local memory in some loops."""
        return self._spills({index for loop in loops for index in loop})

    def _events(self, loop: Sequence[int], letters: dict[str, re.Pattern[str]]) -> str:
        """Instructions of interest in a loop in order, as one letter each."""
        return "".join(
            letter for index in loop for letter, pattern in letters.items() if pattern.search(self.instructions[index])
        )

    def _spills(self, indices: Iterable[int]) -> int:
        return sum(bool(_SPILL.search(self.instructions[index])) for index in indices)

    def _matching(self, opcode: str) -> set[int]:
        pattern = re.compile(rf"\b{opcode.replace('*', '[A-Z]*')}\b")
        return {index for index, instruction in enumerate(self.instructions) if pattern.search(instruction)}


def parse(listing: str) -> MachineCode:
    """Reads what `nvdisasm -c` prints for a kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction["text"])
    return MachineCode(tuple(instructions), _find_loops(instructions, labels))


def _find_loops(instructions: Sequence[str], labels: dict[str, int]) -> tuple[tuple[int, ...], ...]:
    """Natural loops: for each back edge (to a block that dominates its source), the blocks that reach its source.

    Those that begin at the same block are one loop, which has several ways back.
    """
    jumping = (_BRANCH, _TABLE, _END)
    jumps = [index for index, text in enumerate(instructions) if any(jump.search(text) for jump in jumping)]
    starts = sorted({0, *labels.values(), *(index + 1 for index in jumps)} - {len(instructions)})
    stops = [*starts[1:], len(instructions)]
    block_at = {start: block for block, start in enumerate(starts)}
    successors = [
        _successors(block, instructions[stop - 1], labels, block_at, len(starts)) for block, stop in enumerate(stops)
    ]
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(block)

    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for block, targets in enumerate(successors):
        for target in targets:
            if target in dominators[block]:
                bodies.setdefault(target, set()).update(_reaching(block, target, predecessors))
    return tuple(
        tuple(index for member in sorted(body) for index in range(starts[member], stops[member]))
        for body in bodies.values()
    )


def _successors(block: int, last: str, labels: dict[str, int], block_at: dict[int, int], blocks: int) -> list[int]:
    """Blocks that may follow a block that ends with the instruction `last`."""
    if table := _TABLE.search(last):
        return [block_at[labels[target]] for target in table["targets"].split(",") if labels[target] in block_at]
    branch = _BRANCH.search(last)
    falls_through = bool(_PREDICATED.match(last)) if branch or _END.search(last) else True
    targets = [block + 1] if falls_through and block + 1 < blocks else []
    if branch and labels[branch["target"]] in block_at:
        targets.append(block_at[labels[branch["target"]]])
    return targets


def _dominators(predecessors: list[list[int]]) -> list[set[int]]:
    """For each block, the blocks on every path to it from the entry; itself alone where nothing leads there."""
    everything = set(range(len(predecessors)))
    dominators = [{0}] + [set(everything) for _ in predecessors[1:]]
    changed = True
    while changed:
        changed = False
        for block, sources in enumerate(predecessors[1:], start=1):
            common = set.intersection(*(dominators[source] for source in sources)) if sources else set()
            if common | {block} != dominators[block]:
                dominators[block] = common | {block}
                changed = True
    return dominators


def _reaching(source: int, header: int, predecessors: list[list[int]]) -> set[int]:
    """Blocks from which `source` is reached without passing `header`, both included."""
    body, pending = {header}, [source]
    while pending:
        block = pending.pop()
        if block not in body:
            body.add(block)
            pending += predecessors[block]
    return body
