"""PostgreSQL and Valkey from their wheels: started, stopped, killed, found again."""

import pytest
import redis
from django.conf import settings
from django.db import connection


@pytest.mark.django_db
def test_django_and_celery_are_told_where_the_servers_are() -> None:
    assert connection.vendor == "postgresql"
    assert redis.Redis.from_url(settings.REDIS_URL).ping()
