"""What the samplers share."""


class InterruptedException(BaseException):
    """The user has interrupted or skipped."""
