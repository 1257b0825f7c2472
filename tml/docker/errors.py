"""The exceptions that end the launcher with a message instead of a traceback."""

# What `docker run` itself returns when the engine, not the container's command, failed.
ENGINE_FAILED = 125
# What argparse returns for flags that it does not know.
USAGE = 2


class LauncherError(Exception):
    """Something the caller can mend. The message says what, where and how; `exit_code` is the
    launcher's.
    """

    def __init__(self, message: str, exit_code: int = ENGINE_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(LauncherError):
    """A mistake in what was typed: the value of a flag, the name of a project."""

    def __init__(self, message: str) -> None:
        super().__init__(message, USAGE)


class NoEngineError(LauncherError):
    """No Docker Engine answers, or none that this user may speak to."""

    @property
    def brief(self) -> str:
        """What is wrong, without what was tried and what to do."""
        return str(self).splitlines()[0].removesuffix(" Tried:").removesuffix(".")
