from contextlib import nullcontext as autocast  # noqa: F401
