"""Faults that a user can mend; each carries one clear message, and the command line turns it into exit code 2."""


class DeltuneError(Exception):
    """A fault with a remedy. The message names where, what was found and what would fit."""

    exit_code = 2


class ConfigError(DeltuneError):
    """A key, type, choice or pair of settings that cannot be used."""


class DataError(DeltuneError):
    """A file, row or format that cannot be used; the message names file and line."""


class ModelError(DeltuneError):
    """A model folder or tokenizer that cannot be used."""


class AdapterError(DeltuneError):
    """An adapter, its target modules or its files do not fit."""


class CheckpointError(DeltuneError):
    """A run folder or checkpoint that cannot be used."""


class EngineError(DeltuneError):
    """A device, precision or process group that is not to be had here."""


class NumericsError(DeltuneError):
    """A loss, gradient or weight became infinite or not a number, and the policy is to stop."""

    exit_code = 3


class Interrupted(DeltuneError):
    """A signal asked the run to stop, and it did so after saving; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum
