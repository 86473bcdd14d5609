"""Are we ready, and if not, why and when."""

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from training import readiness
from training.models import Mode
from trajectories.errors import Invalid
from trajectories.views import ProjectAPIView


class ReadinessView(ProjectAPIView):
    @extend_schema(parameters=[OpenApiParameter("mode", str, enum=Mode.values)], responses=OpenApiTypes.OBJECT)
    def get(self, request: Request) -> Response:
        asked = request.query_params.get("mode")
        if asked is not None and asked not in Mode.values:
            raise Invalid(f"mode is {asked[:20]!r}. There are: {', '.join(Mode.values)}.")
        return Response(readiness.check(self.project, Mode(asked) if asked else None).body())
