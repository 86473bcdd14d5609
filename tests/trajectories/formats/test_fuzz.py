"""Every format under fire: documents with parts replaced, cut, repeated and retyped, and JSON of no format at all.

No reader raises anything but a Problem, no mutation costs a neighbour, and nothing is written by halves. The quick
profile runs with the others; the long one is `pytest -m slow`.
"""

import copy
import gzip
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import call_command
from django.test import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import builders
from tests.trajectories import recordings
from tests.trajectories.formats.seeds import ALL, SEEDS
from trajectories import formats, importing, indexing, payloads, segments, transcripts
from trajectories.errors import Problem
from trajectories.formats import lenient
from trajectories.formats.incoming import Incoming
from trajectories.models import Project, Trajectory

URL = "/api/v1/trajectories/"
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
QUICK = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=CHECKS, database=None)
STORED = settings(QUICK, max_examples=40)
LONG = settings(QUICK, max_examples=3_000, derandomize=False, print_blob=True)
LONG_STORED = settings(LONG, max_examples=400)

LEAVES: st.SearchStrategy[object] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [
            2**63,
            2**64,
            -(2**70),
            10**400,
            1e308,
            -0.0,
            "",
            "\x00",
            "a\x00b",
            "\ud800",
            "\u202eabc",
            "\x1b[31m",
            "\f\r\n",
            "NaN",
            "null",
            "[]",
            "{",
            '{"role": "user"}',
            '"\\"twice\\""',
            "[" * 300,
            "assistant",
            "tool",
            "user",
            "attachment://abc",
            "9999-12-31T23:59:59.999999+14:00",
            "0001-01-01T00:00:00-14:00",
            "x" * 10_000,
            "#group",
            "../../etc/passwd",
            "<script>alert(1)</script>",
        ]
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.text(max_size=8), st.sampled_from(["role", "content", "id", "type"])), inner, max_size=4
        ),
    ),
    max_leaves=8,
)
DEEP = json.loads("[" * 400 + "]" * 400)


@st.composite
def mutated(draw: Callable[[st.SearchStrategy[object]], object]) -> tuple[str, object]:
    """(format, a document of it with one to five parts changed)"""
    at = draw(st.integers(0, len(ALL) - 1))
    assert isinstance(at, int)
    name, value = ALL[at][0], copy.deepcopy(ALL[at][1])
    for _ in range(int(str(draw(st.integers(1, 5))))):
        value = _changed(draw, value)
    return name, value


def _changed(draw: Callable[[st.SearchStrategy[object]], object], value: object) -> object:
    """The value with one part changed, somewhere below."""
    inside = [value]
    at = value
    keys: list[str | int] = []
    for _ in range(12):
        ways: list[str | int] = (
            list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        )
        if not ways or (keys and draw(st.integers(0, 3)) == 0):
            break
        key = draw(st.sampled_from(ways))
        assert isinstance(key, str | int)
        keys.append(key)
        at = at[key]  # type: ignore[index]
        inside.append(at)
    if not keys:
        return draw(VALUES)
    parent, key = inside[-2], keys[-1]
    how = draw(st.sampled_from(["replace", "replace", "drop", "repeat", "wrap", "text", "add", "swap"]))
    if isinstance(parent, dict) and isinstance(key, str):
        _change_entry(draw, parent, key, str(how))
    elif isinstance(parent, list) and isinstance(key, int):
        _change_item(draw, parent, key, str(how))
    return value


def _change_entry(
    draw: Callable[[st.SearchStrategy[object]], object], parent: dict[str, object], key: str, how: str
) -> None:
    if how == "drop":
        del parent[key]
    elif how == "wrap":
        parent[key] = [parent[key]]
    elif how == "text":
        parent[key] = json.dumps(parent[key])
    elif how in ("add", "repeat"):
        parent[str(draw(st.sampled_from(["extra", "id", "messages", "x\x00y", "reward", "tool_calls"])))] = draw(VALUES)
    elif how == "swap" and len(parent) > 1:
        other = next(one for one in parent if one != key)
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = draw(VALUES)


def _change_item(draw: Callable[[st.SearchStrategy[object]], object], parent: list[object], key: int, how: str) -> None:
    if how == "drop":
        del parent[key]
    elif how == "repeat":
        parent.insert(key, copy.deepcopy(parent[key]))
    elif how == "wrap":
        parent[key] = {"content": parent[key]}
    elif how == "text":
        parent[key] = json.dumps(parent[key])
    elif how == "add":
        parent.append(draw(VALUES))
    elif how == "swap":
        parent[key], parent[0] = parent[0], parent[key]
    else:
        parent[key] = draw(VALUES)


def _read(name: str, value: object) -> list[Incoming]:
    """What the importer and the API get of the bytes that such a document is."""
    raw = json.dumps(value).encode("utf-8", "surrogatepass")
    good: list[Incoming] = []
    try:
        found = formats.incoming(raw, name)
    except Problem:
        pass
    else:
        good.append(found)
    try:
        decoded = lenient.loads(raw)
    except Problem:
        return good
    module = formats.recognised(decoded)
    named = formats.named(name)
    for reader in {module.NAME: module, name: named}.values() if module is not None else [named]:
        for one in formats.trajectories_in(decoded, reader, source="some file.json"):
            assert isinstance(one, Incoming | Problem)
            if isinstance(one, Incoming):
                good.append(one)
    for one in good:  # what is accepted can be stored, read as conversations, and has an id that fits
        payloads.encode(one.payload)
        transcripts.histories(one.payload)
        transcripts.prompts(one.payload)
        assert 0 < len(one.payload.trajectory_id) <= 200
        assert one.payload.reward is None or abs(one.payload.reward) < float("inf")
    return good


@QUICK
@given(document=mutated())
def test_no_mutation_of_a_document_raises_anything_but_a_problem(document: tuple[str, object]) -> None:
    _read(*document)


@QUICK
@given(name=st.sampled_from(sorted(SEEDS)), value=VALUES)
def test_no_json_at_all_raises_anything_but_a_problem(name: str, value: object) -> None:
    _read(name, value)


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_what_is_nested_too_deep_is_refused(name: str) -> None:
    for seed in SEEDS[name]:
        value = copy.deepcopy(seed)
        target = value[0] if isinstance(value, list) else value
        assert isinstance(target, dict)
        target[next(iter(target))] = DEEP
        _read(name, value)


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_every_seed_is_recognised_and_read(name: str) -> None:
    for seed in SEEDS[name]:
        module = formats.recognised(seed)
        assert module is formats.named(name)
        assert _read(name, seed)


@pytest.fixture
def project() -> Project:
    return builders.make_project("here", held_out_share=0.0)


@pytest.fixture
def headers(project: Project) -> dict[str, str]:
    return builders.bearer(builders.make_key(project)[1])


def _posted(client: Client, headers: dict[str, str], document: tuple[str, object]) -> None:
    name, value = document
    raw = json.dumps(value)
    answer = client.post(f"{URL}?format={name}", raw, content_type="application/json", headers=headers)
    assert answer.status_code < 500, answer.content
    if answer.status_code not in (200, 201):
        assert answer["Content-Type"] == "application/problem+json"
        assert answer.json()["detail"]


def _in_bulk(client: Client, headers: dict[str, str], project: Project, document: tuple[str, object]) -> None:
    _, value = document
    Trajectory.objects.filter(project=project, trajectory_id__in=["before", "after"]).delete()
    good = [recordings.native("before"), recordings.native("after")]
    lines = [json.dumps(good[0]), json.dumps(value), json.dumps(good[1])]
    answer = client.post(f"{URL}bulk/", "\n".join(lines), content_type="application/x-ndjson", headers=headers)
    assert answer.status_code == 207, answer.content
    told = answer.json()
    assert {one["index"] for one in (*told["successes"], *told["errors"])} == {0, 1, 2}
    assert {"before", "after"} <= {one["trajectory_id"] for one in told["successes"]}


def _whole(project: Project) -> None:
    """Nothing is there by halves: every row's payload can be loaded, and behind-the-write work runs through."""
    indexing.drain(project)
    for row in Trajectory.objects.filter(project=project):
        assert len(segments.load(row).steps) == row.n_steps
    Trajectory.objects.filter(project=project).delete()


@pytest.mark.django_db
@STORED
@given(document=mutated())
def test_http_answers_every_mutation_and_keeps_its_neighbours(
    client: Client, project: Project, headers: dict[str, str], document: tuple[str, object]
) -> None:
    _posted(client, headers, document)
    _in_bulk(client, headers, project, document)
    _whole(project)


def _imported(folder: Path, project: Project, documents: list[tuple[str, object]]) -> None:
    lines = [json.dumps(recordings.native("before")), *(json.dumps(value) for _, value in documents)]
    path = folder / "mixed.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join([*lines, json.dumps(recordings.chat("after"))]).encode()))
    out = StringIO()
    try:
        call_command("import_trajectories", str(path), project="here", json=True, stdout=out, stderr=StringIO())
    except SystemExit as exc:
        assert exc.code == 1
    report = json.loads(out.getvalue().strip().splitlines()[-1])
    assert report["failed"] == len(report["errors"])
    assert not [one for one in report["errors"] if "could not be" in one["detail"]]  # the net under readers' faults
    names = set(Trajectory.objects.filter(project=project).values_list("trajectory_id", flat=True))
    assert {"before", "after"} <= names
    _whole(project)


@pytest.mark.django_db
@STORED
@given(documents=st.lists(mutated(), max_size=6))
def test_the_importer_takes_what_it_can_of_a_file(
    tmp_path: Path, project: Project, documents: list[tuple[str, object]]
) -> None:
    _imported(tmp_path, project, documents)


@pytest.mark.slow
@LONG
@given(document=mutated())
def test_no_mutation_raises_for_long(document: tuple[str, object]) -> None:
    _read(*document)


@pytest.mark.slow
@pytest.mark.django_db
@LONG_STORED
@given(document=mutated())
def test_http_answers_every_mutation_for_long(
    client: Client, project: Project, headers: dict[str, str], document: tuple[str, object]
) -> None:
    _posted(client, headers, document)
    _in_bulk(client, headers, project, document)
    _whole(project)


@pytest.mark.slow
@pytest.mark.django_db
@LONG_STORED
@given(documents=st.lists(mutated(), max_size=6))
def test_the_importer_takes_what_it_can_for_long(
    tmp_path: Path, project: Project, documents: list[tuple[str, object]]
) -> None:
    _imported(tmp_path, project, documents)


@pytest.mark.slow
@recordings.needs_data
@pytest.mark.parametrize(
    "path", [one for one in importing.found([recordings.DATA]) if "LICENSES" not in one.parts], ids=lambda one: one.name
)
def test_recorded_files_may_be_cut_anywhere(path: Path, tmp_path: Path) -> None:
    raw = path.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        cut = tmp_path / path.name
        cut.write_bytes(raw[: int(len(raw) * share)])
        try:
            for _, item in importing.items(cut):
                assert isinstance(item, Incoming | Problem)
        except Problem:
            pass
        except (OSError, EOFError) as exc:  # gzip's own, which the importer reports with the file
            assert path.suffix == ".gz", exc
