"""What commands of this folder report with exit code 1 or 2 instead of a traceback."""


class ConvertError(ValueError):
    """A checkpoint that cannot be converted, or arguments that cannot work: value, rule, remedy."""
