"""The product of four warps together (``wgmma``), as C++: how many columns it has is part of its name."""

from __future__ import annotations

from .cuda_layout import Format

WGMMA = {
    "bf16": (16, "float", ", 1, 1, 0"),
    "f16": (16, "float", ", 1, 1, 0"),
    "s8": (32, "int", ""),
    "e4m3": (32, "float", ", 1, 1"),
}
"""Operands -> values of k, the type of the sums, what follows: signs, and no transposition of 16 bits."""


def warpgroup_product(form: Format, tokens: int, half: bool, whole: bool = False) -> str:
    """The C++ function for ``wgmma`` with ``tokens`` columns. Its left operand lies in registers; ``whole``:
    as the right one does, in shared memory."""
    eight = "e4m3" if form.float8 else "s8"
    operand = eight if form.x_bits == 8 else "f16" if half else "bf16"
    depth, c, tail = WGMMA[operand]
    count = tokens // 2
    values = ['"l"(a)'] if whole else [f'"r"(a[{i}])' for i in range(4)]
    last = count + len(values)
    sums = ",".join(f"%{i}" for i in range(count))
    left = f"%{count}" if whole else "{" + ",".join(f"%{i}" for i in range(count, last)) + "}"
    kind = f"{'f32' if c == 'float' else 's32'}.{operand}.{operand}"
    letter = "f" if c == "float" else "r"
    outputs = ", ".join(f'"+{letter}"(d[{i // 4}][{i % 4}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void product64({c} (&d)[{tokens // 8}][4],"
        f" {'unsigned long long a' if whole else 'const unsigned (&a)[4]'},"
        " unsigned long long b, int keep) {\n"
        f'  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{last + 1}, 0;'
        f" wgmma.mma_async.sync.aligned.m64n{tokens}k{depth}.{kind}"
        f' {{{sums}}}, {left}, %{last}, p{tail}; }}"\n'
        f'  : {outputs} : {", ".join(values)}, "l"(b), "r"(keep));\n}}\n'
    )
