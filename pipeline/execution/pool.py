"""Long-lived actors that work off tasks: which task goes where, and what a dead worker costs whom.

Two tasks at a time stand at each actor, so that none waits for the driver. An actor works in order, so of the tasks that
stood at one when it died the first unfinished one was at work: it alone is suspect, the other goes back to the queue as if
nothing had happened. An actor whose encoder broke (EncoderBrokenError) is ended, and counts as dead. A suspect has an
actor to itself from then on; half of the actors at most are busy with suspects while other work waits. An actor that
dies while it loads accuses no task: an encoder that cannot even encode a plain text stops the run.

What one deadly row costs: the unit dies twice, its pieces (an eighth, an eighth of that, …) once a level, and the row
three times alone before it is given up: 8 workers in a unit of 1,024 rows, 6 in one of 64, 3 in a unit of that row alone.
Each death costs the start of an actor and the loading of its encoder, while the other actors go on.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from pipeline.artifacts import StageOutput
from pipeline.errors import EncoderBrokenError, PipelineError, TransientError
from pipeline.execution.attempts import WORKER_LOST
from pipeline.execution.work import Done, Task

__all__ = ["ActorPool", "result_of"]

TASKS_PER_ACTOR = 2
DEATHS_OF_A_UNIT, DEATHS_OF_A_PIECE, DEATHS_ALONE = 2, 1, 3
"""Workers that a whole task, a piece of one, and a piece that cannot be cut may kill."""
SILENCE_S = 30.0
"""After so long without news, it is said how many actors still wait for room, or load."""


@dataclass(eq=False)
class _Item:
    """A task, or a piece of one, with what happened to it."""

    place: int
    task: Task
    deaths: int = 0
    transient: int = 0
    is_piece: bool = False
    failures: list[str] = field(default_factory=list)
    """Why attempts failed, oldest first; of a task that was cut, with its first piece, so that each is counted once."""

    @property
    def is_suspect(self) -> bool:
        return self.is_piece or self.deaths > 0


@dataclass(eq=False)
class _Lane:
    """An actor, and what stands at it, in order."""

    actor: Any
    loading: Any
    """The call that loads its encoder; None once it has."""
    queue: deque[tuple[Any, _Item]] = field(default_factory=deque)

    @property
    def references(self) -> list[Any]:
        return [self.loading] if self.loading is not None else [reference for reference, _ in self.queue]

    @property
    def has_suspect(self) -> bool:
        return any(item.is_suspect for _, item in self.queue)


class ActorPool:
    """Works off tasks on actors, replaces those that die, and finds the task that killed them.

    Args:
        start: Starts an actor; its `load` answers once it can work.
        submit: Gives an actor a task, and which attempt at it this is; returns the reference of a Done.
        record: Performs a task here: those that give up another.
        size: Number of actors.
        max_retries: Further tries after a transient error, and after a death of a task that has no rescue.
    """

    def __init__(
        self,
        *,
        start: Callable[[], Any],
        submit: Callable[[Any, Task, int], Any],
        record: Callable[[Task], Done],
        size: int,
        max_retries: int,
    ) -> None:
        self._start, self._submit, self._record = start, submit, record
        self._size, self._max_retries = size, max_retries
        self._waiting: deque[_Item] = deque()
        self._suspects: deque[_Item] = deque()
        self._lanes: list[_Lane] = []
        self._left: dict[int, int] = {}
        self._done: dict[int, list[Done]] = {}
        self._dead_at_loading = 0

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        """Yield (place among the tasks, result) as they finish.

        Raises:
            TransientError: Workers die, and not of a task.
            PipelineError: What a task raised.
        """
        import ray

        self._waiting.extend(_Item(place, task) for place, task in enumerate(tasks))
        self._left = dict.fromkeys(range(len(tasks)), 1)
        self._lanes = [self._new_lane() for _ in range(self._size)]
        try:
            while self._left:
                self._fill()
                references = [r for lane in self._lanes for r in lane.references]
                ready, _ = ray.wait(references, num_returns=1, timeout=SILENCE_S)
                if not ready:
                    self._say_who_waits()
                for reference in ready:
                    yield from self._settle(
                        next(lane for lane in self._lanes if reference in lane.references)
                    )
        finally:
            for lane in self._lanes:
                ray.kill(lane.actor)

    def _say_who_waits(self) -> None:
        loading = sum(lane.loading is not None for lane in self._lanes)
        if loading:
            structlog.get_logger().info(
                "waiting_for_actors", loading=loading, ready=len(self._lanes) - loading
            )

    def _new_lane(self) -> _Lane:
        actor = self._start()
        return _Lane(actor, actor.load.remote())

    def _fill(self) -> None:
        """Give out what waits, as far as there is room."""
        lanes = sorted((lane for lane in self._lanes if lane.loading is None), key=_standing)
        busy = sum(lane.has_suspect for lane in lanes)
        room = max(1, self._size // 2) if self._waiting else self._size
        for lane in lanes:
            if self._suspects and not lane.queue and busy < room:
                self._give(lane, self._suspects.popleft())
                busy += 1
        # These get nothing more, so that they will be free for the suspects.
        kept_free = min(len(self._suspects), room - busy)
        for lane in [lane for lane in lanes if not lane.has_suspect][max(0, kept_free) :]:
            while self._waiting and len(lane.queue) < TASKS_PER_ACTOR:
                self._give(lane, self._waiting.popleft())

    def _give(self, lane: _Lane, item: _Item) -> None:
        lane.queue.append((self._submit(lane.actor, item.task, len(item.failures) + 1), item))

    def _settle(self, lane: _Lane) -> Iterator[tuple[int, Done]]:
        """Take what an actor has finished; if it died, find out over what, and put another in its place."""
        if lane.loading is not None:
            said = _death_of(lane.loading)
            if said is None:
                result_of(lane.loading)
                lane.loading, self._dead_at_loading = None, 0
            else:
                self._replace(lane, said)
            return
        reference, item = lane.queue[0]
        said = _death_of(reference)
        if said is None:
            lane.queue.popleft()
            yield from self._take(item, reference)
            return
        others = [item for _, item in lane.queue][1:]
        self._waiting.extendleft(reversed(others))
        self._replace(lane, said)
        yield from self._blame(item, said)

    def _take(self, item: _Item, reference: Any) -> Iterator[tuple[int, Done]]:
        try:
            done = result_of(reference)
        except Exception as error:
            item.transient += 1
            item.failures.append(type(error).__name__)
            if not isinstance(error, TransientError) or item.transient > self._max_retries:
                _tell(item, logging.ERROR, "task_failed", str(error))
                raise
            _tell(item, logging.WARNING, "task_retried", str(error))
            self._queue(item)
            return
        yield from self._finish(item.place, replace(done, failures=tuple(item.failures)))

    def _finish(self, place: int, done: Done) -> Iterator[tuple[int, Done]]:
        self._left[place] -= 1
        self._done.setdefault(place, []).append(done)
        if self._left[place] == 0:
            del self._left[place]
            yield place, _joined(self._done.pop(place))

    def _replace(self, lane: _Lane, said: str) -> None:
        import ray

        self._dead_at_loading += lane.loading is not None
        if self._dead_at_loading > self._max_retries + self._size:
            raise _lost(
                f"{self._dead_at_loading} workers in a row died while they loaded the encoder ({said})"
            )
        ray.kill(lane.actor)
        self._lanes[self._lanes.index(lane)] = self._new_lane()

    def _queue(self, *items: _Item) -> None:
        for item in items:
            (self._suspects if item.is_suspect else self._waiting).append(item)

    def _blame(self, item: _Item, said: str) -> Iterator[tuple[int, Done]]:
        item.deaths += 1
        item.failures.append(WORKER_LOST)
        rescue = item.task.rescue
        if rescue is None:
            if item.deaths > self._max_retries:
                _tell(item, logging.ERROR, "task_failed", said)
                raise _lost(f"a worker died again and again ({said})")
            _tell(item, logging.WARNING, "task_retried", said)
            self._queue(item)
            return
        pieces = rescue.pieces()
        whole = DEATHS_OF_A_PIECE if item.is_piece else DEATHS_OF_A_UNIT
        if item.deaths < (whole if pieces else DEATHS_ALONE):
            _tell(item, logging.WARNING, "task_retried", said)
            self._queue(item)
        elif pieces:
            _tell(item, logging.WARNING, "task_cut", said)
            self._left[item.place] += len(pieces) - 1
            cut = [_Item(item.place, piece, is_piece=True) for piece in pieces]
            cut[0].failures = item.failures
            self._queue(*cut)
        else:
            _tell(item, logging.WARNING, "task_given_up", said)
            given_up = self._record(rescue.give_up(item.deaths, said))
            recorded = replace(given_up, peak_mb=0.0, failures=tuple(item.failures))
            yield from self._finish(item.place, recorded)


def _tell(item: _Item, level: int, event: str, message: str) -> None:
    """Log what an attempt came to."""
    place = {"stage": item.task.stage, "shard": item.task.shard, "attempt": len(item.failures)}
    structlog.get_logger().log(level, event, **place, reason=item.failures[-1], message=message)


def _standing(lane: _Lane) -> int:
    return len(lane.queue)


def _joined(pieces: Sequence[Done]) -> Done:
    """The result of a task that was cut: files under their role and the number of the piece, numbers added up."""
    if len(pieces) == 1:
        return pieces[0]
    files = {f"{role}-{i:04d}": ref for i, d in enumerate(pieces) for role, ref in d.output.files.items()}
    numbers: dict[str, int | float] = {}
    for done in pieces:
        for name, number in done.output.numbers.items():
            numbers[name] = numbers.get(name, 0) + number
    return Done(
        output=StageOutput(files=files, numbers=numbers),
        reused=all(done.reused for done in pieces),
        seconds=sum(done.seconds for done in pieces),
        peak_mb=max(done.peak_mb for done in pieces),
        failures=tuple(reason for done in pieces for reason in done.failures),
    )


# ------------------------------------------------------------------------------------------------ results


def _lost(problem: str) -> TransientError:
    return TransientError("ray", problem, "rerun: finished work is kept")


def _death_of(reference: Any) -> str | None:
    """Why the worker died at a call, or is as good as dead, in words that do not differ from run to run; None: it did not."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.OutOfMemoryError:
        return "it was killed for the memory it took"
    except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
        is_memory = "memory" in str(error) and "threshold" in str(error)
        return "it was killed for the memory it took" if is_memory else "its process ended"
    except ray.exceptions.RayTaskError as error:
        # What the task raised otherwise, `result_of` raises.
        return f"its encoder {error.cause.problem}" if isinstance(error.cause, EncoderBrokenError) else None
    except Exception:  # noqa: BLE001  (`result_of` raises it)
        return None
    return None


def result_of(reference: Any) -> Any:
    """A call's result; our own errors come out as themselves.

    Raises:
        TransientError: The worker died.
        PipelineError: What the call raised.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from error
        raise
    except (
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.RayActorError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.OutOfMemoryError,
    ) as error:
        raise _lost(f"a worker died again and again ({error})") from error
