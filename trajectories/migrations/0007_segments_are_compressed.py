from django.db import migrations


class Migration(migrations.Migration):
    """PostgreSQL need not try to compress what is compressed already; it tried with each row."""

    dependencies = [("trajectories", "0006_spans")]

    operations = [
        migrations.RunSQL(
            f"alter table {table} alter column data set storage external",
            f"alter table {table} alter column data set storage extended",
        )
        for table in ("trajectory_segments", "shared_texts")
    ]
