"""A study's parameters, stored results and notebooks. What was made once is used again:

* a unit of work, where its key is the same: see `store`;
* a frame that one notebook saved for another, where `Study.inputs` are those it was made from: the
  model's content, device, dtype, seed, facts, the settings of the localisation (not for
  `queries`, which has them), and the code's versions (`Study.save`, `Study.load`, `results`);
* the facts that a model knows, kept beside its results, where `Study.origin` (those inputs less the
  localisation), `known_prompts` and `facts_per_relation` are the same: see `known`;
* a whole notebook, where its stamp holds its present cells, parameters, data, model, the code's
  versions and the stamps of what it reads, and its files are there: `driver.stamps`.

Raising a task's VERSION outdates the units of that task, and every frame, list of known facts and
notebook, since each holds all versions: they are made again, from the units of the other tasks.
Raising `identity.RESULTS_VERSION` outdates the same, but no unit.
"""
