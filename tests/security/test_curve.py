"""Executors with and without keys before a real engine loop, over real sockets."""

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import zmq

from executor_service import curve as executor_curve
from executor_service.inbox import Inbox, NewEpoch
from executor_service.link import Link
from executor_service.wire import Capacity
from scheduler_service.config import ProcessSpec, SchedulerSettings
from scheduler_service.engine.curve import AllowList, KeyFileError, authenticator, load_key
from scheduler_service.engine.loop import EngineLoop
from scheduler_service.engine.sockets import Router, bind_router, bound_endpoint
from tests.e2e.harness import eventually

SECONDS = 30.0


class Engine:
    """An engine on a thread of this process; with ``keys`` its executors need theirs."""

    def __init__(self, directory: Path, keys: Path | None) -> None:
        self._stack = ExitStack()
        context: zmq.Context[Router] = zmq.Context()
        self._stack.callback(context.destroy, linger=0)
        self.allowed: AllowList | None = None
        key = None
        if keys is not None:
            key, self.allowed = load_key(keys / "scheduler.key"), AllowList(keys / "executors")
            self._stack.callback(self.allowed.close)
            self._stack.enter_context(authenticator(context, self.allowed))
        api_endpoint = f"ipc://{directory / 'engine'}"
        executors = bind_router(context, "tcp://127.0.0.1:0", 1000, key)
        self.endpoint = bound_endpoint(executors)
        settings = SchedulerSettings(model=directory, lease=1.0)
        spec = ProcessSpec(settings=settings, scheduler_id="s", engine_endpoint=api_endpoint)
        api = bind_router(context, api_endpoint, 1000)
        self._loop = EngineLoop(spec, api, executors, executor_keys=self.allowed)
        self._thread = threading.Thread(target=self._loop.run)
        self._thread.start()

    @property
    def executors(self) -> set[str]:
        """Those that were welcomed and have not been lost."""
        return set(self._loop._registry.sessions)

    def close(self) -> None:
        self._loop.stop()
        self._thread.join()
        self._stack.close()


@pytest.fixture
def writable_keys(keys: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(keys, tmp_path / "keys"))


@contextmanager
def running(directory: Path, keys: Path | None) -> Iterator[Engine]:
    engine = Engine(directory, keys)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def dialling(endpoint: str, name: str, own: Path | None, scheduler: Path | None = None) -> Iterator[Inbox]:
    """An executor's real link, which answers every Welcome; its inbox."""
    inbox = Inbox()
    keys = None
    if own is not None:
        keys = executor_curve.load_keys(own / "executor-a.key", (scheduler or own) / "scheduler.pub")
    link = Link(endpoint, name, secrets.randbits(64), inbox, keys)
    link.start(Capacity(name, "m", "f", "k", "cpu", "float32", 100, 256, 4, 100, 8, 64))
    answering = threading.Event()

    def answer() -> None:
        while not answering.wait(0.02):
            if len(inbox) and isinstance(epoch := inbox.take(), NewEpoch):
                link.ready(epoch.epoch)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield inbox
    finally:
        answering.set()
        thread.join()
        link.close()


def refusals(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    return lambda: sum("does not take this executor's key" in record.getMessage() for record in caplog.records)


def test_an_executor_with_its_key_joins(keys: Path, tmp_path: Path) -> None:
    with running(tmp_path, keys) as engine, dialling(engine.endpoint, "friend", keys):
        assert eventually(lambda: "friend" in engine.executors, SECONDS)


@pytest.mark.parametrize("stranger", ["without keys", "with a key of its own", "with the wrong scheduler's key"])
def test_strangers_are_not_heard_and_do_not_disturb(
    stranger: str, keys: Path, foreign_keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, scheduler = {
        "without keys": (None, None),
        "with a key of its own": (foreign_keys, keys),
        "with the wrong scheduler's key": (keys, foreign_keys),
    }[stranger]
    with running(tmp_path, keys) as engine, dialling(engine.endpoint, "friend", keys):
        assert eventually(lambda: "friend" in engine.executors, SECONDS)
        with dialling(engine.endpoint, "stranger", own, scheduler):
            assert eventually(lambda: refusals(caplog)() > 0, SECONDS)
            assert engine.executors == {"friend"}


def test_an_executor_with_keys_tells_nothing_to_a_scheduler_without(
    keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path, None) as engine, dialling(engine.endpoint, "friend", keys):
        assert eventually(lambda: refusals(caplog)() > 0, SECONDS)
        assert engine.executors == set()


def test_a_revoked_key_ends_its_owners_session_and_a_restored_one_lets_it_back(
    writable_keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    public = writable_keys / "executors" / "a.pub"
    with running(tmp_path, writable_keys) as engine, dialling(engine.endpoint, "friend", writable_keys):
        assert eventually(lambda: "friend" in engine.executors, SECONDS)
        kept = public.rename(tmp_path / "a.pub")  # its connection lives on
        assert eventually(lambda: engine.executors == set(), SECONDS)
        assert "1 revoked" in caplog.text
        kept.rename(public)
        assert eventually(lambda: "friend" in engine.executors, SECONDS)


def test_without_anybody_to_check_keys_nobody_gets_in(
    keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context: zmq.Context[Router] = zmq.Context()
    try:
        socket = bind_router(context, "tcp://127.0.0.1:0", 10, load_key(keys / "scheduler.key"))
        with dialling(bound_endpoint(socket), "friend", keys):
            assert eventually(lambda: refusals(caplog)() > 0, SECONDS)
            assert not socket.poll(0)
    finally:
        context.destroy(linger=0)


def test_the_allow_list_ignores_what_is_no_key(writable_keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = writable_keys / "executors"
    (folder / "broken.pub").write_text('public-key = "short"\n')
    (folder / "README").write_text("what this is")
    allowed = AllowList(folder)
    try:
        assert len(allowed) == 2
        assert "broken.pub" in caplog.text
        shutil.rmtree(folder)
        allowed.refresh()
        assert len(allowed) == 2
        folder.mkdir()  # it is there again, and nobody may join
        allowed.refresh()
        assert len(allowed) == 0
    finally:
        allowed.close()


@pytest.mark.parametrize("content", ["", 'public-key = "x"\n', 'public-key = "' + "#" * 40 + '"\nsecret-key = "x"\n'])
def test_a_malformed_key_file_is_an_error(content: str, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.key"
    with pytest.raises(KeyFileError):
        load_key(file)
    file.write_text(content)
    with pytest.raises(KeyFileError):
        load_key(file)


def test_a_secret_is_not_in_the_representation(keys: Path) -> None:
    key = load_key(keys / "scheduler.key")
    own = executor_curve.load_keys(keys / "executor-a.key", keys / "scheduler.pub")
    assert key.secret.decode() not in repr(key)
    assert own.secret.decode() not in repr(own)
