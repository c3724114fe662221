"""All error types of the package. Each message names the cause and what to do."""


class SafeguardError(Exception):
    """Base of every error this package raises on purpose; the command line prints it plainly."""


class ModelError(SafeguardError):
    """The model cannot be loaded, or its decoder cannot be verified."""


class GuardError(SafeguardError):
    """The guard artifact is missing, torn, tampered with, or belongs to another model."""


class Interrupted(SafeguardError):
    """Long work was stopped from outside; the same command goes on with it."""


class GuardRuntimeError(SafeguardError):
    """The guard could not do its work during a forward pass; nothing unguarded was returned."""


class UnreadableText(GuardRuntimeError):
    """The text gate cannot read a request as it is written; the request has to change."""


class PromptTooLong(GuardRuntimeError):
    """A prompt takes more positions than the model has; the request has to change."""


class TextTooLong(PromptTooLong):
    """What the text gate would read of a request is longer than the model's context.

    Attributes:
        tokens: its length.
        most: what the gate can read.
    """

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(
            "the prompt, as the guard reads it, with the words in its pictures and what it adds "
            f"itself, has {tokens} tokens; at most {most} are accepted"
        )
        self.tokens, self.most = tokens, most


class CalibrationError(SafeguardError):
    """No guard within the stated budget could be proven to help; nothing was saved."""


class ImageError(SafeguardError):
    """An image was refused: missing, corrupt, or absurd in size or shape."""


class DataError(SafeguardError):
    """A prompt file is missing, malformed, or does not match its digest."""


class DemoError(SafeguardError):
    """The embedded model could not be assembled."""
