"""Every error this package raises on purpose. The command line turns each into one sentence and an exit code."""


class ImageDreamError(Exception):
    """Base of all errors raised on purpose; exit code 1."""

    exit_code = 1


class InputError(ImageDreamError, ValueError):
    """Something the caller gave cannot be used; the message names it, the rule and the mend. Exit code 2."""

    exit_code = 2


class MissingDependency(InputError):
    """An optional package is needed for what was asked; the message names the extra to install."""


class FusionError(ImageDreamError, RuntimeError):
    """Fusion cannot go on (NaN, empty field); the message says at which step and where the last checkpoint is."""


class Cancelled(ImageDreamError):
    """The caller's ``cancel`` asked for a stop; what was saved before stays."""
