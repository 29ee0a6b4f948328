"""The one error that a user sees."""


class LoratorioError(Exception):
    """A sentence for the person at the keyboard: what is wrong, with which LoRA or knob, and what to do."""
