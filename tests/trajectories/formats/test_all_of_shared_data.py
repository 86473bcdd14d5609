"""All recordings of ../shared/data go in, with the counts that the raw JSON has; a second time all are there already.

The numbers were counted from the files themselves, by rules of a few lines a format that share no code with the
readers: rows or samples; answers of a model (assistant messages, `Choice`s, generations, turns); entries of
`tool_calls` or items of a call's kind; the rewards that are numbers; tokens of `usage`, once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from django.db.models import Count, Q, Sum

from tests import builders
from tests.trajectories import recordings
from trajectories import importing, indexing
from trajectories.models import LlmCallLog, Project, Trajectory

pytestmark = [pytest.mark.django_db, pytest.mark.slow, recordings.needs_data]

SPANS = ("otlp", "jaeger", "otel_spans_flat", "openinference_otlp_span")  # not whole trajectories: tests/otlp


class Told(NamedTuple):
    file: str
    format: str  # "" where nothing is read: the file is none of a format, and says so
    trajectories: int
    calls: int
    tool_calls: int
    reward: float  # sum of those that are known
    unknown: int
    prompt_tokens: int
    completion_tokens: int
    failed: int


FILES = [
    Told("atif/harbor_openhands.json", "atif", 1, 2, 2, 0.0, 1, 220, 80, 0),
    Told("atif/harbor_terminus2_sub_answers.json", "atif", 1, 1, 0, 0.0, 1, 700, 120, 0),
    Told("atif/harbor_terminus2_sub_questions.json", "atif", 1, 1, 0, 0.0, 1, 100, 20, 0),
    Told("atif/harbor_terminus2_sub_summary.json", "atif", 1, 1, 0, 0.0, 1, 500, 200, 0),
    Told("atif/harbor_terminus2_summarization.json", "atif", 1, 7, 7, 0.0, 1, 6502, 690, 0),
    Told("atif/multimodal_trajectory.json", "atif", 1, 2, 1, 0.0, 1, 2600, 125, 0),
    Told("atif/parallel_tools_mixed_results.json", "atif", 1, 2, 3, 0.0, 1, 1200, 105, 0),
    Told("atif/subagent_trajectories.json", "atif", 2, 3, 1, 0.0, 2, 2600, 210, 0),
    Told("inspect/2025-05-12T20-27-36-04-00_browser.json.gz", "inspect", 1, 5, 4, 1.0, 0, 15235, 281, 0),
    Told("inspect/2025-05-12T20-28-26-04-00_security-guide.json", "inspect", 3, 6, 0, 3.0, 0, 959, 1033, 0),
    Told("inspect/docent_intercode-ctf_gpt-4o.eval", "inspect", 15, 147, 121, 9.0, 0, 395844, 30038, 0),
    Told("inspect/log_images_tc.json", "inspect", 1, 1, 0, 0.0, 0, 323, 5, 0),
    Told("inspect/log_message_deduplication.eval", "inspect", 1, 6, 5, 0.0, 0, 0, 0, 0),
    Told("inspect/log_tool_call_error.json", "inspect", 1, 0, 0, 0.0, 1, 0, 0, 0),
    Told(
        "intercode_bash_fs3/ic_bash_multiturn_chat-bison-001_10_turns_fs_3.json.gz",
        "intercode",
        60,
        240,
        0,
        44.53,
        0,
        0,
        0,
        0,
    ),
    Told(
        "intercode_bash_fs3/ic_bash_multiturn_gpt-3.5_10_turns_fs_3.json.gz", "intercode", 60, 366, 0, 51.35, 0, 0, 0, 0
    ),
    Told(
        "intercode_bash_fs3/ic_bash_multiturn_gpt-4_10_turns_fs_3.json.gz", "intercode", 60, 334, 0, 51.51, 0, 0, 0, 0
    ),
    Told(
        "intercode_bash_fs3/ic_bash_multiturn_starchat_10_turns_fs_3.json.gz",
        "intercode",
        60,
        500,
        0,
        45.74,
        0,
        0,
        0,
        0,
    ),
    Told(
        "intercode_bash_fs3/ic_bash_multiturn_text-bison-001_10_turns_fs_3.json.gz",
        "intercode",
        60,
        514,
        0,
        45.17,
        0,
        0,
        0,
        0,
    ),
    Told(
        "intercode_bash_fs3/ic_bash_multiturn_text-davinci-003_10_turns_fs_3.json.gz",
        "intercode",
        59,
        423,
        0,
        47.13,
        0,
        0,
        0,
        0,
    ),
    Told(
        "intercode_bash_fs3/ic_bash_multiturn_vicuna_10_turns_fs_3.json.gz", "intercode", 60, 471, 0, 45.18, 0, 0, 0, 0
    ),
    Told("intercode_bash_fs3/ic_bash_plan_solve_fs_3.json.gz", "intercode", 60, 418, 0, 51.23, 0, 0, 0, 0),
    Told("intercode_bash_fs3/ic_bash_react_10_turns_fs_3.json.gz", "intercode", 60, 192, 0, 42.65, 0, 0, 0, 0),
    Told("langfuse/agno-2025-06-11.trace.json", "langfuse", 1, 2, 1, 0.0, 1, 826, 245, 0),
    Told("langfuse/claude-agent-2025-12-22.trace.json", "langfuse", 1, 4, 2, 0.0, 1, 34, 232, 0),
    Told("langfuse/google-adk-2025-08-28.trace.json", "langfuse", 1, 2, 1, 0.0, 1, 67, 9, 0),
    Told("langfuse/langgraph-js-2025-10-30.trace.json", "langfuse", 1, 2, 1, 0.0, 1, 321, 123, 0),
    Told("langfuse/pydantic-ai-tools-2025-12-04.trace.json", "langfuse", 1, 4, 4, 0.0, 1, 1315, 209, 0),
    Told("langfuse/vercel-aisdk-2025-11-17.trace.json", "langfuse", 1, 1, 1, 0.0, 1, 62, 85, 0),
    Told("langsmith/anthropic_managed_mcp_tools.jsonl", "", 0, 0, 0, 0.0, 0, 0, 0, 22),
    Told("langsmith/langsmith_js_wrap_openai_reasoning.json", "langsmith", 1, 1, 0, 0.0, 1, 43, 1901, 0),
    Told("langsmith/langsmith_py_wrap_openai_stream.json", "langsmith", 1, 1, 0, 0.0, 1, 9, 9, 0),
    Told("llm_calls/image_2.7MB_data-url_openai-chat.jsonl.gz", "llm-calls", 1, 1, 0, 0.0, 1, 1119, 10, 0),
    Told("llm_calls/images_data-url_openai-chat.jsonl.gz", "llm-calls", 4, 4, 2, 0.0, 4, 1519, 497, 0),
    Told("llm_calls/logprobs_gemini_openai-responses.jsonl", "llm-calls", 5, 5, 0, 0.0, 5, 51, 26, 0),
    Told("mini_swe_agent/github_issue.traj.json", "mini-swe-agent", 1, 10, 0, 0.0, 1, 0, 0, 0),
    Told("mini_swe_agent/local.traj.json", "mini-swe-agent", 1, 2, 0, 0.0, 1, 0, 0, 0),
    Told("nemo_gym/anyswe_pi.rollouts.jsonl.gz", "nemo-gym", 5, 25, 20, 4.0, 0, 86929, 4186, 0),
    Told("nemo_gym/blackjack.rollouts.jsonl", "nemo-gym", 5, 7, 0, 1.0, 0, 769, 56, 0),
    Told("nemo_gym/blackjack_reward-null.rollouts.jsonl", "nemo-gym", 5, 0, 0, 0.0, 5, 0, 0, 0),
    Told("nemo_gym/browsecomp_placeholder.rollouts.jsonl", "", 0, 0, 0, 0.0, 0, 0, 0, 5),
    Told("nemo_gym/circle_click.rollouts.jsonl", "nemo-gym", 5, 5, 5, 2.0, 0, 12888, 324, 0),
    Told("nemo_gym/competitive_coding_challenges.rollouts.jsonl.gz", "nemo-gym", 5, 5, 0, 0.0, 0, 545, 5023, 0),
    Told(
        "nemo_gym/conversational_tool_use_simulation.rollouts.jsonl.gz", "nemo-gym", 5, 34, 14, 2.0, 0, 190826, 15546, 0
    ),
    Told("nemo_gym/example_tool_call_multireward.rollouts.jsonl", "nemo-gym", 5, 10, 5, 10.0, 0, 3813, 1894, 0),
    Told("nemo_gym/grl_sokoban.rollouts.jsonl", "nemo-gym", 5, 90, 0, 2.0, 0, 109259, 720, 0),
    Told("nemo_gym/longmt_eval.rollouts.jsonl.gz", "nemo-gym", 5, 5, 0, 3.481306, 0, 24852, 22359, 0),
    Told("nemo_gym/multichallenge_inputs-only.rollouts.jsonl", "nemo-gym", 5, 0, 0, 0.0, 5, 0, 0, 0),
    Told("nemo_gym/openair_congestion.rollouts.jsonl", "nemo-gym", 5, 5, 5, -5.27975, 0, 0, 0, 0),
    Told("nemo_gym/tales.rollouts.jsonl", "nemo-gym", 5, 91, 0, -99.0, 0, 54456, 522, 0),
    Told("reflexion_hotpotqa/react-base_100-questions_5-trials.jsonl.gz", "reflexion", 512, 1867, 0, 170.0, 0, 0, 0, 0),
    Told("tau2_bench/49b22f0c-4a56-41c5-922f-bc2a56e53a23.json.gz", "tau2-bench", 1, 0, 0, 0.0, 1, 0, 0, 0),
    Told("tau_bench/gpt-4o-airline.tasks-00-24.json.gz", "tau-bench", 100, 1381, 621, 31.0, 0, 0, 0, 0),
    Told("tgi/test_bloom_560m_load.json", "", 0, 0, 0, 0.0, 0, 0, 0, 1),
    Told("tgi/test_flash_gemma3.json", "", 0, 0, 0, 0.0, 0, 0, 0, 1),
    Told("tgi/test_flash_llama_completion_many_prompts_stream.json", "", 0, 0, 0, 0.0, 0, 0, 0, 1),
    Told("tgi/test_flash_llama_grammar_tools_openai.json", "", 0, 0, 0, 0.0, 0, 0, 0, 1),
    Told("tgi/test_flash_llama_simple.json", "", 0, 0, 0, 0.0, 0, 0, 0, 1),
    Told("verifiers/arc-agi-3--gpt-4.1-mini.1c109c41/results.jsonl", "verifiers", 3, 255, 0, 0.0, 0, 0, 0, 0),
    Told("verifiers/math-python--gpt-4.1-mini.578769a7/results.jsonl", "verifiers", 15, 45, 30, 14.0, 0, 0, 0, 0),
    Told("verifiers/mcp-env--gpt-4.1-mini.fdac998f/results.jsonl", "verifiers", 3, 6, 3, 3.0, 0, 0, 0, 0),
    Told("verifiers/wordle--gpt-5-mini.b5161fc3/results.jsonl", "", 0, 0, 0, 0.0, 0, 0, 0, 1),
]
READ = [one for one in FILES if one.trajectories]


def found(project: Project, report: importing.Report, told: Told) -> Told:
    """What the file, just imported, added to the database."""
    indexing.drain(project)
    rows = Trajectory.objects.filter(project=project)
    sums = rows.aggregate(
        rows=Count("pk"),
        known=Sum("reward"),
        unknown=Count("pk", filter=Q(reward=None)),
        prompt=Sum("prompt_tokens"),
        completion=Sum("completion_tokens"),
    )
    formats = set(rows.values_list("source_format", flat=True))
    assert LlmCallLog.objects.filter(trajectory__project=project).count() == report.llm_calls
    return Told(
        told.file,
        formats.pop() if formats else "",
        sums["rows"],
        report.llm_calls,
        report.tool_calls,
        round(sums["known"] or 0, 6),
        sums["unknown"],
        sums["prompt"] or 0,
        sums["completion"] or 0,
        report.failed,
    )


@pytest.mark.parametrize("told", FILES, ids=lambda told: told.file.split(".")[0][-50:])
def test_a_recorded_file_goes_in_with_its_own_counts_and_only_once(told: Told) -> None:
    project = builders.make_project("here", held_out_share=0.0)
    report = importing.Report()
    importing.load(project, recordings.DATA / told.file, report)

    assert found(project, report, told) == told
    assert report.replayed == 0

    again = importing.Report()
    importing.load(project, recordings.DATA / told.file, again)
    assert (again.trajectories, again.replayed, again.failed) == (0, told.trajectories, told.failed)
    assert Trajectory.objects.filter(project=project).count() == told.trajectories


def test_the_table_has_every_file_but_those_of_spans() -> None:
    assert [one.file for one in FILES] == list(names())


def names() -> Iterator[str]:
    for path in importing.found([recordings.DATA]):
        name = path.relative_to(recordings.DATA)
        if name.parts[0] not in SPANS:
            yield str(name)


def test_all_in_one_project_hinder_each_other_nowhere() -> None:
    """Ids of one file are those of no other: nothing is taken for a replay or refused as a conflict."""
    project = builders.make_project("here", held_out_share=0.0)
    report = importing.Report()
    for told in READ:
        importing.load(project, recordings.DATA / told.file, report)

    assert report.replayed == 0
    assert (report.trajectories, report.llm_calls, report.tool_calls) == (
        sum(told.trajectories for told in READ),
        sum(told.calls for told in READ),
        sum(told.tool_calls for told in READ),
    )
