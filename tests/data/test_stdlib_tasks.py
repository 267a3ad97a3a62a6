"""Fine-tuning data without a download: texts of Python modules, labelled by signatures and paths."""

from mmjax.data.splits import is_held_out
from mmjax.data.stdlib_docs import stdlib_documented, stdlib_documents
from mmjax.data.stdlib_tasks import package_texts, parameter_words, return_questions

HENS = '''"""All about hens. They lay eggs."""
class Hen:
    """A bird that lives on a farm."""
    def lay(self, eggs, *, nest=None):
        """Lay some eggs in a nest of the farm's choice.

        Returns: the number of eggs that are
        whole. An empty nest is no error.
        """
    def sleep(self, hours):
        """Sleep for as many hours as a hen of its age needs."""
    def cluck(self):
        """Returns nothing that anybody would ever want to hear."""
'''


def modules(root):
    (root / "farm").mkdir()
    (root / "farm" / "hens.py").write_text(HENS)
    (root / "cow.py").write_text('"""Moo."""\ndef moo(loud): "Moo, loud or not."\n')
    (root / "broken.py").write_text("def")
    return root


def test_what_is_documented(tmp_path):
    documented = stdlib_documented(modules(tmp_path))
    assert [(one.module, one.name) for one in documented[:2]] == [("cow.py", "cow"), ("cow.py", "moo")]
    lay = documented[4]
    assert (lay.module, lay.name, lay.parameters) == ("farm/hens.py", "lay", ("eggs", "nest"))
    assert stdlib_documents(tmp_path, least=1)["farm/hens.py"][:2] == ["All about hens.", "They lay eggs."]


def test_labels_are_those_of_the_files(tmp_path):
    documented = stdlib_documented(modules(tmp_path))
    assert {text.label for text in package_texts(documented, least=3)} == {"farm"}
    assert len(package_texts([*documented, *documented], least=1)) == len(documented)  # each text once
    words = parameter_words(documented)
    tagged = {(one.group, word) for one in words for word, tag in zip(one.words, one.tags) if tag != "O"}
    assert tagged == {("cow.py", "loud"), ("farm/hens.py", "eggs"), ("farm/hens.py", "nest"), ("farm/hens.py", "hours")}
    lay, sleep = return_questions(documented)
    assert lay.question == "What does lay return?" and sleep.answers == ()
    ((text, start),) = lay.answers
    assert text == "the number of eggs that are\nwhole" and lay.context[start : start + len(text)] == text


def test_the_held_out_split_depends_on_names_alone():
    held_out = [is_held_out(f"name {i}", 0.2) for i in range(2000)]
    assert 0.17 < sum(held_out) / 2000 < 0.23
    assert not any(is_held_out(f"name {i}", 0.1) and not wide for i, wide in enumerate(held_out))
