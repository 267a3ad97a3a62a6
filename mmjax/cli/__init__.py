"""The command line. Every verb is one call into the package; what a verb needs is imported when it runs."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mmjax.cli import capfilt, image_verbs
from mmjax.errors import MmjaxError

Verb = Callable[[argparse.Namespace, list[str]], int | None]
"""(flags, the experiment's own flags) -> exit code; None is 0."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `mmjax ARGUMENTS`; returns the exit code.

    Bad input is one message on stderr and code 2, never a traceback; Ctrl-C is code 130. A run that SIGTERM or Ctrl-C
    ends after saving is a success.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if known.verb is None:
        parser.print_help()
        return 0
    if rest and not known.takes_fields:
        known.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if known.takes_fields and known.experiment is None:
        known.parser.print_help()
        return 0 if {"-h", "--help"} & set(rest) else 2
    try:
        return known.run(known, rest) or 0
    except MmjaxError as error:
        print(f"mmjax {known.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmjax {known.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `mmjax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmjax", description="The vision-language lineage in JAX: train, evaluate, load and export."
    )
    parser.set_defaults(verb=None)
    verbs = parser.add_subparsers(title="verbs", metavar="")
    for add in (
        _train,
        _check,
        _ablate,
        _plan,
        _evaluate,
        _classify,
        _retrieve,
        functools.partial(image_verbs.add_verbs, add=_add),
        functools.partial(capfilt.add_verb, add=_add),
        _generate,
        _chat,
        _convert,
        _tokenizer,
        _models,
    ):
        add(verbs)
    return parser


def _add(verbs: argparse._SubParsersAction, name: str, run: Verb, description: str, fields: bool = False):
    """A verb's parser. fields: it takes EXPERIMENT.py and passes flags that it does not know to the experiment."""
    suffix = "" if not fields else " Any other flag sets a field: mmjax %(prog)s EXPERIMENT.py --help lists them."
    description = description + suffix.replace("mmjax %(prog)s", f"mmjax {name}")
    verb = verbs.add_parser(
        name, help=description.split(". ")[0], description=description, allow_abbrev=False, add_help=not fields
    )
    verb.set_defaults(verb=name, run=run, takes_fields=fields, parser=verb)
    if fields:
        verb.add_argument("experiment", nargs="?", metavar="EXPERIMENT.py", help="a file with a class Config")
    return verb


# ----------------------------------------------------------------------------------------------------------- training


def _train(verbs: argparse._SubParsersAction) -> None:
    description = "Train an experiment. The same command resumes it; SIGTERM and Ctrl-C save first."
    verb = _add(verbs, "train", _run_train, description, fields=True)
    verb.add_argument("--workdir", metavar="DIR", help="default: workdirs/<name of the experiment's file>")
    help_text = "one of several processes, which find each other by the cluster's environment (jax.distributed)"
    verb.add_argument("--distributed", action="store_true", help=help_text)


def _run_train(flags: argparse.Namespace, fields: list[str]) -> None:
    from mmjax.cli import runs

    runs.train(flags.experiment, flags.workdir, fields, flags.distributed)


def _check(verbs: argparse._SubParsersAction) -> None:
    description = (
        "Check an experiment before a long run. Prints how many records are bad, a row as text with its labels in "
        "brackets, and which parameters have a gradient."
    )
    verb = _add(verbs, "check", _run_check, description, fields=True)
    amount = verb.add_mutually_exclusive_group()
    amount.add_argument("--batches", type=int, metavar="N", help="batches that are read (default 1)")
    amount.add_argument("--epoch", action="store_true", help="read every record once instead")


def _run_check(flags: argparse.Namespace, fields: list[str]) -> int:
    from mmjax.cli.check import check

    batches = 1 if flags.batches is None else flags.batches
    if batches < 1:
        raise MmjaxError(f"--batches {batches}: at least 1")
    return check(flags.experiment, None if flags.epoch else batches, fields)


def _ablate(verbs: argparse._SubParsersAction) -> None:
    description = "Train many arms of an experiment as one program and compare them. The same command resumes it."
    verb = _add(verbs, "ablate", _run_ablate, description, fields=True)
    verb.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="NAME=A,B,C",
        help="a hyper-parameter or field and its values; twice or more: their grid; {seed} is the arm's seed",
    )
    verb.add_argument("--seeds", metavar="0,1,2", help="every choice of values with each seed")
    help_text = "how the arms run in one program; auto: the fastest measured on this backend"
    verb.add_argument("--arms", choices=["auto", "vmap", "map", "unroll"], default="auto", help=help_text)
    verb.add_argument("--sequential", action="store_true", help="one arm after another instead: the same numbers")
    verb.add_argument(
        "--untrained", action="store_true", help="evaluate the networks before training too: a row beside"
    )
    verb.add_argument("--workdir", metavar="DIR", help="default: workdirs/<name of the experiment's file>_ablation")


def _run_ablate(flags: argparse.Namespace, fields: list[str]) -> None:
    from mmjax.cli import runs

    runs.ablate(flags, fields)


def _plan(verbs: argparse._SubParsersAction) -> None:
    description = "Print the memory, work, collectives and minimal time of a step on a TPU slice. No TPU is needed."
    verb = _add(verbs, "plan", _run_plan, description, fields=True)
    verb.add_argument(
        "--topology", metavar="v5e:8x8", help="version and shape: v4:2x2x1, v5e:16x16, v5p:2x2x2, v6e:4x4"
    )


def _run_plan(flags: argparse.Namespace, fields: list[str]) -> int:
    from mmjax.cli import runs

    return runs.plan(flags.experiment, flags.topology, fields)


def _evaluate(verbs: argparse._SubParsersAction) -> None:
    description = (
        "Evaluate a trained run by its own protocols, any model on a folder of images, or an image-text model on the "
        "published annotation files of vqa, nlvr2, entailment (SNLI-VE), retrieval, captions and grounding (RefCOCO+)."
    )
    verb = _add(verbs, "evaluate", lambda flags, _: _run_evaluate(flags), description)
    verb.add_argument(
        "source", metavar="WORKDIR", help="a run of mmjax train; with --data also a weight file or hub id"
    )
    verb.add_argument("--task", metavar="NAME", default="all", help="default: all of the experiment's")
    help_text = (
        "images, one folder per class (or train/ and test/ with such folders), NAME: zero_shot, knn, linear_probe, "
        "classification; or annotation files, NAME: vqa, nlvr2, entailment, retrieval, captions, grounding"
    )
    verb.add_argument("--data", nargs="+", metavar="DIR_OR_FILE", help=help_text)
    folder = "the folder of the images of annotation files (default: that of the file); of vqa also vqa=DIR,vg=DIR"
    verb.add_argument("--images", metavar="DIR", help=folder)
    verb.add_argument(
        "--answers", metavar="FILE", help="vqa: the list of answers to rank; default: answers are written"
    )
    verb.add_argument("--annotations", metavar="FILE", help="vqa: the official human answers")
    verb.add_argument("--k", type=int, metavar="K", help="vqa, retrieval: length of the shortlists (default 128)")
    help_text = (
        "retrieval: the score of a pair; default: the original's, itm for ALBEF, itm+similarity for BLIP and BLIP-2"
    )
    verb.add_argument("--formula", choices=["itm", "itm+similarity"], help=help_text)
    verb.add_argument("--refer", metavar="DIR", help="grounding: the folder of refs(unc).p and instances.json")
    verb.add_argument("--proposals", metavar="FILE", help="grounding: a detector's boxes (dets.json)")
    verb.add_argument("--block", type=int, metavar="N", help="grounding: layer of the cross attention")
    verb.add_argument("--limit", type=int, metavar="N", help="the first N records of annotation files")
    help_text = (
        "captions, vqa of Flamingo: the numbers of examples in the prompt, such as 0,4,8,16,32; a table and a plot"
    )
    verb.add_argument("--shots", metavar="0,4,8", help=help_text)
    help_text = "shots: annotation files that examples are taken from; the same ones, by --seed, before every query"
    verb.add_argument("--support", nargs="+", metavar="FILE", help=help_text)
    verb.add_argument("--support_images", metavar="DIR", help="shots: the folder of the images; default: --images")
    help_text = "shots: before each query the examples with the most similar images, the most similar last"
    verb.add_argument("--rices", action="store_true", default=None, help=help_text)
    help_text = "shots: a sample for each query, as in OpenFlamingo's evaluation"
    verb.add_argument("--per_query", action="store_true", default=None, help=help_text)
    verb.add_argument("--seed", type=int, metavar="N", help="shots: of the samples (default 42)")
    verb.add_argument("--experiment", metavar="EXPERIMENT.py", help="the experiment's file, if it moved")


def _run_evaluate(flags: argparse.Namespace) -> None:
    from mmjax.cli import evaluate, evaluate_lists, evaluate_shots

    of_lists = ("images", "limit", *(name for names in evaluate_lists.TASKS.values() for name in names))
    wrong = [f"--{name}" for name in dict.fromkeys(of_lists) if getattr(flags, name) is not None]
    if flags.data is not None and flags.task in evaluate_lists.TASKS:
        (evaluate_lists if flags.shots is None else evaluate_shots).run(flags)
    elif wrong:
        raise MmjaxError(f"{', '.join(wrong)}: of --data FILES with --task {', '.join(evaluate_lists.TASKS)}")
    elif flags.data is not None:
        evaluate.on_folder(flags.source, flags.task, flags.data)
    else:
        evaluate.run(flags.source, flags.task, flags.experiment)


# ------------------------------------------------------------------------------------------------------------- models


def _classify(verbs: argparse._SubParsersAction) -> None:
    description = "Print the most probable labels of each image; with BERT, of each text."
    verb = _add(verbs, "classify", lambda flags, _: _run_classify(flags), description)
    verb.add_argument("source", metavar="MODEL", help="a workdir, a folder, a weight file or a hub id")
    verb.add_argument("inputs", nargs="+", metavar="IMAGE_OR_TEXT")
    verb.add_argument("--labels", metavar="A,B,C", help="default: the model's class names")


def _run_classify(flags: argparse.Namespace) -> None:
    from mmjax.cli import images

    images.classify(flags.source, flags.inputs, flags.labels)


def _retrieve(verbs: argparse._SubParsersAction) -> None:
    description = "Find the images of a folder that are nearest to an image or a text, and store a picture of them."
    verb = _add(verbs, "retrieve", lambda flags, _: _run_retrieve(flags), description)
    verb.add_argument("source", metavar="MODEL", help="a workdir, a folder, a weight file or a hub id")
    query = verb.add_mutually_exclusive_group(required=True)
    query.add_argument("--image", metavar="FILE", help="the query")
    query.add_argument("--text", metavar="T", help="the query")
    verb.add_argument("--folder", metavar="DIR", help="the images to search; default: MODEL/images, if a run has them")
    verb.add_argument("-k", type=int, default=5, help="number of images (default 5)")
    verb.add_argument("--picture", metavar="FILE", default="retrieved.png", help="default: retrieved.png")
    help_text = "rank the K nearest again by the ITM head (ALBEF, BLIP, BLIP-2); needs --text"
    verb.add_argument("--rerank", type=int, default=0, metavar="K", help=help_text)
    help_text = "its score; default: the original's, itm for ALBEF, itm+similarity for BLIP and BLIP-2"
    verb.add_argument("--formula", choices=["itm", "itm+similarity"], help=help_text)


def _run_retrieve(flags: argparse.Namespace) -> None:
    from mmjax.cli import images

    options = flags.rerank, flags.formula
    images.retrieve(flags.source, flags.image, flags.text, flags.folder, flags.k, flags.picture, *options)


def _generate(verbs: argparse._SubParsersAction) -> None:
    description = "Generate text from prompts with a language model. The text of a single prompt is streamed."
    verb = _add(verbs, "generate", lambda flags, _: _run_generate(flags), description)
    verb.add_argument("source", metavar="MODEL", help="a workdir, a folder, a weight file (GGUF too) or a hub id")
    verb.add_argument("prompts", nargs="+", metavar="PROMPT")
    _generation_flags(verb)
    verb.add_argument("--num_beams", type=int, metavar="N", help="number of beams")
    verb.add_argument("--num_return_sequences", type=int, metavar="N", help="number of texts per prompt")


def _generation_flags(verb: argparse.ArgumentParser) -> None:
    """The model has defaults for the flags left out."""
    verb.add_argument("--max_new_tokens", type=int, metavar="N", help="default: 64")
    verb.add_argument("--temperature", type=float, metavar="T", help="sample; default: the most probable token")
    verb.add_argument("--top_k", type=int, metavar="K", help="sample from the K most probable tokens")
    verb.add_argument("--top_p", type=float, metavar="P", help="sample from the smallest set with probability P")
    verb.add_argument("--repetition_penalty", type=float, metavar="R")
    verb.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; repeatable")
    verb.add_argument("--seed", type=int, metavar="N", help="of sampling (default 0)")
    help_text = "dtype of the parameters and the computation; default: the layout's, float32"
    verb.add_argument("--dtype", choices=["float32", "bfloat16"], help=help_text)
    help_text = "store matrices in one byte per weight, for a model that is large for its device (extra int8)"
    verb.add_argument("--weights", choices=["int8"], help=help_text)


def _generation_options(flags: argparse.Namespace) -> dict[str, object]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop", "seed")
    names += ("num_beams", "num_return_sequences")
    return {name: value for name in names if (value := getattr(flags, name, None)) is not None}


def _loading_options(flags: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": flags.dtype, "weights": flags.weights}


def _run_generate(flags: argparse.Namespace) -> None:
    from mmjax.cli import generation

    generation.generate(flags.source, flags.prompts, _loading_options(flags), _generation_options(flags))


def _chat(verbs: argparse._SubParsersAction) -> None:
    description = (
        "Chat with a language model, one line per turn. The end of input ends the chat, Ctrl-C an answer. With a model "
        "that sees images, a line /image FILE adds one to the next turn."
    )
    verb = _add(verbs, "chat", lambda flags, _: _run_chat(flags), description)
    verb.add_argument("source", metavar="MODEL", help="a workdir, a folder, a weight file (GGUF too) or a hub id")
    verb.add_argument("--system", metavar="TEXT", help="system message; default: the template's")
    verb.add_argument("--image", action="append", default=[], metavar="FILE", help="of the first turn; repeatable")
    _generation_flags(verb)


def _run_chat(flags: argparse.Namespace) -> None:
    from mmjax.cli import generation

    options = _loading_options(flags), _generation_options(flags)
    generation.chat(flags.source, flags.system, flags.image, *options)


def _convert(verbs: argparse._SubParsersAction) -> None:
    description = "Write a model in another layout: a public one (hf, ...) or our own (mmjax)."
    verb = _add(verbs, "convert", lambda flags, _: _run_convert(flags), description)
    verb.add_argument("source", metavar="SRC", help="a workdir, a folder, a weight file or a hub id")
    verb.add_argument("target", metavar="DST", help="a folder; created if missing")
    verb.add_argument("--layout", metavar="NAME", required=True, help="mmjax models lists them")
    lossy = "write it even if the layout cannot hold all of the model; what it cannot hold is printed"
    verb.add_argument("--lossy", action="store_true", help=lossy)
    verb.add_argument("--from", dest="read_as", metavar="NAME", help="the layout of SRC, where more than one fits")


def _run_convert(flags: argparse.Namespace) -> None:
    from mmjax.cli import weights

    weights.convert(flags.source, flags.target, flags.layout, flags.read_as, flags.lossy)


def _tokenizer(verbs: argparse._SubParsersAction) -> None:
    verb = _add(verbs, "tokenizer", lambda flags, _: _run_tokenizer(flags), "Learn a tokenizer from text files.")
    verb.add_argument("action", choices=["train"])
    verb.add_argument(
        "sources", nargs="+", metavar="FILE_OR_FOLDER", help="one text per line; for a folder, every .txt file"
    )
    help_text = "the algorithm of BERT, GPT-2 or T5"
    verb.add_argument("--kind", required=True, choices=["wordpiece", "byte_bpe", "unigram"], help=help_text)
    verb.add_argument("--vocab_size", type=int, required=True, metavar="N", help="maximal number of ids")
    verb.add_argument("--out", metavar="FILE", default="tokenizer.json", help="default: tokenizer.json")
    verb.add_argument("--special", metavar="A,B,C", help="further special tokens, such as <image>")


def _run_tokenizer(flags: argparse.Namespace) -> None:
    from mmjax.cli import tokenizer

    tokenizer.train(flags.sources, flags.kind, flags.vocab_size, flags.out, flags.special)


def _models(verbs: argparse._SubParsersAction) -> None:
    _add(verbs, "models", lambda *_: _run_models(), "List the systems and the layouts of their weights.")


def _run_models() -> None:
    from mmjax.cli import weights

    weights.models()
