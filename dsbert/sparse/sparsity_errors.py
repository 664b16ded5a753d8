"""What the library refuses, in its own words: a message names a field of `SparsityConfig`.

A program whose users know the field by another name says so with `within`, as config/sparsity_keys.py does.
"""


class SparsityError(ValueError):
    """A configuration that does not fit the model or the machine.

    The message is before + field + after, one line; field: of `SparsityConfig`.
    """

    def __init__(self, before: str, field: str, after: str) -> None:
        super().__init__(f"{before}{field}{after}")
        self.before, self.field, self.after = before, field, after

    def within(self, section: str) -> str:
        """The message for those who write the field below `section`, as section.field."""
        return f"{self.before}{section}.{self.field}{self.after}"


class KernelError(SparsityError):
    """None of the kernels asked for (a name of `KERNELS`) can run, for that reason."""

    def __init__(self, kernels: str, reason: str) -> None:
        super().__init__("expected ", "kernels", f" that can run here, found {kernels}: {reason}; choose auto")
        self.kernels, self.reason = kernels, reason
