"""What is installed, what must not be importable, and that the repository's pages name what exists."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
from apps import make_world
from http_server import Behind, serve

from millpond.feature_actors.clock import WallClock
from millpond.feature_actors.layout import compile_layout

ROOT = Path(__file__).parents[1]
FOLDERS = ("feature_actors", "models", "deployments", "cluster", "bench")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def source_files() -> list[str]:
    """The files that are, or are about to be, under version control."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, source_files: list[str]) -> zipfile.ZipFile:
    """A wheel built from a copy: building leaves folders behind, which a later build would pick up."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in source_files:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "copy" / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check",
         "--wheel-dir", str(folder), str(folder / "copy")],
        check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=300,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(
    wheel: zipfile.ZipFile, source_files: list[str]
) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {
        f"millpond/{name}"
        for name in source_files
        if name.split("/")[0] in FOLDERS and name.endswith((".py", ".html", "py.typed", "FORMAT.md"))
    }
    assert inside == wanted
    assert {f"millpond/{folder}/py.typed" for folder in FOLDERS if folder != "bench"} <= inside
    assert "millpond/deployments/docs.html" in inside
    assert "millpond/cluster/demo/flights.py" in inside
    assert {
        f"millpond/feature_actors/{n}.py" for n in ("aggregations/__init__", "aggregations/sum", "tiles/read")
    } <= inside


def test_the_wheel_holds_a_command_and_no_top_level_package_but_millpond(wheel: zipfile.ZipFile) -> None:
    info = {name.split("/")[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(info["entry_points.txt"]).decode().split() == [
        "[console_scripts]", "millpond", "=", "millpond.cluster.cli:main",
        "[pytest11]", "millpond", "=", "millpond.cluster.pytest_plugin",
    ]  # fmt: skip
    assert {name.split("/")[0] for name in wheel.namelist()} == {"millpond", info["RECORD"].split("/")[0]}


def test_every_folder_with_code_is_a_package_of_the_project(project: dict[str, Any], source_files: list[str]) -> None:
    folders = {str(Path(n).parent) for n in source_files if n.endswith(".py") and n.split("/")[0] in FOLDERS}
    packages = {f"millpond.{folder.replace('/', '.')}" for folder in folders}
    assert set(project["tool"]["setuptools"]["packages"]) == packages
    mapped = project["tool"]["setuptools"]["package-dir"]
    assert mapped == {f"millpond.{folder.replace('/', '.')}": folder for folder in folders}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_not_to_be_imported_under_its_own_name(folder: str) -> None:
    """With the repository's root on the path, `import models` would make a second copy of every class."""
    code = f"import {folder}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: import millpond.{folder}, not {folder}: a second copy would double every class"
    )


def test_the_top_level_holds_what_the_design_says_and_nothing_else(source_files: list[str]) -> None:
    top = {name.split("/")[0] for name in source_files}
    assert {n for n in top if not n.startswith(".")} == {
        "pyproject.toml", "README.md", "cluster", "deployments", "feature_actors", "models", "tests", "bench",
    }  # fmt: skip


def test_the_version_is_known_without_importing_anything(project: dict[str, Any]) -> None:
    assert version("millpond") == project["project"]["version"]
    (command,) = [e for e in entry_points(group="console_scripts") if e.name == "millpond"]
    assert command.value == project["project"]["scripts"]["millpond"]


def test_the_core_the_models_and_the_http_apps_do_not_load_ray() -> None:
    """Not even by a detour: what they import, and what that imports."""
    code = (
        "import sys, millpond.deployments.score, millpond.deployments.events, millpond.deployments.serving, "
        "millpond.models.flight_delay, millpond.models.churn, millpond.models.recommend, millpond.cluster.cli; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'ray', 'sklearn', 'fastapi', 'starlette', 'httpx'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_examples_are_short_and_say_nothing_of_ray() -> None:
    for name in ("flight_delay.py", "churn.py", "recommend.py"):
        text = (ROOT / "models" / name).read_text()
        assert len(text.splitlines()) < 150
        assert not re.search(r"\bray\b", text, re.IGNORECASE)


def test_no_name_says_nothing(source_files: list[str]) -> None:
    """No file, class or function is named utils, common, helpers, manager, ..."""
    empty = {"utils", "util", "common", "helpers", "helper", "manager", "process", "handle", "data", "info"}
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = []
    for name in source_files:
        if name.endswith(".py") and name.split("/")[0] in FOLDERS:
            tree = ast.parse((ROOT / name).read_text(), name)
            defined = [Path(name).stem, *(n.name for n in ast.walk(tree) if isinstance(n, kinds))]
            found += [f"{name}: {d}" for d in defined if empty & set(d.strip("_").lower().split("_"))]
    assert found == []


# -- the README


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_every_link_of_the_readme_leads_somewhere(readme: str) -> None:
    headings = re.findall(r"^#+ (.*)$", readme, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    targets = re.findall(r"\]\(([^)\s]+)\)", readme)
    broken = []
    for target in targets:
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        if (path and not (ROOT / path).exists()) or (not path and anchor not in anchors):
            broken.append(target)
    assert broken == []


def test_every_path_that_the_readme_names_exists(readme: str) -> None:
    """`cluster/cli.py`, `deployments/`, `feature_actors/kernels.py: ingest`: in code spans and in tables."""
    named = re.findall(rf"\b((?:{'|'.join(FOLDERS)}|tests|\.ci)/[\w./*-]*)", readme)
    assert len(set(named)) >= 5, "the README names the files of both journeys"
    missing = [n for n in sorted(set(named)) if not list(ROOT.glob(n.rstrip("./") or n))]
    assert missing == []


def test_the_readme_gives_the_two_commands(readme: str) -> None:
    lines = [
        line.strip() for block in re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL) for line in block.splitlines()
    ]
    assert any(line.startswith("pip install") and "&& millpond demo" in line for line in lines)
    assert "pip install -e '.[test]' && pytest -q" in lines
    # Continuous integration runs the very line.
    assert "pip install -e '.[test]' && pytest -q" in (ROOT / ".ci" / "run").read_text()


def test_every_command_and_setting_that_the_readme_names_is_one(readme: str) -> None:
    from dataclasses import fields

    from millpond.cluster.cli import _parser
    from millpond.cluster.config import Config

    commands = set(
        re.findall(
            r"\bmillpond (demo|[a-z]+)\b(?=[ `\n])", "\n".join(re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL))
        )
    )
    (sub,) = (action for action in _parser()._actions if isinstance(action.choices, dict))
    assert sub.choices is not None
    assert commands <= set(sub.choices), commands
    variables = set(re.findall(r"\bMILLPOND_([A-Z_]+)\b", readme))
    assert {v.lower() for v in variables} <= {f.name for f in fields(Config)} | {"datasets", "examples", "parity"}


def test_the_python_of_the_readme_runs_and_prints_what_it_says(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {"__name__": "readme"}
    for block in (blocks[0], blocks[1], blocks[3]):
        exec(compile(block, "README.md", "exec"), names)
    # The last block calls a cluster, which serves what the first one has declared.
    world = make_world([names["spender"]], layout=compile_layout([], [names["user_spend"]]), clock=WallClock())
    other = {**names["events"].to_pylist()[0], "user_id": 99}  # kernels take longer to compile than a client waits
    assert world.post_events("purchases", {**other, "paid_at": other["paid_at"].isoformat()}).status == 200
    assert world.post_score("spender", [{"user_id": 1}]).status == 200
    with serve(Behind(world)) as url:
        assert blocks[4].count("http://127.0.0.1:8000") == 1
        exec(compile(blocks[4].replace("http://127.0.0.1:8000", url), "README.md", "exec"), names)
    assert (names["ack"].accepted, names["sender"].ack.accepted, names["spend"].features["orders_30d"]) == (3, 1, 1.0)
    assert names["rows"].matrix.tolist() == [[1.0, 0.0, 12.5], [2.0, 1.0, 36.25]]
    assert capsys.readouterr().out.split() == ["[[", "1.", "0.", "12.5", "]", "[", "2.", "1.", "36.25]]"]
    # An unknown user has a mean of NaN, which the model has to say something about.
    unknown = names["spender"].predictor().predict(millpond_features([[0.0, 0.0, float("nan")]]))
    assert unknown.tolist() == [0.0]


def test_the_tests_of_the_readme_pass(readme: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "spender.py").write_text(blocks[0])
    (tmp_path / "test_spender.py").write_text(blocks[2])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.match(r"2 passed", done.stdout.splitlines()[-1])


def millpond_features(matrix: list[list[float]]) -> Any:
    import numpy as np

    from millpond.models import Features

    return Features(np.array(matrix), ("a", "b", "c"))
