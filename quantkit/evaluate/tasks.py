"""lm-eval's tasks, through lm-eval itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError


def find_tasks(tasks: list[str]) -> tuple[Any, list[str]]:
    """lm-eval's task manager, and the tasks as it names them.

    Args:
        tasks: lm-eval's names, or paths of task files (YAML).

    Raises:
        QuantkitError: lm-eval is not installed, or does not know a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise QuantkitError("--tasks needs lm-eval: pip install 'quantkit[lm-eval]'") from None
    manager, names = TaskManager(), []
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            if not Path(task).is_file():
                raise QuantkitError(f"{task}: no such task file")
            names.append(str(Path(task).resolve()))
        elif manager.match_tasks([task]):
            names.append(task)
        else:
            raise QuantkitError(
                f"{task}: lm-eval knows no such task; `lm-eval ls tasks` lists them"
            )
    return manager, names


def run_tasks(
    model: Any, tokenizer: Any, tasks: list[str], *, limit: int | None = None
) -> dict[str, Any]:
    """Task -> its metrics.

    Args:
        model: as `quantkit.load` gives it.
        tasks: lm-eval's names, or paths of task files (YAML).
        limit: use at most so many examples of each.

    Raises:
        QuantkitError: lm-eval is not installed, does not know a task, or cannot have its data.
    """
    manager, names = find_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=names,
            limit=limit,
            task_manager=manager,
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise QuantkitError(f"lm-eval: {' '.join(str(error).split())[:200]}") from None
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(v) for name, v in metrics.items() if isinstance(v, (int, float))}
