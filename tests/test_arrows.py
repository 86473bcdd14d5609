"""Imports go one way: faces → domain modules → models; training → trajectories; the trainer stands alone."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FACES = ("admin", "api", "tasks", "management")


def imports(path: Path) -> set[str]:
    """Every module that the file imports, at any depth in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def breaches(files: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    assert files, "a rule about no file holds nothing"
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imports(path))
        if any(name == word or name.startswith(f"{word}.") for word in forbidden)
    ]


def python(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def is_face(path: Path) -> bool:
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    named = ("urls", "views", "apps", "front_door", "project_admin")
    return any(part.startswith(FACES) for part in parts) or parts[-1] in named


def test_trajectories_do_not_know_of_training() -> None:
    assert breaches(python("trajectories"), ("training", "gateway", "recorder")) == []


def test_the_trainer_knows_neither_models_nor_settings() -> None:
    assert breaches(python("training/trainer"), ("django", "trajectories", "training.models", "rest_framework")) == []


def test_the_judge_client_and_the_serving_driver_get_plain_values() -> None:
    files = [ROOT / "training" / name for name in ("judge.py", "serving.py", "shim.py")]
    assert breaches(files, ("django", "trajectories", "training.models")) == []


def test_the_site_never_imports_torch() -> None:
    """A page must not wait eight seconds for torch; only the trainer's own process loads it."""
    files = [
        path
        for folder in ("trainingsite", "trajectories", "training", "recorder")
        for path in python(folder)
        if "trainer" not in path.relative_to(ROOT).parts
    ]
    assert breaches(files, ("torch", "transformers", "peft")) == []


def test_domain_modules_do_not_know_their_faces() -> None:
    for app in ("trajectories", "training"):
        inner = [path for path in python(app) if not is_face(path) and "migrations" not in path.parts]
        assert breaches(inner, tuple(f"{app}.{face}" for face in ("admin", "api"))) == []


def test_the_recorder_stands_alone() -> None:
    assert breaches(python("recorder"), ("django", "trajectories", "training", "trainingsite")) == []


def test_the_training_package_is_empty_so_that_the_trainer_starts_without_django() -> None:
    assert (ROOT / "training" / "__init__.py").read_text() == ""
