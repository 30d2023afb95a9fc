"""What a run will take, before it is started: memory per rank, time, energy and money, from shapes alone.

    plan = plan.make_plan(config, engine_config, cluster)     # no weights are read, no rank is started
    print(table.format_plan(plan)); plan.to_dict()

`resolve.py` knows the student at every width, `memory.py` and `step_work.py` count bytes and work of a step, `speed.py`
says how long a machine takes for it (from datasheets, or from `machine_calibration.py`'s measurements), `plan.py`
adds up.
"""
