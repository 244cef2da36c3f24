"""What measurements need to know of the processor, and how they run with fewer of its instructions."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

# The values of VARIABLES that limit the compiler, torch, oneDNN and MKL to an instruction set.
LIMITS = {
    "AVX-512": ("x86-64-v4", "avx512", "AVX512_CORE", "AVX512"),
    "AVX2": ("x86-64-v3", "avx2", "AVX2", "AVX2"),
    "SSE": ("x86-64", "default", "SSE41", "SSE4_2"),
}
VARIABLES = ("CXXFLAGS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def instruction_sets() -> list[str]:
    """Return the instruction sets of the processor, the widest first; only "native" if it is not x86."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["native"]
    capability = torch.backends.cpu.get_cpu_capability()
    return list(LIMITS)[{"AVX512": 0, "AVX2": 1}.get(capability, 2) :]


def run_in_process(script: str, *arguments: object, instructions: str = "native") -> dict[str, object]:
    """Run a script in a process with one instruction set, and return the figures that it prints as JSON."""
    limits: dict[str, str] = {}
    if instructions in LIMITS:
        march, *others = LIMITS[instructions]
        limits = dict(zip(VARIABLES, (f"-march={march}", *others), strict=True))
    module = f"benchmarks.{Path(script).stem}"
    # kb-train sets the first variable too.
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ, **limits}
    call = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, object] = json.loads(result.stdout)
    return figures


def processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
