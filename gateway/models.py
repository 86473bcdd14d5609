"""How far each gateway's spool has been taken into the database."""

from django.db import models
from django.db.models.functions import Now


class SpoolPosition(models.Model):
    """One gateway's spool. Moved in the transaction that writes the recordings, so each is taken exactly once."""

    spool = models.CharField(max_length=32, unique=True, help_text="the id in the spool's folder")
    segment = models.BigIntegerField(default=0, help_text="number of the file that is being read")
    offset = models.BigIntegerField(default=0, help_text="bytes of it that are done")
    unrecorded = models.BigIntegerField(default=0, help_text="calls that were served without a recording, ever")
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    moved_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "gateway_spools"

    def __str__(self) -> str:
        return f"spool {self.spool}"
