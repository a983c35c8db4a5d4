"""The Optuna study of a run: opened, checked to be this run's, cleared of what a kill left."""

from __future__ import annotations

from collections.abc import Mapping

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from mpsearch.assignment import Assignment
from mpsearch.errors import RunError
from mpsearch.run import Run
from mpsearch.space import ResolvedSpace
from mpsearch.trials import KILLED


def open_study(run: Run, space: ResolvedSpace) -> Study:
    """The study in the run's journal, a new one if there is none.

    Raises:
        RunError: the journal is damaged, or of another search; it is left as it is.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            study_name="mpsearch",
            storage=JournalStorage(JournalFileBackend(str(run.journal))),
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
        trials = study.get_trials(deepcopy=False)
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise RunError(_refusal(run, f"cannot be read ({error})")) from None
    if study.directions != [StudyDirection.MINIMIZE] * 2:
        raise RunError(_refusal(run, "is of a study with other objectives"))
    for trial in trials:
        if counts(trial) and not space.allows(trial.params):
            raise RunError(_refusal(run, f"holds trial {trial.number} of another search space"))
    enqueued = waiting(study, space)
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        if not counts(trial):  # a killed process left it
            Trial(study, trial._trial_id).set_user_attr(KILLED, True)
            # As others of its batch may have been told. A kill in here may have left it waiting.
            if space.allows(trial.params) and assignment_of(trial.params, space) not in enqueued:
                study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _refusal(run: Run, fault: str) -> str:
    return (
        f"'{run.journal}' {fault}; move it away and continue with --resume: whatever was scored on "
        "all facts is kept"
    )


def tried(study: Study, space: ResolvedSpace) -> set[Assignment]:
    """What measured trials had, those that were stopped early or refused as they gave NaN too."""
    trials = study.get_trials(deepcopy=False)
    return {assignment_of(trial.params, space) for trial in trials if counts(trial)}


def waiting(study: Study, space: ResolvedSpace) -> set[Assignment]:
    """Whole assignments that are enqueued."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    every = (trial.system_attrs.get("fixed_params", {}) for trial in trials)
    return {assignment_of(params, space) for params in every if space.allows(params)}


def assignment_of(params: Mapping[str, str], space: ResolvedSpace) -> Assignment:
    """A trial's parameters in the order of the space's groups, whatever their own is."""
    return Assignment.of({name: params[name] for name in space.options})


def proposed(study: Study) -> int:
    """How many of the search's own proposals have been measured."""
    trials = study.get_trials(deepcopy=False)
    return sum(trial.user_attrs.get("kind") == "search" and counts(trial) for trial in trials)


def counts(trial: FrozenTrial) -> bool:
    """Whether it ended by being measured, and not by a kill."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "refused" in trial.user_attrs
