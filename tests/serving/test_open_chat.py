"""On one machine agents may sample without a key, and only the site may change what is served."""

from starlette.testclient import TestClient

from training.trainer.serve import build_app


class _Alive:
    alive = True


class _Server:
    """As much of a server as the doors need."""

    engine = _Alive()

    def cards(self) -> list[object]:
        return []


def client(*, open_chat: bool) -> TestClient:
    return TestClient(build_app(_Server(), ("secret",), open_chat=open_chat))  # type: ignore[arg-type]  # the doors alone


def test_with_open_chat_models_are_listed_without_a_key_and_adapters_are_not_loaded() -> None:
    agent = client(open_chat=True)
    assert agent.get("/v1/models").status_code == 200
    assert agent.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/x"}).status_code == 401
    assert agent.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code == 401


def test_without_it_everything_wants_the_key() -> None:
    agent = client(open_chat=False)
    assert agent.get("/v1/models").status_code == 401
    assert agent.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
