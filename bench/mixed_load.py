"""The definition of `bench mixed` and `bench soak`: the reference model, and accounts of users and items beside it."""

from __future__ import annotations

from millpond.bench.accounts import item_activity, item_model, user_account, user_model
from millpond.bench.reference import activity, reference, user_activity

__all__ = ["activity", "item_activity", "item_model", "reference", "user_account", "user_activity", "user_model"]
