"""promote: make a registered version the champion, if the gate agrees.

    python -m pipeline.promote               # the challenger, that is the model of the last result
    python -m pipeline.promote --version 3
    python -m pipeline.promote --rollback    # back to the champion before

The gate (`pipeline/gate.py`) wants all of it: a loss on the test documents significantly below the champion's (of the
first champion: below the baselines), no leakage, no refused verdict, files in MLflow that are those that were
published, and a model that, loaded back from there, has the loss that was recorded. What speaks for a version, or
against it, is written on it in MLflow. A rollback asks no gate.

Exit codes: 0 it is the champion; 1 it is not, for the reasons printed. The end of the pipeline does the same when
`publish.auto_promote` is on, but leaves alone what a person decided: it never promotes a version again that somebody
withdrew, and gives the alias to nobody when somebody took it away.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline import evidence, launcher, stage
from pipeline.stage import Refusal

if TYPE_CHECKING:
    from pipeline.champions import Champions


def promote(number: str | None) -> str:
    """Make a version, by default the challenger, the champion; return what to tell.

    Raises:
        Refusal: the gate does not agree, for the reasons in it, or there is nothing to promote.
    """
    from pipeline import registry

    with _champions() as known:
        number = number or known.holder(registry.ALIAS)
        if number is None:
            raise Refusal(f"{known.name!r} has no challenger; say which version with --version")
        told = decide(known, number)
        if known.holder(known.ALIAS) != number:
            raise Refusal(told)
        return told


def at_the_end(number: str) -> str:
    """The same for the version of a result that was just published; return what to tell. A refusal is no failure."""
    with _champions() as known:
        champion, state = known.holder(known.ALIAS), known.state(number)
        if champion != number and state == known.WITHDRAWN:
            why = known.version(number).tags[known.REASONS]
            return f"version {number} of {known.name!r} is not made the champion again by itself. {why}"
        if champion is None and known.history:
            return f"{known.name!r} has no champion, for a person took the alias away, and gets none by itself"
        return decide(known, number)


def decide(known: Champions, number: str) -> str:
    """Ask the gate about a version and do what it says; return what to tell.

    Raises:
        Refusal: the alias was moved meanwhile.
    """
    from pipeline import tracking

    this, champion = f"version {number} of {known.name!r}", known.holder(known.ALIAS)
    if champion == number:
        return f"{this} is the champion"
    version, other = known.version(number), known.version(champion) if champion else None
    paths = stage.paths_of(stage.read_stages()["publish"])
    findings = evidence.judge(known.store, version, other, stage.load_params(), paths)
    agrees = all(finding.agrees for finding in findings)
    sentences = [finding.sentence for finding in findings if agrees or not finding.agrees]
    with tracking.alone():
        if known.holder(known.ALIAS) != champion:
            raise Refusal(f"the alias champion of {known.name!r} was moved meanwhile; run `python -m pipeline.promote`")
        if agrees:
            known.crown(number, known.PROMOTED, sentences)
        else:
            known.note(number, known.REFUSED, sentences)
    outcome = "is the champion now" if agrees else "does not become champion"
    return "\n".join([f"{this} {outcome}:", *(f"  {sentence}" for sentence in sentences)])


def roll_back() -> str:
    """Return to the champion before, whatever the gate would say; return what to tell.

    Raises:
        Refusal: there is none before.
    """
    from pipeline import tracking

    with _champions() as known, tracking.alone():
        left, number = known.roll_back()
        instead = f" instead of version {left}" if left else ""
        return f"version {number} of {known.name!r} is the champion again{instead}"


@contextmanager
def _champions() -> Iterator[Champions]:
    """The champions of the model that params.yaml names; what a person changed since the last time is recorded."""
    from pipeline import tracking
    from pipeline.champions import Champions

    publish = stage.load_params()["publish"]
    with tracking.problems():
        with tracking.alone():
            known = Champions(tracking.Store(publish.experiment), publish.registered_model)
            known.settle()
        yield known


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.promote", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", metavar="N", help="number of the version; the challenger if left out")
    which.add_argument("--rollback", action="store_true", help="return to the champion before")
    arguments = parser.parse_args()
    launcher.settle()
    with stage.refusals("promote"):
        print(f"promote: {roll_back() if arguments.rollback else promote(arguments.version)}")


if __name__ == "__main__":
    main()
