"""Every bad input of a run, and the line it prints.

    python -m tests.bad_inputs [--out=FILE.md]

Each case is a program started as a user would start it; it must end with exit code 2, one line on
stderr and nothing half written, or this program fails.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from benchmarks import machine
from tests import forked, kill
from tests.data import sections
from tests.small import make_data

ROOT = pathlib.Path(__file__).resolve().parents[1]

Spoil = Callable[[pathlib.Path], object]


def _mask(data: pathlib.Path, array: np.ndarray) -> None:
    Image.fromarray(array.astype(np.uint8)).save(data / "masks" / "im0.png")


def _no_bars(data: pathlib.Path) -> None:
    for path in (data / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(path)


def _white_discs(data: pathlib.Path) -> None:
    (data / "classes.txt").write_text("ground\ndisc\n")
    for path in (data / "masks").iterdir():
        Image.fromarray((255 * (np.array(Image.open(path)) == 1)).astype(np.uint8)).save(path)


def _turned(data: pathlib.Path) -> None:
    image = Image.open(data / "images" / "im0.png")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(data / "images" / "im0.png", exif=exif)


def _deep(path: pathlib.Path) -> None:
    Image.fromarray(np.full((40, 56), 4000, np.uint16)).save(path)


def _leak(data: pathlib.Path) -> None:
    (data / "train.txt").write_text("im0\nim1\n")
    (data / "validation.txt").write_text("im2\nim0\n")


# name: (what is done to the data, further arguments of train.py, words the line must hold)
DATA: dict[str, tuple[Spoil, list[str], str]] = {
    "missing data folder": (lambda d: shutil.rmtree(d), [], "does not exist"),
    "empty data folder": (
        lambda d: (shutil.rmtree(d), d.mkdir()),
        [],
        "is empty",
    ),
    "an image that does not decode": (
        lambda d: (d / "images" / "im0.png").write_bytes(b"no image"),
        [],
        "im0.png does not decode",
    ),
    "a mask of another size": (
        lambda d: _mask(d, np.zeros((9, 9))),
        [],
        "is 9×9",
    ),
    "a weights file that is missing": (
        lambda d: None,
        ["--config.pretrained.path=/nowhere/resnet101.pth"],
        "weights file /nowhere/resnet101.pth does not exist",
    ),
    "a weights file that is not one": (
        lambda d: None,
        [f"--config.pretrained.path={ROOT / 'README.md'}"],
        "is of an unknown kind",
    ),
    "a folder to start from that is no run": (
        lambda d: None,
        [f"--config.pretrained.path={ROOT / 'configs'}"],
        "is a folder that holds no run",
    ),
    "a mask value outside the classes": (
        lambda d: _mask(d, np.full((40, 56), 77)),
        [],
        "holds the value 77",
    ),
    "a class without a training pixel": (_no_bars, [], "no pixel of class 'bar'"),
    "two classes, masks of 0 and 255": (_white_discs, [], "0 after the first, 255 after 'disc'"),
    "mask values of some classes": (
        lambda d: (d / "classes.txt").write_text("ground\t0\ndisc\nbar\t2\n"),
        [],
        "says mask values of some classes, but none of 'disc'",
    ),
    "two faults in one folder": (
        lambda d: (_mask(d, np.zeros((9, 9))), (d / "images" / "im1.png").write_bytes(b"")),
        [],
        "2 faults in data set 'folder', listed above; the first: image",
    ),
    "a colour that no class has": (
        lambda d: _mask(d, np.full((40, 56, 3), (0, 0, 9))),
        [],
        "im0.png is in colour (#000009 2240 pixels), and classes have no colours",
    ),
    "an image that is not stored as it is shown": (_turned, [], "--config.data.exif=ignore"),
    "an image of 16 bits": (
        lambda d: _deep(d / "images" / "im0.png"),
        [],
        "im0.png has 16 bits a channel, its largest value is 4000",
    ),
    "an image that trains and validates": (_leak, [], "is in split 'train' too"),
    "class names in UTF-16": (
        lambda d: (d / "classes.txt").write_text("ground\ndisc\nbar\n", "utf-16"),
        [],
        "classes.txt is UTF-16; save it as UTF-8",
    ),
    "a class to hold out that does not exist": (
        lambda d: None,
        ["--config.data.held_out=cube"],
        "data.held_out='cube' is no class",
    ),
    "a misspelt key": (lambda d: None, ["--config.batchsize=2"], "batchsize"),
    "a wrong type": (lambda d: None, ["--config.batch_size=two"], "batch_size"),
    "a misspelt flag": (lambda d: None, ["--wrkdir=x"], "wrkdir"),
    "a config that does not exist": (
        lambda d: None,
        ["--config=configs/kitti.py"],
        "configs/kitti.py' does not exist",
    ),
    "a batch of 0": (lambda d: None, ["--config.batch_size=0"], "batch_size=0"),
    "a batch that does not divide": (
        lambda d: None,
        ["--config.batch_size=4", "--config.accumulate=3"],
        "multiple of 3",
    ),
    "an eval_size too small for the backbone": (
        lambda d: None,
        ["--config.eval_size=(4,4)"],
        "too small for the backbone",
    ),
    "an unwritable workdir": (
        lambda d: None,
        ["--workdir=/proc/nowhere"],
        "cannot be written",
    ),
    "an unknown backbone": (
        lambda d: None,
        ["--config.model.backbone=vgg"],
        "model.backbone='vgg' is unknown",
    ),
    "a dotted path that does not import": (
        lambda d: None,
        ["--config.data.name=nowhere.mine"],
        "data.name='nowhere.mine' is unknown",
    ),
    "a dotted path without what is asked of it": (
        lambda d: None,
        ["--config.model.backbone=json.tool"],
        "has no 'build'; define it there",
    ),
    "a loss term that does not exist": (
        lambda d: None,
        ["--config.loss.terms=('cross_entropy','focal')"],
        "loss.terms='focal' is unknown; choose one of assignment, cross_entropy, diversity",
    ),
    "views of a backbone that trains": (
        lambda d: None,
        ["--config.augment.views=2", "--config.eval_size=(33,33)", "--config.crop_size=(33,33)"],
        "phases.joint.learning_rates.backbone trains it; set --config.augment.views=0",
    ),
    "directions of nothing": (
        lambda d: None,
        [
            "--config.model.head=directions",
            "--config.model.backbone=efficientnet",
            "--config.model.depth=0",
            "--config.model.norm=frozen_batch",
        ],
        "set --config.pretrained.path to the folder of a run with model.head='linear'",
    ),
    "weights of another backbone by name": (
        lambda d: None,
        ["--config.pretrained.path=efficientnet-lite0"],
        "does not exist; set pretrained.path to one (packages of model.backbone='resnet': none)",
    ),
}


# The same for the EM challenge's stacks of 64×64 sections.
SECTIONS: dict[str, tuple[Spoil, list[str], str]] = {
    **{f"EM: {name}": (spoil, [], words) for name, (spoil, words) in sections.BAD.items()},
    "EM: tiles larger than the image": (
        lambda d: None,
        ["--config.eval_overlap=8", "--config.eval_size=(256,256)"],
        "is 64×64, and tiles of 256×256 (height×width) are larger",
    ),
    "EM: a group of another network": (
        lambda d: None,
        ["--config.model.backbone=resnet"],
        "its groups are backbone, aspp",
    ),
}


def command(scratch: pathlib.Path) -> list[str]:
    """train.py of the small ResNet in a scratch folder's own."""
    return kill.command(scratch / "data", scratch / "cache", scratch / "work", kill.RESNET)


def run(line: list[str], scratch: pathlib.Path, prefix: list[str] = ()) -> tuple[int, str]:
    """(exit code, stderr) of a program, one behind a prefix in a process of its own."""
    environment = kill.environment(scratch)
    if not prefix:
        return forked.run(line, environment, ROOT)
    line = [*prefix, *line]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=ROOT)
    return result.returncode, result.stderr


def side_by_side(work: Callable, cases: dict) -> dict:
    """`work` of each case, as many at a time as there are cores."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(cases, pool.map(work, cases.values()), strict=True))


def data_case(name: str, scratch: pathlib.Path) -> tuple[int, str, list[str]]:
    """(exit code, stderr, what lies in the run's folder) of a case of `DATA` or `SECTIONS`."""
    spoil, arguments, _ = {**DATA, **SECTIONS}[name]
    line = command(scratch)
    if name in SECTIONS:
        sections.make_stacks(scratch / "data")
        line = [x for x in line if not x.startswith("--config") or "data." in x]
        # Python, train.py, and the config ahead of its settings
        line.insert(2, f"--config={ROOT / 'configs' / 'isbi_em.py'}:cpu")
    else:
        make_data(scratch / "data")
    spoil(scratch / "data")
    given = [a.partition("=")[0] for a in arguments]  # a tuple given twice would be appended
    line = [a for a in line if a.partition("=")[0] not in given] + arguments
    code, errors = run(line, scratch)
    left = (
        sorted(p.name for p in (scratch / "work").iterdir()) if (scratch / "work").exists() else []
    )
    return code, errors, left


def data_cases(scratch: pathlib.Path) -> dict[str, tuple[int, str, list[str]]]:
    """`data_case` of all of them, each in a folder of its own."""
    names = {name: name for name in (*DATA, *SECTIONS)}

    def case(name: str) -> tuple[int, str, list[str]]:
        own = scratch / "".join(ch if ch.isalnum() else "_" for ch in name)
        own.mkdir()
        return data_case(name, own)

    return side_by_side(case, names)


@contextlib.contextmanager
def trainer(scratch: pathlib.Path) -> Iterator[list[str]]:
    """A train.py that has done its warm-up and is in an endless joint phase: its command line."""
    make_data(scratch / "data")
    line = command(scratch)
    line.append("--config.phases.joint.steps=1000000")
    process = subprocess.Popen(
        line, env=kill.environment(scratch), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        while not (scratch / "work" / "summary.json").exists():
            if process.poll() is not None:
                raise RuntimeError(process.stderr.read().decode())
            time.sleep(0.5)
        yield line
    finally:
        process.kill()
        process.communicate()


def evaluate(scratch: pathlib.Path, *arguments: str) -> tuple[int, str]:
    """eval.py on the scratch run."""
    line = [sys.executable, str(ROOT / "eval.py"), f"--workdir={scratch / 'work'}", *arguments]
    return run(line, scratch)


def explain_cases(
    scratch: pathlib.Path, finished: pathlib.Path | None = None
) -> dict[str, tuple[int, str, str]]:
    """The same of explain.py, on a whole run, by default one made for it; nothing may be left
    behind."""
    work, new = scratch / "work", scratch / "new"
    make_data(scratch / "data")
    if finished:
        shutil.copytree(finished, work)
    else:
        code, errors = run(command(scratch), scratch)
        if code:
            raise RuntimeError(errors)
    (scratch / "text.png").write_text("no image")
    Image.fromarray(np.zeros((40, 56, 4), np.uint8)).save(scratch / "alpha.png")
    _deep(scratch / "deep.png")
    prototypes = json.loads((work / "prototypes.json").read_text())["prototypes"]
    own = ",".join(str(p["index"]) for p in prototypes if p["class"] == 0)
    early = scratch / "early"
    later = ("projection", "pruning", "finetune", "prototypes")
    shutil.copytree(work, early, ignore=lambda _, names: [n for n in names if n.startswith(later)])
    cases = {
        "an image that does not decode": (["--images=" + str(scratch / "text.png")], "no known"),
        "an image that is not there": (["--images=/nowhere.png"], "/nowhere.png does not exist"),
        "an image with transparency": (
            ["--images=" + str(scratch / "alpha.png")],
            "has transparent pixels",
        ),
        "an image of 16 bits": (["--images=" + str(scratch / "deep.png")], "no data.white"),
        "a split that does not exist": (["--split=night"], "split 'night' does not exist"),
        "a folder that is no page": ([f"--out={scratch / 'data'}"], "no explorer page"),
        "an unknown figure": (["--figures=fig3"], "figure fig3 is unknown"),
        "nothing to compare in": ([f"--compare={work}"], "add --figures"),
        "a prototype that does not exist": (["--remove=0,99", f"--to={new}"], "no prototype 99"),
        "a class's last prototype": ([f"--remove={own}", f"--to={new}"], "the last prototype"),
        "a removal without a place": (["--remove=0"], "go together"),
        "a removal onto another run": (["--remove=0", f"--to={work}"], "is not empty"),
        "a removal before projection": (
            ["--remove=0", f"--to={new}", f"--workdir={early}"],
            "before projection",
        ),
        "a folder that is no run": ([f"--workdir={scratch / 'data'}"], "holds no run"),
    }

    def explain(case: tuple[list[str], str]) -> tuple[int, str, str]:
        line = [sys.executable, str(ROOT / "explain.py"), f"--workdir={work}", *case[0]]
        return (*run(line, scratch), case[1])

    found = {f"explain.py: {name}": x for name, x in side_by_side(explain, cases).items()}
    left = [p for p in (new, work / "explain", work / "figures") if p.exists()]
    if left:
        raise RuntimeError(f"left behind: {left}")
    return found


def run_cases(scratch: pathlib.Path) -> dict[str, tuple[int, str, str]]:
    """(exit code, stderr, expected words) of what goes wrong with a run that exists."""
    found = {}
    with trainer(scratch) as line:
        found["two trainers on one workdir"] = (*run(line, scratch), "in use by another train.py")
        found["eval.py: a phase not yet reached"] = (
            *evaluate(scratch, "--phase=pruning"),
            "has not finished phase 'pruning'",
        )
        found["eval.py: a split that does not exist"] = (
            *evaluate(scratch, "--split=night"),
            "split 'night' does not exist",
        )
    other = [*line, "--config.loss.diversity=0.5"]
    found["a workdir that belongs to another config"] = (*run(other, scratch), "loss.diversity")
    (scratch / "work").rename(scratch / "moved")
    found["eval.py: a folder that is no run"] = (*evaluate(scratch), "holds no run")
    verb = run([sys.executable, "-m", "protoseg_jax", "trian"], scratch)
    found["a verb that does not exist"] = (*verb, "'trian' is no verb")
    return found


def can_mount() -> bool:
    """Whether a small file system can be made here (user namespaces)."""
    return not subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"], capture_output=True
    ).returncode


def full_disk_case(scratch: pathlib.Path) -> tuple[int, str]:
    """A run whose folder is a file system of 300 kB."""
    make_data(scratch / "data")
    (scratch / "work").mkdir()
    line = command(scratch)
    script = 'mount -t tmpfs -o size=300k none "$0" && exec "$@"'
    return run(line, scratch, ["unshare", "-rm", "sh", "-c", script, str(scratch / "work")])


def verdict(code: int, errors: str, words: str) -> str | None:
    """The line that was printed, or None if it is not what it should be."""
    lines = errors.strip().splitlines()
    lines = [x for x in lines if not x.startswith("preparing ") and " left" not in x]
    good = code == 2 and lines and lines[-1].startswith("error: ") and words in lines[-1]
    return lines[-1] if good and "Traceback" not in errors else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    rows, wrong = [], 0

    def add(name: str, code: int, errors: str, words: str, scratch: str) -> None:
        nonlocal wrong
        line = verdict(code, errors, words)
        wrong += line is None
        text = (line or f"WRONG, exit {code}: {errors}").replace(scratch, "…").replace("|", "\\|")
        rows.append(f"| {name} | `{text.removeprefix('error: ')}` |")
        print(rows[-1], file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name, (code, errors, _) in data_cases(pathlib.Path(folder)).items():
            add(name, code, errors, {**DATA, **SECTIONS}[name][2], folder)
    with tempfile.TemporaryDirectory() as folder:
        for name, (code, errors, words) in run_cases(pathlib.Path(folder)).items():
            add(name, code, errors, words, folder)
    with tempfile.TemporaryDirectory() as folder:
        for name, (code, errors, words) in explain_cases(pathlib.Path(folder)).items():
            add(name, code, errors, words, folder)
    if can_mount():
        with tempfile.TemporaryDirectory() as folder:
            add("a full disk", *full_disk_case(pathlib.Path(folder)), "the disk is full", folder)
    else:
        rows.append("| a full disk | not run: no file system can be mounted here |")
    head = ["# Bad input", "", "`python -m tests.bad_inputs`; each line ends with exit code 2.", ""]
    machine.report([*head, "| input | line |", "| --- | --- |", *rows], arguments.out)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
