"""One object for a whole cluster: a named actor that outlives its maker and comes back.

`share` starts an actor that holds what a factory makes, or finds the one that is there, and
returns a stand-in with the same methods. The actor belongs to no driver; when its process dies,
Ray starts it again, the factory opens the object anew, and calls that were on their way are made
again. So everything that must last lies in what the factory opens, and every method must bear
being called twice.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# Ray's annotations are partial.

import os
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError
from cluster.session import NAMESPACE

_CONCURRENT_CALLS = 16


@ray.remote
class _Host:
    """Holds the object; opened at the first call, so that a failure to open is an answer."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self._factory = factory
        self._object: Any = None

    def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        try:
            if self._object is None:
                self._object = self._factory()
            return True, getattr(self._object, method)(*args, **kwargs)
        except Exception as error:
            return False, error

    def pid(self) -> int:
        return os.getpid()


class Shared:
    """Stands in for the shared object: its methods run in the actor, and raise as they do there.

    May be sent to other workers of the cluster.

    Args:
        name: The actor's.
        factory: Makes the object where the actor runs. Travels through the cluster, so it holds
            no secret.
        methods: The methods that may be called.
    """

    def __init__(self, name: str, factory: Callable[[], Any], methods: Sequence[str]) -> None:
        self._name = name
        self._factory = factory
        self._methods = tuple(methods)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or method not in self._methods:
            raise AttributeError(f"{self._name} shares no {method!r}")

        def call(*args: Any, **kwargs: Any) -> Any:
            done, answer = self._ask(method, args, kwargs)
            if not done:
                raise answer
            return answer

        return call

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (self._name, self._factory, self._methods)

    def _ask(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        try:
            try:
                return ray.get(self._actor().call.remote(method, args, kwargs))
            except RayActorError:  # It was ended for good; another takes its place.
                return ray.get(self._actor().call.remote(method, args, kwargs))
        except RayError as error:
            raise ClusterError(f"{self._name} cannot be reached: {error}") from error

    def _actor(self) -> Any:
        node = ray.get_runtime_context().get_node_id()
        return _Host.options(  # pyright: ignore[reportFunctionMemberAccess]
            name=self._name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=_CONCURRENT_CALLS,
            num_cpus=0,
            # Beside whoever asks first, if it can be: that is where its files are.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
        ).remote(self._factory)


def share(name: str, factory: Callable[[], Any], methods: Sequence[str]) -> Shared:
    """Starts a shared object on the connected Ray, or finds the one of that name.

    Args:
        name: Unique in the cluster.
        factory: Makes the object; see `Shared`.
        methods: The methods that may be called; each bears being called twice.

    Raises:
        ClusterError: If Ray is not connected.
    """
    if not ray.is_initialized():
        raise ClusterError(f"{name}: Ray is not connected; see `cluster.connect`")
    return Shared(name, factory, methods)


def process_of(shared: Shared) -> int:
    """Returns the process id of the actor, on whatever machine it runs."""
    return int(ray.get(shared._actor().pid.remote()))  # pyright: ignore[reportPrivateUsage]
