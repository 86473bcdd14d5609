"""The API's paths answer with and without the trailing slash; a redirect would lose a POST's body."""

from collections.abc import Callable

from django.http import HttpRequest, HttpResponseBase


class ApiSlashMiddleware:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponseBase]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        path = request.path_info
        if path.startswith(("/api/", "/otel/")) and not path.endswith("/"):
            request.path_info = path + "/"
        return self.get_response(request)
