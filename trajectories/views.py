"""The view that every endpoint of the API is: one project, the key's."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from rest_framework.views import APIView

from trajectories.history import Actor
from trajectories.models import ApiKey, Project, Scope


class ProjectAPIView(APIView):
    """A view of one project: the key's. `scopes` says which of the key's scopes open each method."""

    scopes: ClassVar[Mapping[str, Sequence[str]]] = {
        "GET": (Scope.READ,),
        "POST": (Scope.INGEST,),
        "PATCH": (Scope.INGEST,),
        "PUT": (Scope.INGEST,),
    }

    @property
    def key(self) -> ApiKey:
        assert isinstance(self.request.auth, ApiKey), "HasScope lets nobody through without a key"
        return self.request.auth

    @property
    def project(self) -> Project:
        return self.key.project

    @property
    def actor(self) -> Actor:
        return Actor.of_key(self.key)
