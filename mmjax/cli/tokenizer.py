"""The verb about tokenizers: tokenizer train."""

import contextlib
import pathlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mmjax.errors import MmjaxError
from mmjax.text.training import Kind, corpus_files, read_lines, train_tokenizer


def train(sources: Sequence[str], kind: Kind, vocab_size: int, out: str, special: str | None) -> None:
    """Learns a tokenizer from the lines of text files, and writes it for `Tokenizer.from_file` and transformers."""
    file = pathlib.Path(out)
    if file.suffix != ".json":
        raise MmjaxError(f"--out {out}: want a name that ends in .json; tokenizer.json is what transformers looks for")
    files = corpus_files(sources)
    more = [token for token in (special or "").split(",") if token]
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        tokenizer = train_tokenizer(_lines(files, stack), kind, vocab_size, more)
    tokenizer.save(file)
    source = f"{len(files)} files" if len(files) > 1 else str(files[0])
    print(f"{source} -> {out}: {kind}, {tokenizer.vocab_size} ids, in {time.monotonic() - start:.1f} s")
    if tokenizer.vocab_size < vocab_size:
        print(f"the texts have no more pieces: {vocab_size - tokenizer.vocab_size} ids of {vocab_size} are left over")


def _lines(files: Sequence[pathlib.Path], stack: contextlib.ExitStack) -> Iterator[str]:
    """Every line with a bar while files are read, then a spinner while learning; both vanish at the end."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=sum(file.stat().st_size for file in files))
        for file in files:
            with file.open("rb") as raw, progress.wrap_file(raw, task_id=task) as counted:
                yield from read_lines(counted, file)
    if console.is_terminal:
        stack.enter_context(console.status("learning"))
