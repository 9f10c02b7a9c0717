"""Results on record, each given out as long after its call as its program had taken."""

import asyncio
import concurrent.futures
import threading

from cir_jax.records import ExecResult


class Playback:
    """Answers calls in place of a sandbox; one thread holds back whatever is pending."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def submit(self, result: ExecResult) -> concurrent.futures.Future[ExecResult]:
        """The result, `result.wall_s` from now."""
        future: concurrent.futures.Future[ExecResult] = concurrent.futures.Future()
        due = self._loop.time() + result.wall_s
        self._loop.call_soon_threadsafe(self._loop.call_at, due, _answer, future, result)
        return future

    def close(self) -> None:
        """What is pending is never answered."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "Playback":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def at_once(result: ExecResult) -> concurrent.futures.Future[ExecResult]:
    """The result, now."""
    future: concurrent.futures.Future[ExecResult] = concurrent.futures.Future()
    future.set_result(result)
    return future


def _answer(future: concurrent.futures.Future[ExecResult], result: ExecResult) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(result)
