"""pyproject.toml, constraints.txt and environment.yml say the same thing, and each version is said once."""

import importlib.metadata
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from gpt2course import doctor

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
CONSTRAINT_LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in CONSTRAINT_LINES}


def conda_packages() -> list[str]:
    return [entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]


def pip_lines() -> list[str]:
    (block,) = (entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    assert block.keys() == {"pip"}
    return list(block["pip"])


def requirements(*extras: str) -> Iterator[Requirement]:
    """What the project itself asks for, with some of its extras; extras that name extras are followed."""
    texts = list(PROJECT["dependencies"]) if not extras else [text for extra in extras for text in EXTRAS[extra]]
    for requirement in map(Requirement, texts):
        if requirement.name == "gpt2course":
            yield from requirements(*requirement.extras)
        else:
            yield requirement


def test_environment_has_only_the_known_parts() -> None:
    """A misspelt key ("dependancies") is ignored by conda without a word."""
    assert ENVIRONMENT.keys() == {"name", "channels", "dependencies"}
    assert ENVIRONMENT["name"] == "gpt2course"
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    names = [re.match(r"[\w-]+", package)[0] for package in conda_packages()]
    assert names == ["python", "pip"], "all else comes from pyproject.toml through pip"


def test_environment_has_the_python_range_of_pyproject() -> None:
    """conda would make an environment with a Python in which pip then refuses the package."""
    (python,) = (package for package in conda_packages() if package.startswith("python"))
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])


def test_environment_names_extras_that_exist() -> None:
    """pip installs `.[labs]` without the extra and without an error."""
    (editable,) = (line for line in pip_lines() if line.startswith("-e "))
    found = re.fullmatch(r"-e \.\[([\w,]+)\]", editable)
    assert found
    assert set(found[1].split(",")) <= EXTRAS.keys()


def test_environment_has_no_versions_of_its_own() -> None:
    """A second list of versions goes stale the day the first one changes."""
    others = [line for line in pip_lines() if not line.startswith("-e ")]
    assert others == ["-c constraints.txt"]
    assert not re.search(r"[=<>~]=?", "".join(pip_lines()))


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_extras_that_name_extras_name_existing_ones(extra: str) -> None:
    """`gpt2course[lab,hubb]` inside an extra is dropped by pip in silence, too."""
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name == "gpt2course":
            assert requirement.extras <= EXTRAS.keys()


def test_dev_contains_lab() -> None:
    """The scripts skip installing lab after dev; a package in lab alone would then be missing."""
    assert {r.name for r in requirements("lab")} <= {r.name for r in requirements("dev")}


def test_constraints_are_plain_pins() -> None:
    """A local version (2.13.0+cpu), a path or an address would fit one machine or one kind of machine only."""
    for line in CONSTRAINT_LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line
    assert len(PINS) == len(CONSTRAINT_LINES), "a package is pinned twice"
    assert not [name for name in PINS if name.startswith("nvidia-") or name == "triton"]


def test_constraints_pin_what_the_project_asks_for() -> None:
    """A pin outside the range in pyproject.toml makes every install fail."""
    for requirement in [*requirements(), *requirements(*EXTRAS)]:
        pinned = PINS[canonicalize_name(requirement.name)]
        assert Version(pinned) in requirement.specifier, f"{requirement} is pinned to {pinned}"


def test_constraints_pin_every_dependency_of_a_dependency() -> None:
    """A package without a pin changes under the course one day: new installs break where old ones work."""
    unpinned, seen = set(), set()
    todo = [*requirements(), *requirements("dev")]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ["", *requirement.extras]:
            if (name, extra) in seen or re.match(r"nvidia-|cuda-|triton", name):
                continue
            seen.add((name, extra))
            if name not in PINS:
                unpinned.add(name)
            for text in importlib.metadata.requires(name) or []:
                further = Requirement(text)
                if further.marker is None or further.marker.evaluate({"extra": extra}):
                    todo.append(further)
    assert len(seen) > 100, "the walk stopped early"
    assert not unpinned


def test_scripts_and_constraints_install_the_same_torch() -> None:
    """pip refuses `torch==A` under a constraint `torch==B` only after minutes of work."""
    in_script = re.search(r'^TORCH="torch==(.+)"$', (ROOT / "scripts/common.sh").read_text(), flags=re.MULTILINE)
    assert in_script
    assert in_script[1] == PINS["torch"]


def test_doctor_has_the_ranges_of_pyproject() -> None:
    """A doctor that calls a supported Python or torch too old, or an unsupported one fine, misleads."""
    lowest, above = doctor.PYTHON_RANGE
    text = f">={'.'.join(map(str, lowest))},<{'.'.join(map(str, above))}"
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(text)
    (torch,) = (requirement for requirement in requirements() if requirement.name == "torch")
    assert torch.specifier == SpecifierSet(f">={'.'.join(map(str, doctor.TORCH_MINIMUM))}")


def test_licences_are_shipped() -> None:
    """The vocabulary must not travel without OpenAI's notice."""
    for name in PROJECT["license-files"]:
        assert (ROOT / name).stat().st_size > 500, name
    notice = (ROOT / "gpt2course/assets/VOCABULARY_LICENSE").read_text()
    assert "gpt2_vocab.bpe.xz" in notice
    assert "Software Copyright (c) 2019 OpenAI" in notice


def test_readme_maps_every_chapter_and_its_links_work() -> None:
    """A chapter that nobody finds, or a first click that ends at "404"."""
    readme = (ROOT / "README.md").read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", readme) if "://" not in target]
    assert not [target for target in targets if not (ROOT / target).exists()]
    chapters = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/[0-9][0-9]_*.ipynb")}
    assert {target for target in targets if target.endswith(".ipynb")} == chapters


@pytest.mark.parametrize("row", re.findall(r"^\| \[\d\d .+$", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
def test_readme_gives_a_chapter_the_time_that_it_gives_itself(row: str) -> None:
    """A reader who sets an evening aside for what takes three."""
    found = re.search(r"\(([^)]+)\).*\| (\d+) min \|$", row)
    assert found, row
    first_cell = "".join(json.loads((ROOT / found[1]).read_text())["cells"][0]["source"])
    assert re.search(rf"\b{found[2]}\b", first_cell), f"{found[1]} does not say {found[2]}"
