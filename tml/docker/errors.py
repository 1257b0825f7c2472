"""The one exception that ends the launcher with a message instead of a traceback."""

# What `docker run` itself returns when the engine, not the container's command, failed.
ENGINE_FAILED = 125


class LauncherError(Exception):
    """Something the caller can mend. The message says what, where and how; `exit_code` is the
    launcher's.
    """

    def __init__(self, message: str, exit_code: int = ENGINE_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NoEngineError(LauncherError):
    """No Docker Engine answers, or none that this user may speak to."""
