"""Exceptions of higgs. Invalid arguments are ValueError, wrong types TypeError, failed files OSError."""


class HiggsError(Exception):
    """Base class of the exceptions below."""


class UnsupportedError(HiggsError):
    """What was asked for is legal but not supported here (by this build, device or version)."""


class FormatError(HiggsError):
    """A checkpoint or file is not what its format says; the message names both sides."""


class CudaError(HiggsError):
    """A CUDA call failed."""
