"""The demo: the whole loop on real input, played by the site's own HTTP API and the model server's.

1. Scripted agents answer at random; their runs are imitated (mode `sft`): v1.0.0 knows the form, nothing more.
2. Agents sample from the version they are given; the runs are recorded and trained with GRPO into the next version,
   which is evaluated against the serving one on scenarios kept apart; the gate says yes or no.
3. A placebo, trained the same way on rewards shuffled inside each group, meets the same gate.
4. A ceiling to compare with: plain imitation of the true answers.
5. A table, and the last good version waits for a person.

Nothing here reaches into the database: what the demo does, any agent and any researcher could do by HTTP.
"""

import gzip
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from training import demo_task
from training.demo_task import HELD_OUT, LETTERS, Kind, Task
from training.demo_wire import (
    BatchAnswer,
    BulkAnswer,
    Completion,
    DemoStopped,
    DeploymentAnswer,
    EvaluationAnswer,
    ModelEndpoint,
    Nothing,
    Refusal,
    RouteAnswer,
    Site,
    WorkAnswer,
    WorkRow,
)

Say = Callable[[str], None]
Message = dict[str, object]

RESAMPLES = 2000
POLL_SECONDS = 1.0
BULK_LINES = 500


@dataclass(frozen=True)
class Recipe:
    """How much of everything, and how to learn; where the numbers come from is in docs/demo.md."""

    base_model: str = "tiny"
    group_size: int = 8
    groups: int = 256  # a version: about 2,000 trajectories
    warm_groups: int = 128
    versions: int = 3
    evaluation_scenarios: int = 48  # of each held-out set
    evaluation_attempts: int = 4  # a side at each
    last_round_groups: int = 64  # played once more after the approval
    temperature: float = 1.0
    max_tokens: int = 8
    concurrency: int = 6
    seed: int = 0
    warm: dict[str, object] = field(default_factory=dict)  # hyperparameters (training/trainer/job.py)
    grpo: dict[str, object] = field(default_factory=dict)
    ceiling: dict[str, object] = field(default_factory=dict)


@dataclass
class Attempts:
    """Rewards of one player, by held-out set and scenario."""

    rewards: dict[Kind, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def add(self, task: Task, reward: float) -> None:
        self.rewards[task.kind][task.scenario_id].append(reward)

    def cell(self, kind: Kind) -> str:
        """Mean reward, its 95 % interval resampled by scenario, and how many attempts: "0.81 [0.75, 0.86] n=192"."""
        scenarios = list(self.rewards[kind].values())
        if not scenarios:
            return "not measured"
        means = [statistics.fmean(attempts) for attempts in scenarios]
        low, high = interval(means)
        return f"{statistics.fmean(means):.2f} [{low:.2f}, {high:.2f}] n={sum(len(one) for one in scenarios)}"


def interval(means: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the mean over `RESAMPLES` resamples with replacement (percentile bootstrap)."""
    draw = random.Random(seed)
    drawn = sorted(statistics.fmean(draw.choices(means, k=len(means))) for _ in range(RESAMPLES))
    return drawn[int(0.025 * RESAMPLES)], drawn[int(0.975 * RESAMPLES) - 1]


class Demo:
    """One run of the story. `say` gets a line at a time."""

    def __init__(self, site: Site, recipe: Recipe, say: Say, *, run: str) -> None:
        self.site = site
        self.recipe = recipe
        self.say = say
        self.run = run
        self.models = ModelEndpoint(recipe.concurrency)
        self.table: dict[str, Attempts] = {}
        self.notes: dict[str, str] = {}
        self.tasks: dict[str, Task] = {
            task.scenario_id: task
            for kind in HELD_OUT
            for task in demo_task.scenarios(kind, recipe.evaluation_scenarios, recipe.seed)
        }
        self.started = time.monotonic()

    # --- the story ------------------------------------------------------------------------------------------------

    def play(self, *, approve: bool, wait_seconds: float, told: Callable[[], None]) -> None:
        """All five acts. `told` is called when only a person's decision is left.

        Raises:
            DemoStopped: the site or the model server refused something that the story needs.
        """
        self.keep_scenarios_apart()
        self.measure_chance()
        self.warm_start()
        waiting: DeploymentAnswer | None = None
        for number in range(1, self.recipe.versions + 1):
            last = number == self.recipe.versions
            deployment = self.next_version(number, decide=not last)
            if number == 1:
                self.placebo()
            if last:
                waiting = deployment
        self.ceiling()
        self.print_table()
        told()
        self.finish(waiting, approve=approve, wait_seconds=wait_seconds)

    def keep_scenarios_apart(self) -> None:
        for task in self.tasks.values():
            body = scenario_of(task, split="held_out")
            self.site.put(f"/scenarios/{body.pop('id')}/", Nothing, body)
        self.say(
            f"{len(self.tasks)} scenarios are kept apart for evaluation: "
            "(a) new companies, (b) new pairs of known phrases, (c) new phrases."
        )

    def measure_chance(self) -> None:
        draw = random.Random(self.recipe.seed)
        chance = self.table["chance (random words)"] = Attempts()
        for task in self.tasks.values():
            for _ in range(self.recipe.evaluation_attempts):
                chance.add(task, demo_task.reward(task, draw.choice(demo_task.ANSWERS)))

    def warm_start(self) -> None:
        """Scripted agents answer at random; imitating them teaches the form of an answer."""
        draw = random.Random(self.recipe.seed)
        tasks = demo_task.scenarios("train", self.recipe.warm_groups, seed=self.recipe.seed)
        lines = [
            self.scripted(task, "coin", attempt, draw.choice(demo_task.ANSWERS), of=self.recipe.group_size)
            for task in tasks
            for attempt in range(self.recipe.group_size)
        ]
        self.record(lines)
        self.act(f"warm start: {len(lines)} runs of scripted agents that answer at random, imitated")
        version = self.train("sft", "warm start", self.recipe.warm, behaviour="foreign:coin")
        self.evaluate(version, "warm start")
        self.decide(self.request(version, "The warm start: it knows the form of an answer."), "the form is learned")

    def next_version(self, number: int, *, decide: bool) -> DeploymentAnswer | None:
        """Agents play, GRPO learns, the gate looks. None when the gate refused."""
        self.act(f"version {number}: agents play")
        mean = self.play_round(f"r{number}", seed=number)
        self.say(f"  mean reward of {self.recipe.groups * self.recipe.group_size} recorded runs: {mean:.2f}")
        version = self.train("grpo", f"round {number}", self.recipe.grpo, behaviour=self.serving())
        self.evaluate(version, version)
        deployment = self.request(version, f"Round {number} of the demo.")
        if self.refused(deployment):
            self.turn_down(deployment)
            return None
        if decide:
            self.decide(deployment, "better on the scenarios kept apart")
        return deployment

    def placebo(self) -> None:
        """The same amount of data and training, but rewards that mean nothing. The gate must say no."""
        self.act("placebo: the same training on rewards shuffled inside each group")
        self.play_round("placebo", seed=1000)
        version = self.train("grpo", "placebo", self.recipe.grpo, behaviour=self.serving(), shuffle_rewards=True)
        self.evaluate(version, f"{version} (placebo)")
        deployment = self.request(version, "A placebo: trained on shuffled rewards. It should be refused.")
        if not self.refused(deployment):
            raise DemoStopped(f"The gate let the placebo {version} through. That must not be; look at its evaluation.")
        self.turn_down(deployment)

    def ceiling(self) -> None:
        self.act("ceiling: imitation of the true answers, to compare with")
        tasks = demo_task.scenarios("train", self.recipe.groups, seed=self.recipe.seed + 77)
        self.record(
            [self.scripted(task, "oracle", attempt, task.answer, of=2) for task in tasks for attempt in range(2)]
        )
        version = self.train("sft", "ceiling", self.recipe.ceiling, behaviour="foreign:oracle", from_base=True)
        self.evaluate(version, f"{version} (true labels, ceiling)")

    def finish(self, waiting: DeploymentAnswer | None, *, approve: bool, wait_seconds: float) -> None:
        if waiting is None:
            self.say(f"\nThe last version was refused; agents stay on {self.serving()}, the last good one.")
            return
        if approve:
            self.decide(waiting, "approved by --approve")
        else:
            self.say(
                f"\n{waiting.version} waits for you: {self.site.url}/admin/training/deployment/{waiting.id}/change/"
            )
            self.say("Sign in as the approver, read the evidence, approve or reject.")
            if not self.wait_for_decision(waiting, wait_seconds):
                return
        self.act(f"agents are given {self.serving()} and play once more")
        mean = self.play_round("after", seed=2000, groups=self.recipe.last_round_groups)
        self.say(f"  mean reward now: {mean:.2f}")

    # --- acting and recording -------------------------------------------------------------------------------------

    def route(self) -> RouteAnswer:
        return self.site.get("/agents/demo-agent/model/", RouteAnswer, who="agents")

    def serving(self) -> str:
        return self.route().version or "the base"

    def play_round(self, name: str, *, seed: int, groups: int = 0) -> float:
        """Agents sample whole groups from the version they are given; every run is recorded. Mean reward."""
        route = self.route()
        tasks = demo_task.scenarios("train", groups or self.recipe.groups, seed=self.recipe.seed * 10_000 + seed)

        def one(task: Task) -> list[Message]:
            completion = self.sample(route.base_url, route.model, task, self.recipe.group_size, seed)
            return self.recorded(task, completion, name, route.version)

        with ThreadPoolExecutor(self.recipe.concurrency) as pool:
            lines = [line for group in pool.map(one, tasks) for line in group]
        self.record(lines)
        return statistics.fmean(reward for line in lines if isinstance(reward := line["reward"], float))

    def sample(self, base_url: str, model: str, task: Task, n: int, seed: int) -> Completion:
        return self.models.sample(
            base_url,
            model,
            demo_task.messages(task),
            n=n,
            temperature=self.recipe.temperature,
            max_tokens=self.recipe.max_tokens,
            seed=random.Random(f"{self.recipe.seed}:{seed}:{task.scenario_id}").randrange(2**31),
        )

    def recorded(
        self, task: Task, completion: Completion, name: str, version: str | None, *, evaluation: str = ""
    ) -> list[Message]:
        """Each answer as a trajectory in the `messages` format, with token ids and log-probabilities."""
        lines = []
        for choice in completion.choices:
            answer = choice.message.content or ""
            line = self.envelope(task, f"{name}-{choice.index}", answer)
            spoken: Message = {
                "model": completion.model,
                "finish_reason": choice.finish_reason,
                "temperature": self.recipe.temperature,
                "max_tokens": self.recipe.max_tokens,
                "logprobs_mode": "processed",
                "prompt_token_ids": completion.prompt_token_ids,
                "token_ids": choice.token_ids,
                "prompt_tokens": len(completion.prompt_token_ids or ()),
                "completion_tokens": len(choice.token_ids or ()),
                "logprobs": [token.logprob for token in choice.logprobs.content] if choice.logprobs else None,
            }
            if version:
                spoken["model_version"] = line["policy_version"] = version
            line["completions"] = [None, spoken]
            if evaluation:
                line["evaluation_id"], line["is_evaluation"] = evaluation, True
            else:
                line["group_size"] = self.recipe.group_size
            lines.append(line)
        return lines

    def scripted(self, task: Task, who: str, attempt: int, answer: str, *, of: int) -> Message:
        """A run of a program that is no model of this project, one of a group of `of`."""
        line = self.envelope(task, f"{who}-{attempt}", answer)
        line["group_size"] = of
        line["completions"] = [None, {"model": who, "finish_reason": "stop"}]
        return line

    def envelope(self, task: Task, name: str, answer: str) -> Message:
        now = datetime.now(UTC).isoformat()
        return {
            "trajectory_id": f"{self.run}-{name}-{task.scenario_id}",
            "agent_id": "demo-agent",
            "scenario": scenario_of(task, split="train" if task.kind == "train" else "held_out"),
            "started_at": now,
            "ended_at": now,
            "messages": [*demo_task.messages(task), {"role": "assistant", "content": answer}],
            "tools": demo_task.TOOLS,
            "final_status": "completed",
            "reward": demo_task.reward(task, answer),
        }

    def record(self, lines: Iterable[Message]) -> None:
        pending = list(lines)
        for start in range(0, len(pending), BULK_LINES):
            chunk = pending[start : start + BULK_LINES]
            body = gzip.compress(b"\n".join(msgspec.json.encode(line) for line in chunk), 1)
            answer = self.site.post_lines("/trajectories/bulk/?format=messages", BulkAnswer, body)
            if answer.errors:
                first = answer.errors[0]
                what = f"{len(answer.errors)} of {len(chunk)} runs were not recorded"
                raise DemoStopped(f"{what}; {first.trajectory_id}: {first.detail}")

    # --- training, evaluating, deciding ---------------------------------------------------------------------------

    def train(
        self,
        mode: str,
        purpose: str,
        hyperparameters: dict[str, object],
        *,
        behaviour: str,
        shuffle_rewards: bool = False,
        from_base: bool = False,
    ) -> str:
        """Trigger a batch and wait for its version."""
        body: Message = {
            "mode": mode,
            "force": True,
            "purpose": purpose,
            "behaviour": behaviour,
            "shuffle_rewards": shuffle_rewards,
            "hyperparameters": hyperparameters,
            "seed": self.recipe.seed,
        }
        if from_base:
            body["parent"] = None  # else the version that serves
        batch = self.site.post("/batches/", BatchAnswer, body)
        began, told = time.monotonic(), ""
        while batch.status not in ("completed", "failed", "cancelled"):
            time.sleep(POLL_SECONDS)
            batch = self.site.get(f"/batches/{batch.batch_id}/", BatchAnswer)
            eta = f", {batch.eta_seconds:.0f} s to go" if batch.eta_seconds is not None else ""
            now = f"{batch.status}, {batch.progress:.0%}{eta}" if batch.status == "training" else batch.status
            if now.split(",")[0] != told:
                self.say(f"  {now} ({batch.trajectories} runs in {batch.groups} groups)")
                told = now.split(",")[0]
        if batch.status != "completed" or batch.model_version is None:
            raise DemoStopped(f"The {purpose} batch is {batch.status}: {batch.error or 'no reason given'}")
        self.say(f"  {batch.model_version} is made, in {time.monotonic() - began:.0f} s")
        return batch.model_version

    def evaluate(self, version: str, row: str) -> None:
        """Both sides play every scenario kept apart; the table gets what the candidate did."""
        evaluation = self.site.post(
            "/evaluations/", EvaluationAnswer, {"version": version, "attempts": self.recipe.evaluation_attempts}
        )
        mine = self.table[row] = Attempts()
        while work := self.site.get(f"/evaluations/{evaluation.evaluation_id}/work/?limit=500", WorkAnswer).results:
            with ThreadPoolExecutor(self.recipe.concurrency) as pool:
                done = list(pool.map(lambda item: self.answer_work(evaluation.evaluation_id, item), work))
            for item, lines in zip(work, done, strict=True):
                for line in lines:
                    if item.side == "candidate" and isinstance(reward := line["reward"], float):
                        mine.add(self.tasks[item.scenario_id], reward)
            self.record(line for lines in done for line in lines)
        while evaluation.state not in ("done", "failed"):
            time.sleep(POLL_SECONDS)
            evaluation = self.site.get(f"/evaluations/{evaluation.evaluation_id}/", EvaluationAnswer)
        if evaluation.state == "failed":
            raise DemoStopped(f"The evaluation of {version} failed: {evaluation.error}")
        self.say(f"  evaluation: {evaluation.sentence}")

    def answer_work(self, evaluation_id: str, item: WorkRow) -> list[Message]:
        task = self.tasks[item.scenario_id]
        completion = self.sample(item.base_url, item.model, task, item.n, seed=5000 + (item.side == "candidate"))
        name = f"{evaluation_id[:8]}-{item.side}"
        return self.recorded(task, completion, name, item.version, evaluation=evaluation_id)

    def request(self, version: str, reason: str) -> DeploymentAnswer:
        body = {"version": version, "strategy": "immediate", "reason": reason}
        return self.site.post("/deployments/", DeploymentAnswer, body)

    @staticmethod
    def refused(deployment: DeploymentAnswer) -> bool:
        return any(not gate.ok for gate in deployment.gates)

    def decide(self, deployment: DeploymentAnswer, reason: str) -> None:
        """The demo's second person approves; the rollout is waited for."""
        self.site.post(f"/deployments/{deployment.id}/approve/", Nothing, {"reason": reason}, who="approver")
        while deployment.state not in ("active", "failed", "rolled_back"):
            time.sleep(POLL_SECONDS / 2)
            deployment = self.site.get(f"/deployments/{deployment.id}/", DeploymentAnswer)
        if deployment.state != "active":
            raise DemoStopped(
                f"{deployment.version} was approved, but its rollout is {deployment.state}: {deployment.error}"
            )
        self.say(f"  {deployment.version} serves: {reason}")

    def turn_down(self, deployment: DeploymentAnswer) -> None:
        """Try the approval, so that the gate answers in its own words; then reject."""
        try:
            self.site.post(
                f"/deployments/{deployment.id}/approve/", Nothing, {"reason": "let it through"}, who="approver"
            )
        except Refusal as refusal:
            self.say(f"  {refusal}")
        else:
            raise DemoStopped(f"{deployment.version} was approved although a gate is not met.")
        reason = "; ".join(gate.detail for gate in deployment.gates if not gate.ok)
        self.site.post(f"/deployments/{deployment.id}/reject/", Nothing, {"reason": reason}, who="approver")
        self.say(f"  agents stay on {self.serving()}")

    def wait_for_decision(self, deployment: DeploymentAnswer, seconds: float) -> bool:
        """True once it serves; False when it was turned down or nobody came."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            deployment = self.site.get(f"/deployments/{deployment.id}/", DeploymentAnswer)
            if deployment.state == "active":
                self.say(f"  {deployment.version} was approved and serves.")
                return True
            if deployment.state in ("rejected", "withdrawn", "failed", "rolled_back", "superseded"):
                self.say(f"  {deployment.version} is {deployment.state}; agents stay on {self.serving()}.")
                return False
            time.sleep(2 * POLL_SECONDS)
        return False

    # --- telling --------------------------------------------------------------------------------------------------

    def act(self, line: str) -> None:
        self.say(f"\n[{time.monotonic() - self.started:4.0f} s] {line}")

    def print_table(self) -> None:
        heads = {
            "new_companies": "(a) new companies",
            "new_pairs": "(b) new pairs of known phrases",
            "new_phrases": "(c) new phrases",
        }
        self.act("mean reward on scenarios kept apart, sampled at the playing temperature, 95 % interval by scenario")
        width = max(len(name) for name in self.table) + 2
        self.say("  " + " " * width + "".join(f"{heads[kind]:<34}" for kind in HELD_OUT))
        for name, attempts in self.table.items():
            self.say("  " + f"{name:<{width}}" + "".join(f"{attempts.cell(kind):<34}" for kind in HELD_OUT))
        self.say("  (a) and (b) are expected to rise; (c) is shown because it does not have to.")

    def close(self) -> None:
        self.models.close()


def scenario_of(task: Task, *, split: str) -> Message:
    return {
        "id": task.scenario_id,
        "description": task.description,
        "split": split,
        "metadata": {"set": LETTERS[task.kind] or "train", "private": {"answer": task.answer}},
    }
