"""What the spool had to set aside, taken in after all once its cause is mended."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from django.db import DatabaseError, transaction

from gateway import recordings
from gateway.ingester import growing_of, step_after
from gateway.recordings import FORMAT, Call, End
from trainingsite.celery import nudge
from trajectories import ingestion, payloads, running, segments, tasks
from trajectories.errors import Conflict, Gone, Problem, Unknown
from trajectories.formats.incoming import Incoming
from trajectories.models import Project, State, Trajectory
from trajectories.payloads import LlmCallPayload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retried:
    """What became of one file."""

    path: Path
    taken: bool
    said: str


def retry(paths: Sequence[Path]) -> Iterator[Retried]:
    """Take each in, in their order, beside a gateway that runs. A file goes once its record is in the database.

    A call that is in its trajectory already is not taken again: this may be killed and repeated.
    """
    for path in paths:
        why = path.with_suffix(".why")
        try:
            said = _take(path.read_bytes())
        except FileNotFoundError:
            yield Retried(path, False, "It is not there.")
            continue
        except DatabaseError as exc:
            yield Retried(path, False, f"The database does not take it: {str(exc).strip().partition(chr(10))[0]}")
            continue
        except Problem as problem:
            why.write_text(f"{problem.detail}\n")
            yield Retried(path, False, problem.detail)
            continue
        except (ValueError, RecursionError) as exc:  # msgspec's errors are ValueErrors
            yield Retried(path, False, f"It cannot be read: {exc}")
            continue
        path.unlink(missing_ok=True)
        why.unlink(missing_ok=True)
        yield Retried(path, True, said)


def _take(raw: bytes) -> str:
    """Raises Problem, or what decoding raises: it cannot be taken in."""
    record = recordings.decode(raw)
    project = Project.objects.filter(pk=record.project).first()
    if project is None:
        raise Gone(f"The project {record.project} is not there any more.")
    said = _take_end(project, record) if isinstance(record, End) else _take_call(project, record)
    nudge(tasks.index_project, project.pk)
    return said


def _take_end(project: Project, end: End) -> str:
    ended = running.end(project, end.trajectory_id, recordings.end_of(end))
    return f"The end of {ended.trajectory_id} ({ended.outcome})."


def _take_call(project: Project, call: Call) -> str:
    chosen = Trajectory.objects.filter(project=project, trajectory_id=call.trajectory_id)
    if not chosen.exists():
        payload = recordings.opening_of(call)
        canonical = payloads.canonical(payload)
        ingestion.record(project, Incoming(payload=payload, canonical=canonical, source_format=FORMAT))
    with transaction.atomic():
        row = chosen.select_for_update().first()
        if row is None:
            raise Unknown(f"The trajectory {call.trajectory_id} was erased.")
        growing = growing_of(row)
        step = step_after(growing, call)
        if any(_moments(one) == _moments(step.llm_calls[0]) for one in segments.load(row).calls()):
            return f"A call of {call.trajectory_id}, which holds it already."
        if row.state == State.SEALED:
            raise Conflict(f"The trajectory {call.trajectory_id} was sealed before this call came in.")
        running.append_steps(project, call.trajectory_id, [step])
    return f"A call of {call.trajectory_id}, as its step {step.index}."


def _moments(call: LlmCallPayload) -> object:
    """When the gateway began and ended the call, to the microsecond: one call of a trajectory."""
    found = call.extra.get("gateway") if isinstance(call.extra, dict) else None
    return (found.get("began"), found.get("ended")) if isinstance(found, dict) else None
