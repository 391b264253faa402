"""Compile a Triton kernel for a GPU that is not there, and read what came out.

Triton's compiler needs no GPU: it gives PTX and machine code (SASS) for any compute capability. So a
kernel's registers, spills, shared memory, load widths and tensor-core instructions can be held by a
test on any machine. Works only where Triton's interpreter is off (it replaces the compiler).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 89, 90, 100)
_LEAST_INSTRUCTIONS = 40
_MODULES = (
    "rows",
    "hadamard",
    "linear",
    "int4_expand",
    "kv4_append",
    "kv4_decode",
    "kv4_prefill",
    "kv4_expand",
)


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration that ships.

    Attributes:
        name: of the configuration, e.g. `int4_decode[fp8, BM16]`.
        kernel: the `@triton.jit` function.
        signature: argument -> Triton type (`*bf16`, `*fp8e4nv`, `i32`, `fp32`); those that are in
            `constexprs` are left out.
        constexprs: argument -> value.
        num_warps, num_stages: as launched.
        divisible: the arguments (pointers, strides, sizes) that are multiples of 16, or all
            pointers where None.
        capabilities: the ones it ships for.
        tensor_core: capability -> regular expression that some SASS instruction must match
            (`{90: "QGMMA"}`); a capability without an entry is not held to any.
        wide_loads: whether global loads 16 bytes wide must be there.
        shared: the least shared memory in bytes that pipelining as deep as `num_stages` needs.
        tile: what a round of the longest loop handles (without a loop: a program): `elements`, the
            `bytes` of memory that these are, `operations` of the tensor cores.
        shortest_loop: of several innermost loops the shortest is what most tiles take (the others have
            comparisons for the last ones); else the longest.
        options: further compiler options, e.g. `{"maxnreg": 128}`.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] | None = None
    capabilities: tuple[int, ...] = CAPABILITIES
    tensor_core: Mapping[int, str] = field(default_factory=dict)
    wide_loads: bool = True
    shared: int = 0
    tile: Mapping[str, float] = field(default_factory=dict)
    shortest_loop: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a `Build`.

    Attributes:
        registers: per thread.
        spills: bytes spilled to local memory per thread (stores and loads).
        shared: bytes of shared memory per program.
        instructions: SASS opcode (with its modifiers) -> how often it stands in the code.
        loop: the same for the innermost loop that does the work: what one tile costs.
        ttgir, ptx: Triton's last intermediate form and the PTX.
    """

    build: Build
    capability: int
    registers: int
    spills: int
    shared: int
    instructions: Counter[str]
    loop: Counter[str]
    ttgir: str
    ptx: str

    def count(self, pattern: str, *, in_loop: bool = False) -> int:
        """How many instructions match the regular expression at their start."""
        counted = self.loop if in_loop else self.instructions
        return sum(n for opcode, n in counted.items() if re.match(pattern, opcode))

    def problems(self) -> list[str]:
        """What the build expects and did not get; empty when all is well."""
        found = []
        if sum(self.instructions.values()) < _LEAST_INSTRUCTIONS:
            # Some versions of Triton compile what they cannot to a trap, and say nothing.
            found.append(f"only {sum(self.instructions.values())} instructions")
        if self.spills:
            found.append(f"{self.spills} bytes spilled")
        wanted = self.build.tensor_core.get(self.capability)
        if wanted and not self.count(wanted):
            found.append(f"no {wanted} instruction")
        if self.build.wide_loads and not self.count(r"(LDG|LDGSTS)\S*\.128|UBLKCP|UTMALDG"):
            found.append("no 16-byte global load")
        if self.shared < self.build.shared:
            found.append(f"{self.shared} bytes of shared memory, {self.build.shared} are meant")
        return found


def shipped() -> Iterator[Build]:
    """Every kernel in the configurations that the heuristics choose."""
    for name in _MODULES:
        yield from import_module(f"{__package__}.{name}").builds()


def compile_build(build: Build, capability: int) -> Compiled:
    """Compile for one compute capability (80, 89, 90, 100).

    Raises:
        RuntimeError: Triton's interpreter is on, or a disassembler is missing.
        Exception: whatever Triton's compiler raises for a kernel it cannot compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(build.kernel, "cache_key"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    names = build.kernel.arg_names
    constexprs = {(names.index(name),): value for name, value in build.constexprs.items()}
    signature = {n: "constexpr" if n in build.constexprs else build.signature[n] for n in names}
    divisible = build.divisible
    if divisible is None:
        divisible = tuple(name for name, kind in build.signature.items() if kind.startswith("*"))
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(build.kernel, signature, constexprs, attrs)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **build.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, sass = _disassemble(compiled.asm["cubin"])
    instructions = _instructions(sass)
    return Compiled(
        build,
        capability,
        registers=_number(r"REG:(\d+)", usage),
        # LOCAL counts declared local memory, STACK what was spilled there.
        spills=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        shared=compiled.metadata.shared,
        instructions=Counter(opcode for _, opcode, _ in instructions),
        loop=_loop(instructions, build.shortest_loop),
        ttgir=compiled.asm["ttgir"],
        ptx=compiled.asm["ptx"],
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) of a cubin, by the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        outputs = []
        for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")):
            program = tools / tool
            if not program.is_file():
                raise RuntimeError(f"{program}: not there; this Triton has no disassembler")
            command = [str(program), *flags, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            outputs.append(done.stdout + done.stderr)
    return outputs[0], outputs[1]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


# `        /*0120*/                   @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;`
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L\w+):", re.MULTILINE)


def _instructions(sass: str) -> list[tuple[int, str, str]]:
    """(position, opcode, operands); a branch's operand is the position it leads to."""
    labels: dict[str, int] = {}
    found: list[tuple[int, str, str]] = []
    for line in sass.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = len(found)
            continue
        match = _INSTRUCTION.search(line)
        if match:
            found.append((len(found), match.group(2), match.group(3)))
    resolved = []
    for position, opcode, operands in found:
        target = re.search(r"\.L\w+", operands) if opcode.startswith("BRA") else None
        resolved.append((position, opcode, str(labels[target.group()]) if target else operands))
    return resolved


def _loop(instructions: list[tuple[int, str, str]], shortest: bool) -> Counter[str]:
    """The opcodes of the longest, or shortest worth the name, of the loops that hold no other loop."""
    loops = [
        (int(operands), position)
        for position, opcode, operands in instructions
        if opcode.startswith("BRA") and operands.isdigit() and int(operands) < position
    ]
    inner = [
        (start, end) for start, end in loops
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in loops)
    ]  # fmt: skip
    if not inner:
        return Counter()
    if shortest:
        inner = [loop for loop in inner if loop[1] - loop[0] > _LEAST_INSTRUCTIONS] or inner
    start, end = (min if shortest else max)(inner, key=lambda loop: loop[1] - loop[0])
    return Counter(opcode for _, opcode, _ in instructions[start : end + 1])
