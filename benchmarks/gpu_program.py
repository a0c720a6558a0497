"""What XLA makes of the paper's configs for an NVIDIA H100, without one: nothing is run.

    pip install "jax[cuda12]==VERSION OF JAX"
    python -m benchmarks.gpu_program [--configs=pascal,cityscapes,isbi_em]
        [--dtypes=float32,bfloat16] [--devices=1,8] [--programs=joint,…] [--out=FILE]

Compiles the train steps of all phases, projection's search and evaluation, each at its config's
sizes, for the card of benchmarks/h100.textproto, and counts what they consist of: memory,
convolutions by cuDNN's kind and their windows, matmuls, collectives, bytes read and written. XLA
chooses kernels by running them, which it cannot here: read the structure, not speed.

Half a minute to a minute a program and core. Another checkout's programs: copy gpu_program.py,
full_size.py and h100.textproto into its benchmarks/ and run it there.
"""

import argparse
import collections
import dataclasses
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

import jax
from jax.experimental import topologies

from benchmarks import machine
from benchmarks.full_size import Case, Program, peak
from protoseg_jax.devices import DevicePool
from protoseg_jax.errors import reason
from protoseg_jax.evaluation import overlap, segmentation
from protoseg_jax.program import exit_with

PHASES = ("warmup", "joint", "finetune")
PROGRAMS = (*PHASES, "search", "evaluation", "overlap")
# Its own (Triton) matmuls need tuning, and Pascal's do not compile without it.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
LARGE = 7  # no forward convolution has a larger window
KINDS = {
    "__cudnn$convForward": "forward",
    "__cudnn$convBiasActivationForward": "fused forward",
    "__cudnn$convForwardGraph": "fused forward",
    "__cudnn$convBackwardInput": "backward input",
    "__cudnn$convBackwardFilter": "backward filter",
    "convolution": "not cuDNN's",
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# They move nothing by themselves.
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "conditional")
FREE += ("call", "partition-id", "replica-id", "after-all", "opt-barrier")

_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*?)\)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{")
_CALLED = re.compile(
    r"(?:calls|body|to_apply|\w+_computation)=(%[^,\s]+)|branch_computations=\{([^}]*)\}"
)


# -- a compiled program's text ---------------------------------------------------------------------


def size(shape: str) -> int:
    """Bytes of an array or a tuple, as HLO writes its shape: `(bf16[10,65]{1,0}, pred[])`."""
    total = 0
    for element, dimensions in re.findall(r"([a-z]+[0-9]*)[a-z0-9]*\[([0-9,]*)\]", shape):
        bits = int(re.sub("[a-z]", "", element) or 8)  # pred
        for n in filter(None, dimensions.split(",")):
            bits *= int(n)
        total += 0 if element == "token" else -(-bits // 8)
    return total


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = shape opcode(inside), attributes`."""

    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str
    root: bool

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of what it works on."""
        return re.findall(r"%([^\s,]+)", self.inside)

    @functools.cached_property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return [
            name
            for one, several in _CALLED.findall(self.attributes)
            for name in re.findall(r"%([^\s,]+)", one + several)
        ]

    @property
    def target(self) -> str:
        """A custom call's target, else the opcode."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else self.opcode

    @property
    def rounds(self) -> int:
        """How often a loop goes round, where that is known; else 1."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found[1]) if found else 1


class Hlo:
    """An optimised HLO module: what its computations consist of, each by its name, and the first's
    name, `entry`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.fullmatch(line):
                current = self.computations.setdefault(found[2], {})
                if found[1]:
                    self.entry = found[2]
            elif found := _INSTRUCTION.fullmatch(line):
                root, *fields = found.groups()
                current[fields[0]] = Instruction(*fields, root=bool(root))

    def __iter__(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def traffic(self, computation: str) -> int:
        """Bytes that a computation's kernels read and write: what goes in and out of each.

        A loop counts as often as it is known to go round, else once; of branches every one.
        """
        own, total = self.computations[computation], 0
        for i in own.values():
            if i.opcode in ("while", "conditional", "call"):
                total += i.rounds * sum(map(self.traffic, i.called))
            elif i.opcode not in FREE and not i.opcode.endswith("-done"):
                total += self._moved(i, [size(own[name].shape) for name in i.operands])
        return total

    def _moved(self, kernel: Instruction, sizes: list[int]) -> int:
        """Bytes in and out of a kernel whose operands have these sizes."""
        body, names = [kernel], kernel.operands
        if kernel.opcode == "fusion":
            body = list(self.computations[kernel.called[0]].values())
            parameters = [i for i in body if i.opcode == "parameter"]
            names = [i.name for i in sorted(parameters, key=lambda i: int(i.inside))]
        total = 0
        for name, whole in zip(names, sizes, strict=True):
            users = [i for i in body if name in i.operands]
            total += min(whole, sum(_taken(i, name, whole) for i in users))
        root = next((i for i in body if i.root), kernel)
        if root.opcode == "dynamic-update-slice":  # in place
            shapes = {i.name: i.shape for i in body}
            update = root.operands[1]
            return total + (size(shapes[update]) if update in shapes else sizes[1])
        shape = kernel.shape
        if kernel.opcode == "custom-call":  # the last of a library's results is its workspace
            shape = re.sub(r", [su]8\[\d+\]\{0\}\)$", ")", shape)
        return total + size(shape)


def _taken(user: Instruction, name: str, whole: int) -> int:
    """Bytes that an instruction takes of an operand of a size."""
    if name == user.operands[0]:
        if user.opcode in ("slice", "dynamic-slice", "gather"):
            return size(user.shape)
        if user.opcode == "dynamic-update-slice":
            return 0
    return whole


# -- what a program consists of --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, order=True)
class Convolution:
    """Of a kind, with its window as HLO writes it: size, stride, dilation."""

    kind: str
    size: str
    stride: str
    dilation: str

    @property
    def large(self) -> bool:
        return max(map(int, self.size.split("x"))) > LARGE

    def __str__(self) -> str:
        parts = [self.size, self.stride and f"stride {self.stride}"]
        parts += [self.dilation and f"dilation {self.dilation}"]
        return ", ".join(filter(None, parts))


def convolutions(hlo: Hlo) -> collections.Counter[Convolution]:
    """How many there are of each."""

    def of(window: str, key: str) -> str:
        found = re.search(rf"\b{key}=([0-9x]+)", window)
        return found[1] if found else ""

    counts = collections.Counter()
    for i in hlo:
        if i.target in KINDS or i.target.startswith("__cudnn$conv"):
            window = re.search(r"window=\{([^}]*)\}", i.attributes)[1]
            kind = KINDS.get(i.target, i.target)
            counts[
                Convolution(kind, *(of(window, k) for k in ("size", "stride", "rhs_dilate")))
            ] += 1
    return counts


def matmuls(hlo: Hlo) -> tuple[int, int]:
    """How many there are: cuBLAS's, and those that XLA compiles itself."""
    cublas = sum(i.target.startswith("__cublas$") for i in hlo)
    return cublas, sum(i.opcode == "dot" for i in hlo)


def collectives(hlo: Hlo) -> str:
    """How many there are of each kind and the bytes of their results, in words."""
    counts, moved = collections.Counter(), collections.Counter()
    for i in hlo:
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            counts[kind] += 1
            moved[kind] += size(i.shape)
    return ", ".join(f"{counts[k]} {k} ({moved[k] / 1e6:,.1f} MB)" for k in counts)


# -- the page --------------------------------------------------------------------------------------


def make(case: Case, name: str, devices: int) -> Program | None:
    """A program by its name, its batch the nearest to the config's that the devices share evenly;
    None where the config leaves it out."""

    def shared(batch_size: int) -> int:
        return max(1, round(batch_size / devices)) * devices

    if name in PHASES:
        if not case.config.phases[name].steps:
            return None
        return case.train_program(name, case.training_batch(shared(case.config.batch_size)))
    batch = case.evaluation_batch(shared(case.config.eval_batch_size))
    if name == "search":
        return case.search_program(batch)
    measured = (segmentation, overlap) if name == "overlap" else (segmentation,)
    return case.evaluation_program(batch, measured)


def section(name: str, arguments: argparse.Namespace, pools: dict[int, DevicePool]) -> list[str]:
    """The tables of one config."""
    rows, windows = [], collections.defaultdict(list)
    for dtype in arguments.dtypes:
        case = Case(name, dtype, random=False)
        for devices, pool in pools.items():
            for which in arguments.programs:
                program = make(case, which, devices)
                if program is None:
                    continue
                compiled = program.compile(pool, program.shapes(pool), **OPTIONS)
                hlo = Hlo(compiled.as_text())
                if arguments.keep:
                    file = arguments.keep / f"{name}_{which}_{dtype}_{devices}.hlo"
                    file.write_text(compiled.as_text())
                memory, counts = compiled.memory_analysis(), convolutions(hlo)
                cublas, own = matmuls(hlo)
                rows.append(
                    f"| {which} | {dtype} | {devices} | {len(program.batch['image'])} "
                    f"| {memory.temp_size_in_bytes / 1e9:.2f} "
                    f"| {memory.argument_size_in_bytes / 1e9:.2f} | {peak(compiled) / 1e9:.2f} "
                    f"| {counts.total()} | {total(counts, lambda c: 'fused' in c.kind)} "
                    f"| {total(counts, lambda c: c.large)} | {cublas} + {own} "
                    f"| {hlo.traffic(hlo.entry) / 1e9:.1f} | {collectives(hlo)} |"
                )
                print(f"{name} {rows[-1]}", file=sys.stderr, flush=True)
                key = (which, tuple(sorted(counts.items())))
                windows[key].append(f"{dtype} × {devices}")
    lines = [
        f"## configs/{name}.py",
        "",
        "| program | dtype | devices | batch | temporaries, GB | arguments, GB | peak, GB "
        f"| convolutions | fused | beyond {LARGE}×{LARGE} | matmuls | traffic, GB | collectives |",
        "| --- " * 13 + "|",
        *rows,
        "",
        "| program | dtype × devices | convolutions | windows |",
        "| --- " * 4 + "|",
    ]
    for (which, counts), variants in windows.items():
        for kind in sorted({c.kind for c, _ in counts}):
            of_kind = [(c, n) for c, n in counts if c.kind == kind]
            cells = "; ".join(f"{n} of {'**' * c.large}{c}{'**' * c.large}" for c, n in of_kind)
            number = sum(n for _, n in of_kind)
            lines.append(f"| {which} | {', '.join(variants)} | {number} {kind} | {cells} |")
    return [*lines, ""]


def total(counts: collections.Counter[Convolution], wanted: Callable) -> int:
    """How many of them are wanted."""
    return sum(n for c, n in counts.items() if wanted(c))


def topology(devices: int) -> DevicePool:
    """So many H100s, none of which is there."""
    card = pathlib.Path(__file__).with_name("h100.textproto").read_text()
    return DevicePool(
        topologies.get_topology_desc(
            "h100", platform="cuda", topology=f"1x1x{devices}", target_config=card
        ).devices
    )


def main() -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=names, default="pascal,cityscapes,isbi_em")
    parser.add_argument("--dtypes", type=names, default="float32,bfloat16")
    parser.add_argument("--devices", type=names, default="1,8")
    parser.add_argument("--programs", type=names, default=",".join(PROGRAMS))
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the programs' texts")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver
    jax.config.update("jax_platforms", "cpu")  # for all but the compiled programs
    try:
        pools = {n: topology(n) for n in map(int, arguments.devices)}
    except (NotImplementedError, RuntimeError) as error:
        exit_with(
            f"XLA cannot compile for CUDA here ({reason(error)}); "
            f"pip install 'jax[cuda12]=={jax.__version__}'"
        )
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.gpu_program", *sys.argv[1:]])
    lines = [
        "# The paper's configs as programs of an H100",
        "",
        f"`{command}`, {machine.describe()}",
        "",
        "Compiled for NVIDIA H100s on a machine without one: nothing ran, and XLA's choice of "
        "kernels is untuned. Memory and traffic are a device's. The batch is of all devices, the "
        "nearest to the config's that they share evenly. Matmuls: cuBLAS's, which is told to do "
        "them all, + others. Traffic: what every kernel reads and writes, a loop of unknown length "
        "once. Fused: with what is added to a convolution, or its activation, in one cuDNN call.",
        "",
    ]
    for name in arguments.configs:
        lines += section(name, arguments, pools)
    machine.report(lines, arguments.out)


if __name__ == "__main__":
    main()
