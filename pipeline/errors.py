"""Every exception that strata raises on purpose, as one tree.

    PipelineError
    ├── ConfigError                 the YAML or the command line is wrong; fix and resubmit      exit 78
    ├── DataError                   an input breaks its contract; never retried                  exit 65
    │   ├── SchemaMismatchError     a table's columns or types are not the expected ones
    │   ├── CorruptArtifactError    bytes are not what was recorded, or cannot be read
    │   ├── MissingFileError        a file that is named is not there
    │   ├── FilterError             a WHERE text cannot be parsed or does not fit the attributes
    │   ├── ErrorBudgetError        more bad rows than the configuration allows
    │   └── IncompatibleModelsError two artifacts come from different encoders or binarizers
    ├── TransientError              the same call may succeed; the runner retries                exit 75
    │   ├── StorageUnavailableError the store did not answer
    │   ├── RootBusyError           another job holds the root; nothing was done
    │   ├── LeaseLostError          this job was silent for so long that another one took the root over
    │   └── EncoderBrokenError      a loaded encoder fails on everything now; another process may not
    ├── PublishConflictError        another run moved the alias first; look again                exit 3
    └── QualityGateError            whole, but not good enough to publish                        exit 4

A message says where, what was expected, what was found, and what to do. Errors cross process borders:
every argument is positional and kept in `args`, so each class pickles.
"""

__all__ = [
    "ConfigError",
    "CorruptArtifactError",
    "DataError",
    "EncoderBrokenError",
    "ErrorBudgetError",
    "FilterError",
    "IncompatibleModelsError",
    "LeaseLostError",
    "MissingFileError",
    "PipelineError",
    "PublishConflictError",
    "QualityGateError",
    "RootBusyError",
    "SchemaMismatchError",
    "StorageUnavailableError",
    "TransientError",
]


class PipelineError(Exception):
    """Base of all errors that strata raises on purpose.

    Args:
        place: File, key path, table or query the error is about.
        problem: What was expected and what was found.
        remedy: What the reader should do next.
    """

    exit_code = 1

    def __init__(self, place: str, problem: str, remedy: str = "") -> None:
        super().__init__(place, problem, remedy)
        self.place = place
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}" + (f"; {self.remedy}" if self.remedy else "")


class ConfigError(PipelineError):
    """The configuration or the command line is wrong; fix it and resubmit."""

    exit_code = 78


class DataError(PipelineError):
    """An input breaks its contract; the same call fails again until the input is mended."""

    exit_code = 65


class SchemaMismatchError(DataError):
    """A table has not the columns or the types that it should have."""


class CorruptArtifactError(DataError):
    """A file cannot be read, or its bytes are not the recorded ones."""


class MissingFileError(DataError):
    """A file that the configuration or an artifact names is not there."""


class FilterError(DataError):
    """A WHERE text cannot be parsed, or does not fit the attributes of the release."""


class ErrorBudgetError(DataError):
    """More rows were set aside than the configured error budget allows."""


class IncompatibleModelsError(DataError):
    """Two artifacts that must share a space come from different encoders or binarizers."""


class TransientError(PipelineError):
    """The same call may succeed later; the runner retries it."""

    exit_code = 75


class StorageUnavailableError(TransientError):
    """The store did not answer, or answered with an error that passes."""


class RootBusyError(TransientError):
    """Another job holds the root, and this one does not wait any longer; nothing was done."""


class LeaseLostError(TransientError):
    """The lease of the root passed to another job, because this one gave no sign of life."""


class EncoderBrokenError(TransientError):
    """An encoder that was sound when it was loaded fails on everything: its process is of no more use, no text is judged."""


class PublishConflictError(PipelineError):
    """Another publisher moved the alias after this run had started."""

    exit_code = 3


class QualityGateError(PipelineError):
    """The index is whole but does not meet the configured thresholds; it was not published."""

    exit_code = 4
