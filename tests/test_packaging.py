import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_wheel_brings_prompts_runners_and_tables_inside_the_package_and_no_other_package(built):
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert "tuner/_bundled/prompts/enhanced.md.j2" in names
    assert "tuner/_bundled/runners/llama.py" in names
    assert "tuner/_bundled/recorded/NOTICE" in names
    assert "tuner/_bundled/recorded/tx2-inceptionv3-400px.json" in names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"tuner"}


def test_an_installed_wheel_finds_its_prompts_runners_and_tables_from_any_folder(built, tmp_path):
    shutil.unpack_archive(next(built.glob("*.whl")), tmp_path / "site", format="zip")
    code = (
        "from tuner.files import find, shipped\n"
        "for kind, name in (('prompts', 'baseline'), ('runners', 'llama'), ('recorded', 'tx2-inceptionv3-400px')):\n"
        "    path = find(kind, name)\n"
        "    assert '_bundled' in str(path) and shipped(path), path"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_source_archive_holds_what_a_wheel_is_built_from(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "prompts/enhanced.md.j2", "runners/llama.py", "tuner/cli.py", "LICENSE"} <= names
    assert "results/recorded/tx2-inceptionv3-400px.csv" in names
