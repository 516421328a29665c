"""Proofs about the Triton kernels that need no GPU: compile them ahead of time and read the machine code.

    python tools/bench/kernel_report.py            # all targets
    python tools/bench/kernel_report.py --targets sm_90 --V 50257

The launches are recorded, not described a second time: the losses run on CPU tensors of the real shape
class (bfloat16, given V) with every kernel replaced by a recorder, so argument types, alignment, block sizes
and warps are those of a real call. Each launch is compiled for each target. The report fails (exit code 1) on

- register spills or local memory on sm_90 and gfx942,
- blocks of logits (or of VID's residuals) moved by less than 16 bytes per thread and instruction; the single
  logit of a row's label is not a block; given logits whose rows aren't multiples of 16 bytes can't do better,
- shared memory above the target's limit,
- more than 8 bytes moved per bfloat16 logit, forward and backward, cross entropy and max-pooled term
  together, in the logits entry, and more than 6 per element of VID. Counted in the compiler's own IR: the
  kernels' loops visit each logit once, so every load or store of a block of logits in it is one movement.

The last table is a prediction from that count and the vendors' bandwidths, not a measurement.
"""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from kernel_launches import Launch, constants_of, key_of, record, record_attention

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
BANDWIDTH = {"A100 80GB": 2.04e12, "H100 SXM": 3.35e12, "B200": 8.0e12}
"""Bytes per second, vendors' data sheets."""
LIMITS = {"logits, CE + paper, max": 8, "VID, D_t = 1024": 6}
"""Bytes per bfloat16 element."""


def compile_launch(launch: Launch, target: str):
    """Compile one launch for one target, with what the launch guarantees about its arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
        torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
    }  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        aligned = False
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = kinds[value.dtype]
            aligned = value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(i,)] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch.options)


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def machine_code(compiled: list, target: str) -> list[dict[str, Any]]:
    """Registers, spills, shared memory and instructions by name, of each kernel compiled for the target."""
    if not target.startswith("gfx"):
        return [
            {"registers": registers, "spills": local, "shared": kernel.metadata.shared, "mix": mix}
            for kernel, (registers, local, mix) in zip(
                compiled, disassembled([kernel.asm["cubin"] for kernel in compiled], target), strict=True
            )
        ]
    out = []
    for kernel in compiled:
        text = kernel.asm["amdgcn"]
        number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # noqa: B023, E731
        out.append(
            {
                "registers": number("vgpr_count"),
                "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
                "scalar_spills": number("sgpr_spill_count"),
                "shared": kernel.metadata.shared,
                "mix": Counter(re.findall(r"^\s+([a-z]\w+_\w+)", text, re.M)),
            }
        )
    return out


_KNOWN: dict[bytes, tuple[int, int, Counter]] = {}


def disassembled(cubins: list[bytes], target: str) -> list[tuple[int, int, Counter]]:
    """Registers, bytes of local memory, instructions by name, of each cubin for an NVIDIA target.

    The disassembler takes 0.5 s to start, so it is started once, for the code of all that are new.
    """
    from triton.backends.nvidia.compiler import sm_arch_from_capability

    new = [cubin for cubin in dict.fromkeys(cubins) if cubin not in _KNOWN]
    codes = [instructions(cubin) for cubin in new]
    ends, mixes = list(itertools.accumulate(map(len, codes))), [Counter() for _ in new]
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(b"".join(codes))
        arch = sm_arch_from_capability(TARGETS[target][1]).replace("sm_", "SM")
        said = said_by("nvdisasm", "-ndf", "-b", arch, file.name) if new else ""
        pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]+)"
        for place, name in re.findall(pattern, said):
            mixes[bisect.bisect(ends, int(place, 16))][name] += 1
        for cubin, mix in zip(new, mixes, strict=True):
            Path(file.name).write_bytes(cubin)
            said = said_by("cuobjdump", "-res-usage", file.name)
            found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
            if found is None or not mix:
                raise RuntimeError(f"no registers or no instructions; cuobjdump -res-usage said: {said}")
            registers, stack, _, local = map(int, found.groups())
            _KNOWN[cubin] = registers, stack + local, mix
    return [_KNOWN[cubin] for cubin in cubins]


def said_by(name: str, *arguments: str) -> str:
    """The output of one of the programs that come with Triton."""
    run = subprocess.run([tool(name), *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} said: {run.stdout}{run.stderr}")
    return run.stdout + run.stderr


def instructions(elf: bytes) -> bytes:
    """The sections of a 64-bit ELF file that can be executed, one after the other."""
    (table,), (size, number) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<2H", elf, 58)
    out = b""
    for i in range(number):
        flags, _, start, length = struct.unpack_from("<4Q", elf, table + i * size + 8)
        out += elf[start : start + length] if flags & 4 else b""
    return out


def moves(compiled, dtype: torch.dtype) -> tuple[int, int, int]:
    """Reads and writes of blocks of logits, and reads of a single logit, before any optimisation."""
    element = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
    lines = compiled.asm["ttir"].splitlines()
    block = rf"tensor<\d+x!tt.ptr<{element}>"
    reads = sum("tt.load" in line and re.search(block, line) is not None for line in lines)
    writes = sum("tt.store" in line and re.search(block, line) is not None for line in lines)
    single = sum("tt.load" in line and f": !tt.ptr<{element}>" in line for line in lines)
    return reads, writes, single


def wide(mix: Counter, target: str, reads: int, writes: int, single: int) -> str | None:
    """What is wrong with the widths of the global accesses, or None. 16-bit accesses are logits cut small."""
    if target.startswith("gfx"):
        load, store, full = r"(global|buffer|flat)_load_", r"(global|buffer|flat)_store_", "dwordx4"
        small = r"_(short|ushort|byte|ubyte|sbyte)"
    else:
        load, store, full, small = "LDG", "STG", ".128", r"\.[US](8|16)\b"
    loads = sum(n for name, n in mix.items() if re.match(load, name) and full in name)
    stores = sum(n for name, n in mix.items() if re.match(store, name) and full in name)
    narrow = {
        name: n for name, n in mix.items() if re.match(f"{load}|{store}", name) and re.search(small, name)
    }
    if sum(narrow.values()) > single or loads < reads or stores < writes:
        return f"{loads} loads and {stores} stores of 16 bytes for {reads} and {writes}, narrow: {narrow}"
    return None


def occupancy(registers: int, warps: int) -> float:
    """Share of an SM's 64 warps that the registers allow (NVIDIA: handed out 8 per thread at a time)."""
    per_warp = -(-registers // 8) * 8 * 32
    return min(64, 65536 // per_warp // warps * warps) / 64


def main(targets: str | tuple[str, ...] = tuple(TARGETS), V: int = 32128, dtype: str = "bfloat16") -> None:
    """Compile, check and print. See the top of this file."""
    targets = (targets,) if isinstance(targets, str) else targets
    kind = getattr(torch, dtype)
    failures, per_logit = [], {}
    print(f"{'kernel':20} {'constants':34} {'target':7} regs spill shared occup.  instructions")
    for target in targets:
        cases = record(V, kind, lanes=TARGETS[target][2])
        each: dict[tuple, tuple[str, Launch]] = {}
        for case, launches in cases.items():
            for launch in launches:
                each.setdefault(key_of(launch), (case, launch))
        moved = dict(zip(each, inspect(list(each.values()), target, V, kind, failures), strict=True))
        for case, launches in cases.items():
            per_logit[case] = sum(moved[key] for key in {key_of(x) for x in launches}) * kind.itemsize
        if kind.itemsize == 2:
            failures += inspect_attention(target, kind)
    print("\nbytes moved per logit or residual, forward + backward; besides, [B, V] arrays: 36 bytes per")
    print("sequence and entry, and VID's partial sums")
    for case, moved in per_logit.items():
        print(f"  {case:38} {moved}")
    for case, limit in LIMITS.items() if dtype == "bfloat16" else ():
        if per_logit[case] > limit:
            failures.append(f"{case}: more than {limit} bytes per element")
    predict(V, per_logit["logits, CE + paper, max"])
    print("\n" + ("FAILED:\n  " + "\n  ".join(failures) if failures else "all checks passed"))
    if failures:
        sys.exit(1)


def inspect(
    launches: list[tuple[str, Launch]], target: str, V: int, kind: torch.dtype, failures: list[str]
) -> list[int]:
    """Compile, check and print launches, each with its case; how often each moves a block of logits."""
    compiled, moved = [compile_launch(launch, target) for _, launch in launches], []
    codes = machine_code(compiled, target)
    for (case, launch), kernel, code in zip(launches, compiled, codes, strict=True):
        name, constants = launch.kernel.__name__, constants_of(launch)
        reads, writes, single = moves(kernel, kind)
        aligned = not case.startswith("logits") or V * kind.itemsize % 16 == 0
        problem = wide(code["mix"], target, reads, writes, single) if aligned else None
        failures += check(f"{name} {constants} on {target}", target, code, problem)
        print(line(name, constants, target, code, launch.options["num_warps"]))
        moved.append(reads + writes)
    return moved


def inspect_attention(target: str, kind: torch.dtype, widths: tuple[int, ...] = (64, 128)) -> list[str]:
    """Compile and print the kernels of attention, which read no blocks of logits; their failures."""
    from ibdistill.ops import launch

    failures = []
    with mock.patch.object(launch, "LANES", TARGETS[target][2]):
        launches = [x for D in widths for x in record_attention(kind, D=D)]
    codes = machine_code([compile_launch(each, target) for each in launches], target)
    for each, code in zip(launches, codes, strict=True):
        name, constants = each.kernel.__name__, constants_of(each)
        code["spills"] -= code.get("scalar_spills", 0)  # these go to registers of vectors, not to memory
        failures += check(f"{name} {constants} on {target}", target, code, None)
        print(line(name, constants, target, code, each.options["num_warps"]))
    return failures


def predict(V: int, moved: int) -> None:
    """Time of the logits entry at the bandwidth limit, B = 64, 16 + 128 tokens."""
    B, tokens = 64, 16 + 128
    total = B * tokens * V * moved + 2 * B * V * 36
    print(f"\nPREDICTION (not measured), logits entry, B = {B}, 16 + 128 tokens, V = {V}:")
    print(f"  {total / 1e9:.2f} GB moved")
    for device, bandwidth in BANDWIDTH.items():
        print(f"  {device:10} {total / bandwidth * 1e3:6.2f} ms at {bandwidth / 1e12:.2f} TB/s")


def check(where: str, target: str, code: dict, problem: str | None) -> list[str]:
    """The failures of one compiled kernel."""
    out = [f"{where}: {problem}"] if problem else []
    if target in ("sm_90", "gfx942") and code["spills"]:
        out.append(f"{where}: {code['spills']} bytes of local memory")
    if code["shared"] > SHARED_LIMIT[target]:
        out.append(f"{where}: {code['shared']} bytes of shared memory, {SHARED_LIMIT[target]} exist")
    return out


def line(name: str, constants: dict, target: str, code: dict, warps: int) -> str:
    shown = " ".join(f"{k[:5].lower()}={v}" for k, v in constants.items())
    busy = "-" if target.startswith("gfx") else f"{occupancy(code['registers'], warps):.0%}"
    mix = ", ".join(f"{n} {k}" for k, n in code["mix"].most_common(5))
    numbers = f"{code['registers']:4} {code['spills']:5} {code['shared']:6} {busy:>6}"
    return f"{name:20} {shown:34} {target:7} {numbers}  {mix}"


if __name__ == "__main__":
    import fire

    fire.Fire(main)
