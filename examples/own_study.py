"""The sampler in an Optuna study of your own: here what is lowered is KL on text, not answer loss.

python examples/own_study.py [MODEL] [BUDGET] [TRIALS]
"""

import sys

import optuna

import mpsearch as mps
from mpsearch.allocate import knapsack
from mpsearch.asked import balanced
from mpsearch.console import Progress, quiet_libraries
from mpsearch.evaluate import Bench, all_layers
from mpsearch.guard import TextGuard
from mpsearch.quantizers import get_quantizer
from mpsearch.sizes import parse_size
from mpsearch.text import Text

quiet_libraries()
optuna.logging.set_verbosity(optuna.logging.WARNING)
defaults = ("builtin:smollm2-135m", "103MiB", "20")
name, budget, count = (*sys.argv[1:], *defaults[len(sys.argv) - 1 :])
model, budget_bytes, trials = mps.load_model(name), parse_size(budget), int(count)
space = mps.SearchSpace.default().resolve(model)
bank = mps.Bank(model, get_quantizer("rounding", space.target.name))

with Progress() as report:
    bank.build(all_layers(space), report)
    # Both while the model holds its reference weights: the prediction, and what is compared.
    facts = mps.FactSet.builtin()
    asked = tuple(balanced(facts.part("search"), 60))
    table = mps.measure_sensitivity(space, bank, facts, asked, around=False, report=report)
    guard = TextGuard(model, Text.builtin().search)

    study = optuna.create_study(
        directions=["minimize", "minimize"],  # a loss in nats, stored bytes
        sampler=mps.LevelSwitchSampler(space, table.fisher_nats, budget_bytes, seed=0),
    )
    study.enqueue_trial(dict(knapsack(space, table.fisher_nats, [budget_bytes])[0]))

    with Bench(space, bank) as bench:

        def objective(trial: optuna.Trial) -> tuple[float, int]:
            assignment = mps.Assignment.of(
                {
                    group: trial.suggest_categorical(group, [fmt.name for fmt in formats])
                    for group, formats in space.options.items()
                }
            )
            bench.put(assignment)
            report("trials", trial.number, trials)
            return guard.score(bench.held).kl.mean, space.stored_bytes(assignment)

        study.optimize(objective, n_trials=trials)

first, best = study.trials[0], min(study.trials, key=lambda trial: trial.values[0])
print(f"knapsack: {first.values[0]:.3f} nats a token in {first.values[1]:,.0f} bytes")
print(f"best of {len(study.trials)}: {best.values[0]:.3f} nats in {best.values[1]:,.0f} bytes")
