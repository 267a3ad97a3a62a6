"""The examples in docstrings run and print what they say."""

import doctest
import importlib

import pytest

EXAMPLES = {"mmjax.hub": 3, "mmjax.data.sources": 1, "mmjax.data.image_folder": 1, "mmjax.data.pipeline": 1}
"""Module -> number of docstrings with an example."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings_run(name):
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert len(tests) == EXAMPLES[name]
    runner = doctest.DocTestRunner(verbose=False)
    for test in tests:
        failed, attempted = runner.run(test)
        assert attempted and not failed, test.name
