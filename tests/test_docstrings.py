"""Every public docstring has an example, and each example runs and prints what it says."""

import doctest
import inspect
from collections.abc import Iterator

import pytest
import torch

import fastbf
from fastbf.backend import Choice

NAMES = {"torch": torch, "fastbf": fastbf}  #: what an example may use without an import


def exported() -> Iterator[object]:
    """What fastbf exports, the functions of its public modules, and the results that those have."""
    for module in (fastbf, fastbf.functional, fastbf.distributed):
        for name, value in vars(module).items():
            of_module = getattr(value, "__module__", "").startswith(module.__name__)
            if of_module and not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                yield value
    yield Choice


def documented() -> Iterator[tuple[str, object]]:
    """Each of them and the methods and properties that its class defines, if they have a docstring."""
    for value in dict.fromkeys(exported()):
        yield value.__qualname__, value
        for name, member in vars(value).items() if inspect.isclass(value) else ():
            kinds = property, staticmethod, classmethod
            if (inspect.isfunction(member) or isinstance(member, kinds)) and member.__doc__ and name[0] != "_":
                yield f"{value.__qualname__}.{name}", member


PUBLIC = dict(documented())
PARSER = doctest.DocTestParser()


def test_what_is_public_is_found():
    assert {name for name in fastbf.__all__ if callable(getattr(fastbf, name))} <= PUBLIC.keys()
    assert {"encoder_layer", "linear_cross_entropy", "gather", "LossStats", "Choice"} <= PUBLIC.keys()
    assert {"BatchFormer.mix", "BatchFormer.process_group", "SharedClassifier.loss"} <= PUBLIC.keys()


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name, capsys):
    docstring = inspect.getdoc(PUBLIC[name])
    assert "\nExamples:\n" in docstring
    test = PARSER.get_doctest(docstring, dict(NAMES), name, None, 0)
    assert any(example.want for example in test.examples)
    result = doctest.DocTestRunner(verbose=False).run(test)
    assert not result.failed, capsys.readouterr().out


def test_a_wrong_example_is_seen():
    test = PARSER.get_doctest(">>> torch.zeros(2).shape\ntorch.Size([3])\n", dict(NAMES), "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda _: None).failed == 1
