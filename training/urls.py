"""The API of what is made of it. Paths answer with and without the trailing slash."""

from django.urls import URLPattern

urlpatterns: list[URLPattern] = []
