"""Stages read from top to bottom: what each instruction makes of the config, and what is to be done to files."""

from __future__ import annotations

import msgspec
import pytest

from trivisor.core.errors import RecipeError
from trivisor.images.model import Healthcheck, ImageConfig, RootFs, RunConfig
from trivisor.va.build.mounts import Mount
from trivisor.va.build.parse import parse
from trivisor.va.build.state import PATH, Copy, Folder, Run, State, Step

BASE = ImageConfig(
    "amd64",
    "linux",
    RootFs("layers", []),
    RunConfig(env=["A=base", "PATH=/p"], entrypoint=["/e"], cmd=["c"], user="u", working_dir="/w", labels={"a": "1"}, on_build=["RUN x"]),
)


def stage(text: str, base: ImageConfig | None = None, outer: dict[str, str] | None = None, **given: str) -> tuple[RunConfig, list[Step]]:
    file = parse(text)
    state = State(file, given, outer or {})
    if base is not None:
        state.take(base.run, base.author)
    steps = [step for found in file.instructions if (step := state.read(found)) is not None]
    return state.final(), steps


def test_the_config() -> None:
    text = """
ENV B=$A C="x y"
LABEL b=$B
USER $A:staff
WORKDIR sub
WORKDIR ../x/
EXPOSE 80 53/udp 90-91
VOLUME /v "/a b"
STOPSIGNAL SIGUSR1
ENTRYPOINT ["/bin/e", "x"]
HEALTHCHECK --interval=1m30s --retries=3 CMD curl $HOME
ONBUILD RUN y
"""
    config, steps = stage(text, BASE)
    assert config == RunConfig(
        env=["A=base", "PATH=/p", "B=base", "C=x y"],
        entrypoint=["/bin/e", "x"],
        user="base:staff",
        working_dir="/w/x",
        labels={"a": "1", "b": "base"},
        exposed_ports={"80/tcp": {}, "53/udp": {}, "90/tcp": {}, "91/tcp": {}},
        volumes={"/v": {}, "/a b": {}},
        stop_signal="SIGUSR1",
        healthcheck=Healthcheck(["CMD-SHELL", "curl $HOME"], interval=90 * 10**9, retries=3),
        on_build=["RUN y"],
    )
    assert steps == [Folder(5, "/w/sub"), Folder(6, "/w/x")]


def test_a_command_is_its_own_or_the_bases() -> None:
    assert stage("CMD a b", BASE)[0].cmd == ["/bin/sh", "-c", "a b"]
    assert stage("CMD a", BASE)[0].entrypoint == ["/e"]
    assert stage('SHELL ["/bin/x"]\nCMD a\nENTRYPOINT b', BASE)[0].cmd == ["/bin/x", "a"]
    assert stage('ENTRYPOINT ["b"]', BASE)[0].cmd is None


def test_arguments() -> None:
    text = "ARG a=1 b\nARG c=$a\nENV e=$a$b$c\nARG e=no\nRUN $e"
    config, (run,) = stage(text, outer={"b": "outer", "c": "never"}, a="given")
    assert config.env == ["e=givenoutergiven"]
    assert isinstance(run, Run)
    assert run.env == {"PATH": PATH, "a": "given", "b": "outer", "c": "given", "e": "givenoutergiven"}
    assert stage("RUN x", http_proxy="p")[1][0].env["http_proxy"] == "p"  # type: ignore[union-attr]


def test_runs() -> None:
    text = "USER u\nWORKDIR /w\nENV T=t\nRUN --mount=type=cache,target=$T --network=none a $b\n"
    text += 'RUN ["a", "$b"]\nRUN <<E\nx\nE\nRUN <<E\n#!/bin/x\nE\nRUN a <<E\nb\nE'
    _, (_, shell, plain, here, script, piped) = stage(text)
    assert isinstance(shell, Run)
    assert (shell.argv, shell.user, shell.cwd, shell.network) == (("/bin/sh", "-c", "a $b"), "u", "/w", "none")
    assert shell.mounts == (Mount("cache", "/w/t", id="/w/t"),)
    assert [step.argv for step in (plain, here, piped) if isinstance(step, Run)] == [
        ("a", "$b"),
        ("/bin/sh", "-c", "x\n"),
        ("/bin/sh", "-c", "a <<E\nb\nE\n"),
    ]
    assert isinstance(script, Run)
    assert (script.argv, script.script) == ((), "#!/bin/x\n")


def test_copies() -> None:
    text = "ARG o=5\nWORKDIR /w\nCOPY --from=s --chown=$o:6 --chmod=750 --exclude=*.o a b c/\n"
    text += "ADD --checksum=sha256:1 x .\nCOPY <<A <<'B' /t/\n$o\nA\n$o\nB"
    _, (_, *copies) = stage(text)
    assert copies == [
        Copy(3, ("a", "b"), "/w/c/", "s", "5:6", 0o750, ("*.o",)),
        Copy(4, ("x",), "/w", unpack=True, checksum="sha256:1"),
        Copy(5, (), "/t/", texts=(("A", "5\n"), ("B", "$o\n"))),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "COPY a",
        "COPY a b c",
        "COPY --chmod=u+x a b",
        "EXPOSE x",
        "EXPOSE 0",
        "EXPOSE 70000",
        "EXPOSE 9-8",
        "STOPSIGNAL SIGNOT",
        "USER $none",
        "RUN --network=host x",
        "RUN []",
        "HEALTHCHECK x",
        "HEALTHCHECK NONE x",
        "HEALTHCHECK --interval=3 CMD x",
        "HEALTHCHECK --interval=1us CMD x",
        "HEALTHCHECK --retries=x CMD x",
        "HEALTHCHECK --retries=100000 CMD x",
        "HEALTHCHECK --interval=48h CMD x",
        "STOPSIGNAL RTMIN+99",
        "USER a:b:c",
        "VOLUME /",
        "ENV a",
        "WORKDIR ${a:?must be}",
        "COPY $none b c/",
    ],
)
def test_what_no_build_can_do(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        stage(f"ARG a=1\n{text.replace('${a:', '${b:')}")
    assert caught.value.line == 2


def test_healthchecks() -> None:
    assert stage('HEALTHCHECK CMD ["a", "b"]')[0].healthcheck == Healthcheck(["CMD", "a", "b"])
    assert stage("HEALTHCHECK none", BASE)[0].healthcheck == Healthcheck(["NONE"])
    assert (
        msgspec.json.encode(stage("HEALTHCHECK --timeout=1.5s CMD a")[0].healthcheck) == b'{"Test":["CMD-SHELL","a"],"Timeout":1500000000}'
    )
