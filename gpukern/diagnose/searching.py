"""Random search of hyperparameters from coarse to fine, on Optuna. See :func:`search`."""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpukern.diagnose.errors import DiagnoseError
from gpukern.diagnose.extras import needed
from gpukern.diagnose.search_report import SearchReport
from gpukern.diagnose.search_values import Run
from gpukern.diagnose.space import Choice, Range, Space

#: The attribute of a trial that repeats an interrupted one, with that one's number.
_AGAIN = "repeats trial"
#: The width of a round's ranges beside those of the round before.
NARROWED = 1 / 3


class Reporter:
    """Given to the training function: tells the search how a run does, and ends it if others do better."""

    def __init__(self, trial: Any, curve: list[float]) -> None:
        self._trial, self._curve = trial, curve

    def __call__(self, value: float) -> None:
        """Report the value after another step of the run, such as an epoch; Optuna's ``TrialPruned`` ends it."""
        value = float(value)
        self._curve.append(value)
        if math.isfinite(value):
            self._trial.report(value, len(self._curve))
        if not math.isfinite(value) or self._trial.should_prune():
            raise needed("optuna", "a search").TrialPruned


def search(
    train: Callable[[dict[str, Any], Reporter], float],
    space: Space,
    *,
    trials: int = 30,
    rounds: int = 2,
    maximize: bool = False,
    halving: int = 3,
    first_steps: int = 1,
    storage: str | os.PathLike[str] | None = None,
    name: str = "search",
    seed: int = 0,
    progress: bool | None = None,
) -> SearchReport:
    """Search for the ``settings`` with the least, or the largest, value of ``train(settings, report)``.

    The first round draws from all of ``space``, each following one from a third of each range (of its logarithm where
    drawn so) around the best run so far. A training that calls ``report(value)`` after each epoch is ended early by
    successive halving: of the runs that reached epoch f, f·h, f·h², … only the best 1/h go on, h being ``halving``
    and f ``first_steps``.

    Parameters
    ----------
    train:
        gets the settings, by name, and ``report``; returns the value in the end, as a validation loss. A NaN is a run
        that failed; an exception ends the search.
    space:
        a dict of :func:`~gpukern.diagnose.log_uniform`, :func:`~gpukern.diagnose.uniform`,
        :func:`~gpukern.diagnose.integers` and :func:`~gpukern.diagnose.choice`.
    trials:
        runs in all, the same number in each of the ``rounds``, the first has what is left over.
    maximize:
        whether the largest value is the best, as of an accuracy.
    halving:
        h; 0 for no early ends.
    storage:
        a file (SQLite), in which every run is kept when it ends. With the same file and ``name`` a search goes on
        where it was stopped, and draws what it would have drawn; a run that was interrupted begins again. One process
        at a time. A URL of Optuna's is taken as it is; its dashboard reads either.
    seed:
        of the settings that are drawn; seeding the training is up to ``train``.
    progress:
        whether a bar is drawn; by default on terminals.

    Returns
    -------
    A :class:`~gpukern.diagnose.search_report.SearchReport`: ``best``, ``ranked``, ``warnings`` where the best lies on
    a border, ``plot``, ``to_json``; it prints as a table.

    Raises
    ------
    ValueError for an empty space or numbers that make no sense, and for a storage with runs of another space;
    MissingPackage without Optuna; whatever ``train`` raises.
    """
    if not space or not all(isinstance(each, (Range, Choice)) for each in space.values()):
        raise ValueError("space must be a dict of log_uniform, uniform, integers or choice by name")
    if rounds < 1 or trials < rounds or halving < 0 or halving == 1 or first_steps < 1:
        raise ValueError(
            "expected rounds of 1 or more, trials of at least as many, halving of 0 or at least 2 and first_steps of 1 "
            f"or more, got {rounds}, {trials}, {halving}, {first_steps}"
        )
    optuna = needed("optuna", "a search")
    url = _url(storage)
    runs: list[Run] = []
    spaces: list[Space] = []
    with _quiet(optuna), _bar(trials, progress) as tell:
        for number in range(rounds):
            spaces.append(dict(space) if number == 0 else _narrowed(spaces[-1], runs, maximize))
            wanted = trials // rounds + (trials % rounds if number == 0 else 0)
            study = _study(optuna, url, f"{name}, round {number + 1}", maximize, halving, first_steps, seed + number)
            _check_same(study, spaces[-1])
            _retry_interrupted(optuna, study)
            before = list(runs)
            runs = before + _runs(study, number + 1)
            tell(runs)
            while len(runs) - len(before) < wanted:
                study.optimize(_objective(optuna, train, spaces[-1]), n_trials=1)
                runs = before + _runs(study, number + 1)
                tell(runs)
    return SearchReport(tuple(runs), dict(space), tuple(spaces), maximize)


def _url(storage: str | os.PathLike[str] | None) -> str | None:
    if storage is None or (isinstance(storage, str) and "://" in storage):
        return storage
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path.resolve()}"


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna logs every trial on standard error: the bar and the report tell more."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _bar(trials: int, wanted: bool | None) -> Iterator[Callable[[list[Run]], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown = sys.stderr.isatty() if wanted is None else wanted
    columns = BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("searching", total=trials)

        def tell(runs: list[Run]) -> None:
            values = [run.value for run in runs if run.state == "complete" and run.value is not None]
            told = f"round {runs[-1].round}, {sum(run.state == 'pruned' for run in runs)} ended early" if runs else ""
            bar.update(
                task, completed=len(runs), description=f"{told}, {len(values)} complete" if told else "searching"
            )

        yield tell


def _study(optuna: Any, url: str | None, name: str, maximize: bool, halving: int, first: int, seed: int) -> Any:
    class Numbered(optuna.samplers.RandomSampler):  # type: ignore[name-defined]
        """Draws what depends on the trial's place in the search, not on the trials that this process has run."""

        def before_trial(self, study: Any, trial: Any) -> None:
            earlier = study.get_trials(deepcopy=False)[: trial.number]
            place = trial.number - sum(_AGAIN in each.user_attrs for each in earlier)
            super().__init__(seed=zlib.crc32(f"{seed} {place}".encode()))

    pruner = optuna.pruners.NopPruner()
    if halving:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=halving)
    return optuna.create_study(
        storage=url,
        study_name=name,
        sampler=Numbered(),
        pruner=pruner,
        direction="maximize" if maximize else "minimize",
        load_if_exists=True,
    )


def _check_same(study: Any, space: Space) -> None:
    """A storage of another search must not be mixed with this one."""
    described = {name: repr(each) for name, each in space.items()}
    kept = study.user_attrs.get("space")
    if kept is None:
        study.set_user_attr("space", described)
    elif kept != described:
        raise ValueError(
            f"the storage has runs of {study.study_name!r} with another space, {kept}: give another name= or storage="
        )


def _retry_interrupted(optuna: Any, study: Any) -> None:
    """Trials that were running when their process ended begin again, with the same settings."""
    states = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=[states.RUNNING]):
        study.tell(trial.number, state=states.FAIL)
    again = {trial.user_attrs.get(_AGAIN) for trial in study.get_trials(deepcopy=False)}
    for trial in study.get_trials(deepcopy=False, states=[states.FAIL]):
        if trial.params and trial.number not in again:
            study.enqueue_trial(trial.params, user_attrs={_AGAIN: trial.number})


def _objective(optuna: Any, train: Callable[[dict[str, Any], Reporter], float], space: Space) -> Callable[[Any], float]:
    def objective(trial: Any) -> float:
        settings = {name: _suggest(trial, name, each) for name, each in space.items()}
        curve: list[float] = []
        try:
            returned = train(settings, Reporter(trial, curve))
            if returned is None:
                raise TypeError("train must return the value to minimize or maximize, got None")
            value = float(returned)
        finally:
            trial.set_user_attr("curve", [each if math.isfinite(each) else None for each in curve])
        if not math.isfinite(value):
            raise optuna.TrialPruned
        return value

    return objective


def _suggest(trial: Any, name: str, space: Range | Choice) -> Any:
    if isinstance(space, Choice):
        return trial.suggest_categorical(name, list(space.values))
    if space.integer:
        return trial.suggest_int(name, int(space.low), int(space.high), log=space.log)
    return trial.suggest_float(name, space.low, space.high, log=space.log)


def _runs(study: Any, round: int) -> list[Run]:
    """The trials that have ended by themselves."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name not in ("COMPLETE", "PRUNED"):
            continue
        kept = trial.user_attrs.get("curve", [])
        curve = tuple(math.nan if each is None else each for each in kept)
        failed = trial.state.name == "PRUNED" and (not curve or not math.isfinite(curve[-1]))
        state: Any = "complete" if trial.state.name == "COMPLETE" else "failed" if failed else "pruned"
        value = trial.value if state == "complete" else curve[-1] if curve and not failed else None
        found.append(Run(round, trial.number, dict(trial.params), value, state, curve))
    return found


def _narrowed(space: Space, runs: list[Run], maximize: bool) -> Space:
    """The space around the best run; choices stay."""
    best = SearchReport(tuple(runs), space, (space,), maximize).best
    if best is None:
        raise DiagnoseError("no run of the first round was completed: there is no best to search around")
    return {
        name: each if isinstance(each, Choice) else each.narrowed(best.settings[name], NARROWED)
        for name, each in space.items()
    }
