"""Runs that Prefect's server counts as running although their worker has ended."""

from flows import http


def close(server: str, pool: str, deployment: str) -> None:
    """Tell the server that runs whose worker has ended, and their tasks, are not running; nobody else does."""
    unfinished = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    of_pool = {"work_pools": {"name": {"any_": [pool]}}}
    for run in http.json(f"{server}/api/flow_runs/filter", of_pool | {"flow_runs": unfinished}) or []:
        cancelled = run["state_type"] == "CANCELLING"
        _set_state(server, f"flow_runs/{run['id']}", "CANCELLED" if cancelled else "CRASHED")
    of_deployment = {"deployments": {"name": {"any_": [deployment]}}}
    for task in http.json(f"{server}/api/task_runs/filter", of_deployment | {"task_runs": unfinished}) or []:
        run = http.json(f"{server}/api/flow_runs/{task['flow_run_id']}")
        if run and run["state_type"] in ("CANCELLED", "CRASHED"):
            _set_state(server, f"task_runs/{task['id']}", run["state_type"])


def _set_state(server: str, run: str, kind: str) -> None:
    state = {"type": kind, "message": "The worker was stopped; run again to go on from the last checkpoint."}
    http.json(f"{server}/api/{run}/set_state", {"state": state, "force": True})
