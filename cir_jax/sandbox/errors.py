"""What the sandbox raises."""


class SandboxError(RuntimeError):
    """Programs cannot be isolated on this machine as asked for, or the isolation does not hold."""
