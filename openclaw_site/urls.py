from django.contrib import admin
from django.urls import path, register_converter

from hooks.paths import HookPathConverter
from hooks.schema import DescriptionPage, DescriptionView
from hooks.views import HookView
from wake.views import console

admin.autodiscover()
register_converter(HookPathConverter, "hook_path")

urlpatterns = [
    path("", console, name="console"),
    path("admin/", admin.site.urls),
    path("api/", DescriptionPage.as_view(), name="api"),
    path("api/schema/", DescriptionView.as_view(), name="schema"),
    # Last, because its base path is a setting: nothing that an operator types hides another page.
    path("<hook_path:path>", HookView.as_view(), name="hook"),
]
