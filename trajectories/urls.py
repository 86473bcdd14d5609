"""The API of what agents did. Paths answer with and without the trailing slash."""

from django.urls import URLPattern

urlpatterns: list[URLPattern] = []
