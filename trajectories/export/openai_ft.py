"""OpenAI's fine-tuning file: a conversation a line, with tools and weights, and nothing that its validation refuses."""

from collections.abc import Iterator

from trajectories.export import said
from trajectories.export.pages import Opened


def lines(one: Opened) -> Iterator[dict[str, object]]:
    for conversation in said.learnable(one.payload):
        row: dict[str, object] = {"messages": said.openai(conversation.said, weights=True)}
        if conversation.tools:
            row["tools"] = conversation.tools
        yield row
