"""The life of a version: its moves, what they leave, and what is refused."""

import itertools
from typing import Protocol

import pytest

from tests import builders
from training import model_life
from training.models import ModelStatus, TrainedModel
from trajectories import history
from trajectories.errors import Refused
from trajectories.history import Actor

pytestmark = pytest.mark.django_db


class Move(Protocol):
    def __call__(self, model: TrainedModel, *, by: Actor, reason: str) -> None: ...


ALICE = Actor("alice")


def test_every_move_is_a_row_with_author_and_reason() -> None:
    model = builders.make_model(status="ready")

    model_life.reject(model, by=ALICE, reason="it forgot how to sell")

    (change,) = history.of(model)
    assert (change.was, change.to, change.by_name, change.reason) == (
        "ready", "rejected", "alice", "it forgot how to sell",
    )  # fmt: skip


def test_a_version_serves_retires_and_serves_again() -> None:
    model = builders.make_model(status="ready")

    model_life.deploy(model, by=ALICE)
    model_life.retire(model, by=ALICE)
    model_life.deploy(model, by=ALICE)

    assert model.status == ModelStatus.DEPLOYED


def test_a_rejection_can_be_taken_back() -> None:
    model = builders.make_model(status="rejected")

    model_life.take_back_rejection(model, by=ALICE)

    assert model.status == ModelStatus.READY


@pytest.mark.parametrize("status", ["ready", "retired", "rejected"])
def test_an_archived_version_is_restored_to_where_it_was(status: str) -> None:
    model = builders.make_model(status=status)

    model_life.archive(model, by=ALICE)
    assert model.status == ModelStatus.ARCHIVED
    model_life.restore(model, by=ALICE)

    assert (model.status, model.status_before_archive) == (status, "")


@pytest.mark.parametrize("status", ["training", "deployed", "failed", "archived"])
def test_what_serves_or_is_not_done_cannot_be_archived(status: str) -> None:
    model = builders.make_model(status=status)

    with pytest.raises(Refused, match="so it cannot become archived"):
        model_life.archive(model, by=ALICE)


@pytest.mark.parametrize("move", [model_life.deploy, model_life.retire, model_life.reject])
def test_an_archived_version_does_nothing_but_come_back(move: Move) -> None:
    model = builders.make_model(status="ready")
    model_life.archive(model, by=ALICE)

    with pytest.raises(Refused, match="is archived"):
        move(model, by=ALICE, reason="let it")


def test_only_one_of_two_moves_a_version() -> None:
    first = builders.make_model(status="ready")
    second = TrainedModel.objects.get(pk=first.pk)

    model_life.reject(first, by=ALICE, reason="no")

    with pytest.raises(Refused, match="changed while you were looking"):
        model_life.deploy(second, by=ALICE)


def test_no_move_leads_out_of_the_table() -> None:
    moves = set(itertools.chain.from_iterable(model_life.NEXT.values()))

    assert set(model_life.NEXT) == set(ModelStatus)
    assert moves <= set(ModelStatus)
