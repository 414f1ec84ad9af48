"""Compile Triton kernels for GPUs without having them, and report their resources.

    python -m tests.support.triton_compile sm_90 tests.support.specialisations.copies [some]

prints one line of JSON per specialisation of the module (see `tests.support.specialisations`):
registers per thread, bytes spilled per thread, bytes of shared memory per program, accesses to
memory. With `some`, one of each kernel is enough for each 8-bit format, and one for each last word
of the names (attention: decode, prefill, ..). Runs as a process of its
own, because kernels that were decorated for the interpreter cannot be compiled. Compiling needs no
GPU, and Triton's wheel has the tools that read the result.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Most bytes of shared memory per program, from the vendors' tables.
SHARED_BYTES_MAX = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}


class Needs(NamedTuple):
    """Resources of one program of a compiled kernel."""

    name: str
    registers: int
    max_registers: int
    spilled_bytes: int
    shared_bytes: int
    accesses: list[str]
    """PTX's accesses to global memory, and its barriers, in order; none for AMD."""


def compile_elsewhere(architecture: str, module: str, *, some: bool = False) -> list[Needs]:
    """Return the resources of a module's specialisations, compiled in a new process."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = [
        sys.executable,
        "-m",
        "tests.support.triton_compile",
        architecture,
        module,
        *["some"][: int(some)],
    ]
    # Where the caller imports kvpager from, the new process does too.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(script)} failed:\n{ran.stderr}")
    return [Needs(**json.loads(line)) for line in ran.stdout.splitlines()]


def needs(architecture: str, module: str, *, some: bool) -> Iterator[Needs]:
    done: set[tuple[str, ...]] = set()
    listed = importlib.import_module(module).specialisations
    # Where tiles depend on the GPU, the list does too.
    depends = inspect.signature(listed).parameters
    for each in listed(capability(architecture)) if depends else listed():
        kernel = each.function.__name__
        narrow = [
            type_ for type_ in each.signature.values() if re.fullmatch(r"\*[iuf]p?8.*", type_)
        ]
        kinds = {(kernel, *sorted(set(narrow))), (kernel, "", each.name.rsplit("_", 1)[-1])}
        if not some or kinds - done:
            done |= kinds
            yield compiled(each, architecture)


def capability(architecture: str) -> int:
    """Return the target that `config.target_of` returns for a GPU of that architecture."""
    from kvpager.kernels.gpu import config

    if architecture.startswith("sm_"):
        return int(architecture.removeprefix("sm_"))
    return config.AMD


def compiled(specialisation: Any, architecture: str) -> Needs:
    import triton
    from triton.compiler import ASTSource

    from kvpager.kernels.gpu import config

    names = specialisation.function.arg_names
    constants = dict(specialisation.constexprs)
    types = {name: specialisation.signature.get(name, "constexpr") for name in names}
    missing = [name for name, type_ in types.items() if type_ == "constexpr"]
    if set(missing) != set(constants) or set(specialisation.signature) - set(names):
        raise ValueError(f"{specialisation.name}: arguments {missing}, constants {[*constants]}")
    source = ASTSource(
        fn=specialisation.function,
        signature=types,
        constexprs=constants,
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name in specialisation.divisible
        },
    )
    options = {**specialisation.options, **config.COMPILER_OPTIONS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as in the GPU tests, which compile when they launch
        warnings.filterwarnings("ignore", "AnnAssign.__init__ missing", DeprecationWarning)
        kernel = triton.compile(source, target=target(architecture), options=options)
    registers, spilled = (nvidia if architecture.startswith("sm_") else amd)(kernel)
    return Needs(
        specialisation.name,
        registers,
        specialisation.max_registers,
        spilled,
        kernel.metadata.shared,
        re.findall(
            r"\b(?:(?:ld|st|atom|red)\.(?:\w+\.)*?global|bar\.sync)[\w.:]*",
            kernel.asm.get("ptx", ""),
        ),
    )


def target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def nvidia(kernel: Any) -> tuple[int, int]:
    """Return registers and spilled bytes from the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", binary.name], capture_output=True, text=True, check=True
        ).stdout
    # Only spilled registers are on the stack of a kernel that calls nothing.
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no registers:\n{usage}")
    return int(found[1]), int(found[2])


def amd(kernel: Any) -> tuple[int, int]:
    """Return vector registers and spilled bytes from the assembly's metadata."""
    text = kernel.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spilled = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
    if registers is None or spilled is None:
        raise ValueError("the assembly has no register counts")
    return int(registers[1]), int(spilled[1])


if __name__ == "__main__":
    for each in needs(sys.argv[1], sys.argv[2], some=sys.argv[3:] == ["some"]):
        print(json.dumps(each._asdict()), flush=True)
