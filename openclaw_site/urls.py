from django.contrib import admin
from django.urls import path, register_converter
from django.views.generic import RedirectView

from hooks.paths import HookPathConverter
from hooks.views import HookView

admin.autodiscover()
register_converter(HookPathConverter, "hook_path")

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:index")),
    path("admin/", admin.site.urls),
    # Last, because its base path is a setting: nothing that an operator types hides another page.
    path("<hook_path:path>", HookView.as_view(), name="hook"),
]
