from django.contrib import admin
from django.urls import path, register_converter
from django.views.generic import RedirectView

from hooks.paths import HookPathConverter
from hooks.schema import DescriptionPage, DescriptionView
from hooks.views import HookView

admin.autodiscover()
register_converter(HookPathConverter, "hook_path")

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:index")),
    path("admin/", admin.site.urls),
    path("api/", DescriptionPage.as_view(), name="api"),
    path("api/schema/", DescriptionView.as_view(), name="schema"),
    # Last, because its base path is a setting: nothing that an operator types hides another page.
    path("<hook_path:path>", HookView.as_view(), name="hook"),
]
