"""Predicts memory per rank, time, energy and cost of a run from shapes alone, before the run is started.

    plan = plan.make_plan(resolved, engine_config, cluster)   # no weights are read, no rank is started
    print(table.format_plan(plan)); plan.to_dict()

`training/resolve.py` gives the student at every width; `memory.py` and `step_work.py` count bytes and work of a step.
`speed.py` predicts its time from datasheets or from the measurements of `machine_calibration.py`. `plan.py` adds up.
"""
