"""The one error that a user sees."""


class LoratorioError(Exception):
    """A sentence for the person at the keyboard: what is wrong, with which LoRA or knob, and what to do.

    Attributes:
        status_code, detail: what a WebUI's API answers with.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.status_code, self.detail = 422, sentence
