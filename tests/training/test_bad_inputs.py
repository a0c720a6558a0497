"""Every bad input ends with one line, exit code 2 and nothing half written."""

import pytest

from tests import bad_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return bad_inputs.data_cases(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("name", [*bad_inputs.DATA, *bad_inputs.SECTIONS])
def test_bad_data_or_settings(name, found):
    code, errors, left = found[name]
    assert bad_inputs.verdict(code, errors, {**bad_inputs.DATA, **bad_inputs.SECTIONS}[name][2]), (
        errors
    )
    assert left == []


def test_bad_runs(tmp_path):
    for name, (code, errors, words) in bad_inputs.run_cases(tmp_path).items():
        assert bad_inputs.verdict(code, errors, words), (name, errors)


def test_bad_explanations(tmp_path, shared_run):
    cases = bad_inputs.explain_cases(tmp_path, shared_run / "work")
    for name, (code, errors, words) in cases.items():
        assert bad_inputs.verdict(code, errors, words), (name, errors)


def test_full_disk(tmp_path):
    if not bad_inputs.can_mount():
        pytest.skip("no file system can be mounted here (unshare -rm)")
    code, errors = bad_inputs.full_disk_case(tmp_path)
    assert bad_inputs.verdict(code, errors, "the disk is full"), errors
