"""gateway: the OpenAI-compatible recording proxy, until it is told to stop."""

import asyncio
import logging

import uvicorn
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from gateway.app import Gateway
from gateway.spool import SpoolTaken

GOODBYE_SECONDS = 4  # for answers under way; then they are recorded as far as they came


class Command(BaseCommand):
    help = "Serve the gateway on GATEWAY_PORT: OpenAI's wire, recorded."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=int, default=settings.GATEWAY_PORT)

    def handle(self, *args: object, **options: object) -> None:
        try:
            gateway = Gateway()
        except SpoolTaken as exc:
            raise CommandError(str(exc)) from exc
        except OSError as exc:
            raise CommandError(f"{settings.GATEWAY_SPOOL_DIR} cannot be used: {exc.strerror}.") from exc
        asyncio.run(serve(gateway, str(options["host"]), int(str(options["port"]))))


async def serve(gateway: Gateway, host: str, port: int) -> None:
    config = uvicorn.Config(
        gateway,
        host=host,
        port=port,
        log_level=logging.WARNING,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GOODBYE_SECONDS,
    )
    try:
        await uvicorn.Server(config).serve()
    finally:
        await gateway.close()
