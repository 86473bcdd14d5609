"""The API of what is made of it. Paths answer with and without the trailing slash."""

from django.urls import URLPattern, path

from training.api import batches, judgments, models, readiness, status

urlpatterns: list[URLPattern] = [
    path("readiness/", readiness.ReadinessView.as_view(), name="readiness"),
    path("status/", status.StatusView.as_view(), name="status"),
    path(
        "trajectories/<str:trajectory_id>/judgments/",
        judgments.TrajectoryJudgments.as_view(),
        name="trajectory-judgments",
    ),
    path("batches/", batches.BatchList.as_view(), name="batches"),
    path("batches/<str:batch_id>/", batches.BatchDetail.as_view(), name="batch"),
    path("batches/<str:batch_id>/cancel/", batches.BatchCancel.as_view(), name="batch-cancel"),
    path("batches/<str:batch_id>/retry/", batches.BatchRetry.as_view(), name="batch-retry"),
    path("batches/<str:batch_id>/data/", batches.BatchData.as_view(), name="batch-data"),
    path("models/", models.ModelList.as_view(), name="models"),
    path("models/<str:version>/", models.ModelDetail.as_view(), name="model"),
]
