import inspect
import pickle

import pytest

from pipeline import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]
EXIT_CODES = {
    "ConfigError": 78,
    "DataError": 65,
    "TransientError": 75,
    "PublishConflictError": 3,
    "QualityGateError": 4,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_crosses_a_process_border_whole(kind: type[errors.PipelineError]) -> None:
    error = kind("lists.parquet", "expected 5 bytes, found 4", "rerun its stage")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == "lists.parquet: expected 5 bytes, found 4; rerun its stage"
    assert (copy.place, copy.problem, copy.remedy) == (error.place, error.problem, error.remedy)


def test_a_remedy_may_be_left_out() -> None:
    assert str(errors.DataError("place", "problem")) == "place: problem"


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind is not errors.PipelineError])
def test_an_exit_code_follows_from_the_tree(kind: type[errors.PipelineError]) -> None:
    family = next(base.__name__ for base in kind.__mro__ if base.__name__ in EXIT_CODES)
    assert kind.exit_code == EXIT_CODES[family]


def test_the_tree_in_the_docstring_names_every_class_once() -> None:
    tree = (errors.__doc__ or "").split()
    assert [tree.count(name) for name in errors.__all__] == [1] * len(errors.__all__)


def test_every_class_of_the_module_is_exported() -> None:
    defined = [name for name, value in vars(errors).items() if inspect.isclass(value)]
    assert sorted(defined) == errors.__all__
