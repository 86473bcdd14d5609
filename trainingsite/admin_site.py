"""The admin as this site shows it."""

from django.contrib.admin import AdminSite


class TrainingsiteAdminSite(AdminSite):
    site_header = "Trainingsite"
    site_title = "Trainingsite"
    index_title = "Record · Judge · Train · Deploy · Operate"
    enable_nav_sidebar = True
