"""Unfold's classes for the admin, under the types of the Django classes that they extend.

Unfold ships no types; this is the one place that knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unfold.forms import (  # type: ignore[import-untyped]
    AdminPasswordChangeForm,
    UserChangeForm,
    UserCreationForm,
)
from unfold.widgets import (  # type: ignore[import-untyped]
    UnfoldAdminCheckboxSelectMultipleWidget,
    UnfoldAdminPasswordWidget,
    UnfoldAdminRadioSelectWidget,
    UnfoldAdminSelectWidget,
    UnfoldAdminTextareaWidget,
    UnfoldAdminTextInputWidget,
    UnfoldBooleanSwitchWidget,
)

if TYPE_CHECKING:
    from django import forms
    from django.contrib import admin
    from django.contrib.auth.admin import GroupAdmin, UserAdmin
    from django.contrib.auth.models import User

    ModelAdmin = admin.ModelAdmin[Any]
    TabularInline = admin.TabularInline[Any, Any]
    ModelForm = forms.ModelForm[Any]
    InlineFormSet = forms.BaseInlineFormSet[Any, Any, Any]
    UserPage = UserAdmin[User]
    GroupPage = GroupAdmin
else:
    from django.contrib.auth.admin import GroupAdmin, UserAdmin
    from django.forms import ModelForm
    from unfold.admin import ModelAdmin, TabularInline
    from unfold.forms import PaginationInlineFormSet as InlineFormSet

    class UserPage(UserAdmin, ModelAdmin):
        """Django's page for users, in Unfold's look."""

    class GroupPage(GroupAdmin, ModelAdmin):
        """Django's page for groups, in Unfold's look."""


__all__ = [
    "AdminPasswordChangeForm",
    "GroupPage",
    "InlineFormSet",
    "ModelAdmin",
    "ModelForm",
    "TabularInline",
    "UnfoldAdminCheckboxSelectMultipleWidget",
    "UnfoldAdminPasswordWidget",
    "UnfoldAdminRadioSelectWidget",
    "UnfoldAdminSelectWidget",
    "UnfoldAdminTextInputWidget",
    "UnfoldAdminTextareaWidget",
    "UnfoldBooleanSwitchWidget",
    "UserChangeForm",
    "UserCreationForm",
    "UserPage",
]
