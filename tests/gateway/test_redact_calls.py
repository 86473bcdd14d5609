"""What goes through the gateway passes the project's redaction rules before it reaches the database."""

from tests.gateway.backend import Backend, Reply
from tests.gateway.recorded import calls_of, row_of
from tests.gateway.running import RunningGateway, eventually
from trajectories import indexing, segments
from trajectories.models import LlmCallLog, Project, Trajectory

SECRET = "4111-1111-1111-1111"
RULE = {"name": "card", "pattern": r"\d{4}-\d{4}-\d{4}-\d{4}"}


def test_question_answer_and_their_tokens_are_redacted_and_counted(
    gateway: RunningGateway, backend: Backend, key: str, project: Project
) -> None:
    Project.objects.filter(pk=project.pk).update(redaction_rules=[RULE])
    backend.replies = [Reply(words=["Paid", " with", f" {SECRET}", "."])]
    answer = gateway.client(key, X_Trajectory_Id="t1").chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": f"Pay with {SECRET}"}]
    )

    assert SECRET in str(answer.choices[0].message.content)  # the agent gets what it asked for
    [call] = calls_of(project, "t1")
    assert call.messages == ({"role": "user", "content": "Pay with [redacted: card]"},)
    assert call.response == "Paid with [redacted: card]."
    assert (call.token_ids, call.prompt_token_ids, call.logprobs) == (None, None, None)  # they spell it
    row = row_of(project, "t1")
    assert row.redactions.get(rule="card").count >= 2
    indexing.drain(project)
    kept = b"\n".join(segments.raw_of(one) for one in row.segments.all())
    assert SECRET.encode() not in kept + "".join(map(str, LlmCallLog.objects.filter(trajectory=row).values())).encode()


def test_a_broken_rule_keeps_a_call_out_and_says_so(
    gateway: RunningGateway, backend: Backend, key: str, project: Project
) -> None:
    Project.objects.filter(pk=project.pk).update(redaction_rules=[{"name": "broken", "pattern": "("}])
    aside = gateway.data / "gateway-spool" / "set-aside"
    client = gateway.client(key, X_Trajectory_Id="t1")
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": f"Pay with {SECRET}"}])

    assert eventually(lambda: any("'broken'" in one.read_text() for one in aside.glob("*.why")))
    assert not Trajectory.objects.filter(project=project).exists()
    assert SECRET not in gateway.said()
    assert aside.stat().st_mode & 0o077 == 0
