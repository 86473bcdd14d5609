"""Records what an agent does and sends it to Trainingsite; reads from it in notebooks. See README.md."""

from .client import AsyncClient, Client
from .courier import Counts, Limits
from .problems import ApiError, Conflict, Gone, Invalid, NotAllowed, NotFound, Refused, Unavailable
from .recording import Recorder
from .step import Step
from .trajectory import FinalStatus, Trajectory

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "Conflict",
    "Counts",
    "FinalStatus",
    "Gone",
    "Invalid",
    "Limits",
    "NotAllowed",
    "NotFound",
    "Recorder",
    "Refused",
    "Step",
    "Trajectory",
    "Unavailable",
]
