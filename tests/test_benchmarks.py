"""The benchmarks, which nothing runs between releases, name what there is in the package."""

import ast
import importlib
import inspect
import pathlib
import types

import pytest

from protoseg_jax import files

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
OURS = ("protoseg_jax", "benchmarks", "tests")
WITH_TORCH = ("authors", "parity", "pytorch")


def of_ours(thing):
    """Whether this is a module of this repository."""
    return isinstance(thing, types.ModuleType) and thing.__name__.partition(".")[0] in OURS


def found(node, names):
    """What a (dotted) name stands for, looked up in modules of ours alone; None if in another.

    Raises:
      AttributeError: it is not there.
    """
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and of_ours(module := found(node.value, names)):
        return getattr(module, node.attr)
    return None


def mistakes(source, names):
    """Lines of a module's source that look up or call what our modules do not have so.

    Names that a function has of its own in a module's place are taken for the module's.
    """
    wrong = []
    for node in ast.walk(ast.parse(source)):
        try:
            if isinstance(node, ast.Attribute):
                found(node, names)
            if isinstance(node, ast.Call) and inspect.isroutine(f := found(node.func, names)):
                keywords = [k.arg for k in node.keywords]
                starred = any(isinstance(a, ast.Starred) for a in node.args)
                if not starred and None not in keywords:
                    inspect.signature(f).bind(*node.args, **dict.fromkeys(keywords))
        except (AttributeError, TypeError) as error:
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}: {error}")
    return wrong


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.parity) if path.stem in WITH_TORCH else path
        for path in sorted(FOLDER.glob("*.py"))
    ],
    ids=lambda path: path.stem,
)
def test_names_and_calls(path):
    if path.stem in WITH_TORCH:
        pytest.importorskip("torch")
    module = importlib.import_module(f"benchmarks.{path.stem}")
    assert mistakes(path.read_text(), vars(module)) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("files.write_jsonn(a, b)", "write_jsonn"),
        ("files.write_json(a)", "missing a required argument"),
        ("files.write_json(a, b, indent=2)", "unexpected keyword argument 'indent'"),
    ],
)
def test_mistakes_are_found(line, told):
    wrong = mistakes(line, {"files": files})
    assert wrong and all(told in mistake for mistake in wrong)
    assert mistakes("files.write_json(*a); files.read_json(b)", {"files": files}) == []
