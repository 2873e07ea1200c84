"""Exceptions. All of them are `Error`."""


class Error(Exception):
    """Something that segattn cannot do."""


class ArgumentError(Error, ValueError):
    """A rejected argument. Nothing has been computed or written.

    argument: its name; index: the place in it, where there is one; expected, got: what would have been accepted, and
    what came.
    """

    def __init__(self, argument: str, expected: str, got: str, index: "int | None" = None) -> None:
        place = argument if index is None else f"{argument}[{index}]"
        super().__init__(f"{place}: expected {expected}, got {got}")
        self.argument = argument
        self.expected = expected
        self.got = got
        self.index = index

    def __reduce__(self):
        return type(self), (self.argument, self.expected, self.got, self.index)


class DeviceError(Error, RuntimeError):
    """A device failed. Later calls work, unless the message says otherwise."""


class OutOfMemory(DeviceError, MemoryError):
    """There was too little memory. Later calls work."""
