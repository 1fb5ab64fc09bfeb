from django.contrib import admin
from django.urls import path, register_converter

from hooks.paths import HookPathConverter
from hooks.views import HookView
from openclaw_site.late import late_view
from wake.views import console

admin.autodiscover()
register_converter(HookPathConverter, "hook_path")

urlpatterns = [
    path("", console, name="console"),
    path("admin/", admin.site.urls),
    path("api/", late_view("hooks.schema.DescriptionPage"), name="api"),
    path("api/schema/", late_view("hooks.schema.DescriptionView"), name="schema"),
    # Last, because its base path is a setting: nothing that an operator types hides another page.
    path("<hook_path:path>", HookView.as_view(), name="hook"),
]
