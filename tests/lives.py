"""Hypothesis drives every verb in every state, with engines and keepers dying in between, against a model.

The model is the drawing in core/state.py. What is legal must work, what is illegal must be InvalidState and change
nothing, and at the end of each run nothing may be left on the host.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fake_engine import FakeEngine, engine_pid, keeper_pid
from host_state import assert_nothing_left, processes
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule, run_state_machine_as_test
from machine_home import TestHome

from trivisor import AlreadyExists, EngineError, InvalidState, Machine, NotFound, State
from trivisor.core.state import LEGAL

LIVE = (State.RUNNING, State.PAUSED)


class Lives(RuleBasedStateMachine):
    """Several machines of one home, through two managers as of two processes."""

    make_home: Callable[[Path], TestHome]
    engine: FakeEngine | None
    """The pretended one, which can be told to fail; None: the home's own."""
    machines = Bundle("machines")

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="lives-"))
        self.home = type(self).make_home(self.place / "home")
        self.vmm = self.home.open(self.engine)
        self.model: dict[str, State] = {}

    @initialize(target=machines)
    def first(self) -> str:
        return self.create()

    @rule(target=machines)
    def create_another(self) -> str:
        return self.create()

    def create(self) -> str:
        machine = self.vmm.create(self.home.image, wall="vm")
        self.model[machine.id] = State.CREATED
        return machine.id

    @rule(machine=machines)
    def create_with_its_name(self, machine: str) -> None:
        with pytest.raises(AlreadyExists):
            self.vmm.create(self.home.image, wall="vm", name=self.get(machine).name)

    @rule(step=st.sampled_from(["disk", "disk formatted"]))
    def create_fails(self, step: str) -> None:
        if self.engine is None:
            return
        self.engine.fail = step
        with pytest.raises(EngineError):
            self.vmm.create(self.home.image, wall="vm")

    @rule(machine=machines)
    def start(self, machine: str) -> None:
        self.verb(machine, "start", State.RUNNING)

    @rule(machine=machines, step=st.sampled_from(["control socket", "keeper spawned", "guest answered"]))
    def start_fails(self, machine: str, step: str) -> None:
        if self.engine is not None and self.model[machine] in LEGAL["start"]:
            self.engine.fail = step
            with pytest.raises(EngineError):
                self.get(machine).start()

    @rule(machine=machines)
    def pause(self, machine: str) -> None:
        self.verb(machine, "pause", State.PAUSED)

    @rule(machine=machines)
    def pause_fails(self, machine: str) -> None:
        if self.engine is not None and self.model[machine] is State.RUNNING:
            self.engine.fail = "signal"
            with pytest.raises(EngineError):
                self.get(machine).pause()

    @rule(machine=machines)
    def resume(self, machine: str) -> None:
        self.verb(machine, "resume", State.RUNNING)

    @rule(machine=machines)
    def stop(self, machine: str) -> None:
        self.verb(machine, "stop", State.STOPPED)

    @rule(machine=machines)
    def execute(self, machine: str) -> None:
        if self.model[machine] is State.RUNNING:
            assert self.get(machine).exec(["echo", machine]).text == f"{machine}\n"
            return
        for verb in (lambda it: it.exec(["true"]), lambda it: it.spawn(["true"]), lambda it: it.files.list("/"), lambda it: it.forward(1)):
            with pytest.raises(InvalidState):
                verb(self.get(machine))

    @rule(machine=machines)
    def stats(self, machine: str) -> None:
        if self.model[machine] in LIVE:
            assert self.get(machine).stats().private
        else:
            with pytest.raises(InvalidState):
                self.get(machine).stats()

    @rule(machine=machines)
    def delete_if_legal(self, machine: str) -> None:
        if self.model[machine] in LIVE:
            with pytest.raises(InvalidState):
                self.get(machine).delete()

    @rule(target=machines, machine=consumes(machines), force=st.booleans())
    def delete(self, machine: str, force: bool) -> object:
        held = self.get(machine)
        if not force and self.model[machine] in LIVE:
            return machine
        held.delete(force=force)
        del self.model[machine]
        for call in (held.start, held.stop, held.delete, held.info, lambda: held.exec(["true"]), lambda: self.get(machine)):
            with pytest.raises(NotFound):
                call()
        return multiple()

    @rule(machine=machines)
    def the_engine_dies(self, machine: str) -> None:
        self.dies(machine, engine_pid)

    @rule(machine=machines)
    def the_keeper_dies(self, machine: str) -> None:
        self.dies(machine, keeper_pid)

    @rule(machine=machines)
    def the_guest_powers_off(self, machine: str) -> None:
        if self.model[machine] is State.RUNNING:
            self.home.power_off(self.get(machine))
            assert self.get(machine).wait(60) == 0
            self.model[machine] = State.STOPPED

    @rule()
    def open_again(self) -> None:
        self.vmm.close()
        self.vmm = self.home.open(self.engine)

    @rule()
    def sweep(self) -> None:
        assert self.vmm.sweep() == []

    @invariant()
    def records_and_model_agree(self) -> None:
        with self.home.open() as other:
            assert {machine.id: machine.state for machine in other.list()} == self.model
            assert all(machine.info()["operation"] == "" for machine in other.list())

    def teardown(self) -> None:
        try:
            for machine in self.vmm.list():
                machine.delete(force=True)
            assert_nothing_left(self.home.root, set())
        finally:
            self.vmm.close()
            for pid in processes(self.home.root):
                with suppress(ProcessLookupError):  # it ends by itself
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.place)

    def get(self, machine: str) -> Machine:
        return self.vmm.get(machine)

    def verb(self, machine: str, verb: str, after: State) -> None:
        held = self.get(machine)
        before = held.info()
        if self.model[machine] in LEGAL[verb]:
            getattr(held, verb)()
            self.model[machine] = after
        else:
            with pytest.raises(InvalidState) as caught:
                getattr(held, verb)()
            assert caught.value.state == self.model[machine].value
            assert held.info() == before

    def dies(self, machine: str, pid_of: Callable[[Path], int]) -> None:
        if self.model[machine] not in LIVE:
            return
        held = self.get(machine)
        os.kill(pid_of(self.home.folder(held)), signal.SIGKILL)
        held.wait(60)
        self.model[machine] = State.FAILED


def drive(home: Callable[[Path], TestHome], engine: FakeEngine | None, *, examples: int, steps: int) -> None:
    """Run `examples` lives of at most `steps` steps each."""
    lives = type("Driven", (Lives,), {"make_home": staticmethod(home), "engine": engine})
    run_state_machine_as_test(
        lives,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # Shrinking runs real processes for minutes; the steps that are printed can be read as they are.
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
            print_blob=True,
        ),
    )
