"""Work that a cluster keeps going until it is done, whoever asked for it.

`keep` hands a function to a named actor, which calls it in a thread of its own and ends when it
returns. The actor belongs to no driver; when its process dies, Ray starts it again on its own
accord, and it calls the function anew. So the function must find by itself where it was.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# Ray's annotations are partial.

import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError
from cluster.session import NAMESPACE

_ANSWER_SECS = 60.0
_LOOK_AGAIN_SECS = 0.2

_T = TypeVar("_T")


@ray.remote
class _Keeper:
    """Begins when it is made: what is made again after a crash is not called by anybody."""

    def __init__(self, name: str, work: bytes, rest_secs: float) -> None:
        threading.Thread(target=self._run, args=(name, work, rest_secs), daemon=True).start()

    def _run(self, name: str, work: bytes, rest_secs: float) -> None:
        try:
            if ray.get_runtime_context().was_current_actor_reconstructed:
                time.sleep(rest_secs)
            pickle.loads(work)()  # what it imports is imported now
        finally:
            end(name)

    def pid(self) -> int:
        return os.getpid()


@ray.remote
def _call(function: Callable[[], Any]) -> Any:
    return function()


def keep(name: str, work: Callable[[], None], *, rest_secs: float = 0.0) -> None:
    """Starts work on the connected Ray; does nothing if it is under way there.

    It takes no CPU from what it starts, and stays on this process's node if that can be.

    Args:
        name: Unique in the cluster.
        work: Called until it has returned or raised once. Can be imported there, and travels
            through the cluster, so it holds no secret.
        rest_secs: How long it waits before it begins anew after its process has died.

    Raises:
        ClusterError: If Ray is not connected, or the actor cannot be started.
    """
    _check_connected(name)
    keeper = _start(name, pickle.dumps(work), rest_secs)
    try:
        ray.get(keeper.pid.remote(), timeout=_ANSWER_SECS)
    except GetTimeoutError as error:
        end(name)
        raise ClusterError(f"{name} does not start within {_ANSWER_SECS:g} s") from error
    except RayActorError:
        pass  # it is being started again, or was done before it could answer


def call_there(function: Callable[[], _T]) -> _T:
    """Calls a function once on the connected Ray, where `keep` would put work.

    Raises:
        ClusterError: If Ray cannot, or the function raises.
    """
    _check_connected("a call")
    there = cast(Any, _call).options(num_cpus=0, scheduling_strategy=_beside_us())
    try:
        return ray.get(there.remote(function), timeout=_ANSWER_SECS)
    except RayError as error:
        raise ClusterError(f"the cluster does not answer: {error}") from error


def is_kept(name: str) -> bool:
    """Whether work of this name is under way on the connected Ray, or being started again."""
    return _find(name) is not None


def end(name: str) -> None:
    """Ends work at once and for good, and every actor that it has started."""
    if (keeper := _find(name)) is not None:
        ray.kill(keeper, no_restart=True)


def process_of(name: str) -> int:
    """The process id of what keeps work going, on whatever machine it runs.

    Raises:
        ClusterError: If there is none.
    """
    if (keeper := _find(name)) is None:
        raise ClusterError(f"{name}: is not under way")
    return int(ray.get(keeper.pid.remote()))


def _start(name: str, work: bytes, rest_secs: float) -> Any:
    deadline = time.monotonic() + _ANSWER_SECS
    while True:
        try:
            return (
                cast(Any, _Keeper)
                .options(
                    name=name,
                    namespace=NAMESPACE,
                    lifetime="detached",
                    get_if_exists=True,
                    max_restarts=-1,
                    max_concurrency=2,
                    num_cpus=0,
                    scheduling_strategy=_beside_us(),
                )
                .remote(name, work, rest_secs)
            )
        except AssertionError as error:  # one of this name is ending: see `_find`
            if time.monotonic() > deadline:
                raise ClusterError(f"{name}: does not end") from error
            time.sleep(_LOOK_AGAIN_SECS)


def _check_connected(what: str) -> None:
    if not ray.is_initialized():
        raise ClusterError(f"{what}: Ray is not connected; see `cluster.connect`")


def _beside_us() -> NodeAffinitySchedulingStrategy:
    """This process's node, if that can be: there its files are."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


def _find(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:  # Ray's way to say that there is none
        return None
    except AssertionError:  # what it needs for a stand-in is gone, and the actor in this moment
        return None
