"""Scores of a user's function, kept on disk until the pairs are written: a judge that calls a model takes hours."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_solopo import __version__
from megatron_solopo.data.files.jobs import Jobs
from megatron_solopo.data.scoring import Scorer, UserScorer

Score = Callable[[str, Sequence[str], Sequence[str]], list[float]]
"""(question, accepted answers, responses) -> a finite score a response; higher is better."""


@contextlib.contextmanager
def kept_scores(name: str, scorer: Scorer, output: Path) -> Iterator[Score]:
    """The scores of ``--scorer NAME``. A user's function has them kept in ``OUTPUT.partial`` until the block succeeds.

    A job is one question with its responses. Its name is a hash of their content, so that scores stay valid when the
    input files or other options change. Metrics of `scoring.SCORERS` are fast and computed again.

    Raises:
        UserError: as `Jobs`; the file holds scores of another scorer.
    """

    def scored(question: str, answers: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [scorer(response, answers, question) for response in responses]

    if not isinstance(scorer, UserScorer):
        yield scored
        return
    with Jobs(output.with_name(output.name + ".partial")) as jobs:
        jobs.begin({"version": __version__, "scorer": name}, head={"code": scorer.digest})
        if not jobs.empty:
            changed = "" if jobs.head["code"] == scorer.digest else f"; the code of {name} has changed"
            print(
                f"resuming: {len(jobs.lines)} questions were scored before{changed} "
                f"(delete {jobs.place} to score them again)"
            )

        def kept(question: str, answers: Sequence[str], responses: Sequence[str]) -> list[float]:
            content = json.dumps([question, list(answers), list(responses)])
            job = hashlib.sha256(content.encode()).hexdigest()[:32]
            if job not in jobs:
                jobs.add(job, {"scores": scored(question, answers, responses)})
            return jobs.read(jobs.lines[job])["scores"]

        yield kept
        jobs.remove()
