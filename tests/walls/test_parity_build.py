"""Images built from Containerfiles, each RUN behind a wall; and what machines wrote made into images."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from trivisor import VMM
from trivisor.core.errors import BuildFailed, InvalidSpec, RecipeError
from trivisor.core.spec import Wall
from trivisor.images.catalog import Image
from trivisor.images.registry.bounds import Bounds
from trivisor.va.build.build import build
from trivisor.va.build.cache import prune
from trivisor.va.build.events import BuildEvent
from trivisor.va.build.options import Options

Build = Callable[..., Image]
QUICK: dict[str, object] = {"network": "none", "memory": "128M"}


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    (folder / "d").mkdir(parents=True)
    (folder / "d/x").write_text("hello\n")
    (folder / "d/left.out").write_text("no\n")
    (folder / ".dockerignore").write_text("**/*.out\n")
    return folder


@pytest.fixture
def made(wall_vmm: VMM, wall: Wall, context: Path) -> Build:
    """Build a Containerfile, given as text."""

    def from_text(text: str, tags: Sequence[str] = ("built",), **options: object) -> Image:
        (context / "Containerfile").write_text(text)
        return build(wall_vmm, context, tags, options=Options(**{"wall": wall, **QUICK, **options}))  # type: ignore[arg-type]

    return from_text


@pytest.fixture(autouse=True)
def clean(wall_vmm: VMM) -> object:
    """Forget what the test built."""
    yield
    for image in wall_vmm.images.list():
        if image.name.startswith(("built", "committed")):
            wall_vmm.images.remove(image.name)
    prune(wall_vmm.images.store)


def said(vmm: VMM, wall: str, script: str, image: str = "built") -> str:
    with vmm.run(image, wall=wall, memory="128M") as machine:
        return machine.exec(["sh", "-c", script], check=True, user="0").text


WHOLE = """
ARG V=latest
FROM mini:$V AS base
ENV A=a
RUN echo $A > /one && rm /bin/yes && mkdir -p /deep/er && echo x > /tmp/x
FROM base AS tool
WORKDIR /w
COPY d/ here/
RUN cat here/x > y; echo here/* > names
FROM base
COPY --from=tool --chown=user:extra /w /w
COPY --chmod=750 <<E /etc/conf
A is $A
E
RUN --mount=type=secret,id=key --mount=type=bind,source=d,target=/lent --mount=type=cache,target=/kept <<E
cat /run/secrets/key /lent/x > /both
echo kept > /kept/log
E
USER user
RUN --mount=type=cache,target=/kept --mount=type=tmpfs,target=/none/here,size=1M \\
    id -u | cat - /kept/log > /w/me; echo >/none/here/x; echo /none/here/* >> /w/me; ! head -c 2M /dev/zero >/none/here/y
CMD ["cat", "/etc/conf"]
"""


@pytest.mark.walls("vm", "container", "gvisor")
def test_a_whole_recipe(wall_vmm: VMM, wall: Wall, made: Build) -> None:
    image = made(WHOLE, secrets={"key": b"hush\n"}, epoch=1_000_000, use_cache=False)
    assert (image.config.cmd, image.config.user, image.config.env) == (["cat", "/etc/conf"], "user", {"A": "a"})
    lines = said(wall_vmm, wall, "cat /one /w/y /w/names /etc/conf /both /w/me").splitlines()
    assert lines == ["a", "hello", "here/x", "A is a", "hush", "hello", "1000", "kept", "/none/here/x"]
    # coreutils of Debian 12 and its gVisor do not agree on statx.
    script = "stat -c '%u:%g %a' /w/here /etc/conf; ls /deep /tmp/x; ls -A /lent /run/secrets 2>/dev/null; test -e /bin/yes || echo gone"
    assert said(wall_vmm, "container", script) == "1000:2000 755\n0:0 750\n/tmp/x\n\n/deep:\ner\ngone\n"
    assert made(WHOLE, wall="container", secrets={"key": b"hush\n"}, epoch=1_000_000, use_cache=False).digest == image.digest


@pytest.mark.walls("container")
def test_a_step_is_done_once(wall_vmm: VMM, made: Build, context: Path) -> None:
    events: list[BuildEvent] = []
    first = made(WHOLE, secrets={"key": b"1"}, report=events.append)
    assert not [event for event in events if event.kind == "cached"]
    events.clear()
    os.utime(context / "d/x", (1, 1))
    assert made(WHOLE, secrets={"key": b"1"}, report=events.append).digest == first.digest
    assert sum(event.kind == "cached" for event in events) == 8
    events.clear()
    (context / "d/x").write_text("changed\n")
    made(WHOLE, secrets={"key": b"1"}, report=events.append)
    assert [event.text.split()[0] for event in events if event.kind == "cached"] == ["RUN", "WORKDIR"]
    events.clear()
    made(WHOLE, secrets={"key": b"1"}, use_cache=False, report=events.append)
    assert not [event for event in events if event.kind == "cached"]


@pytest.mark.walls("container")
def test_the_same_twice(wall_vmm: VMM, made: Build) -> None:
    """With a time for all files, and nothing found in the cache, the digest is the same."""
    text = "FROM mini\nWORKDIR /w\nRUN echo x > y; mkdir z\nCOPY d /d\nLABEL a=b"
    one = made(text, epoch=1_000_000)
    prune(wall_vmm.images.store)
    two = made(text, epoch=1_000_000, use_cache=False)
    assert one.digest == two.digest
    assert two.config.created == "1970-01-12T13:46:40Z"


LENT = """
FROM mini AS other
RUN mkdir -p /from && echo stage > /from/file
FROM mini
SHELL ["/bin/sh", "-eu", "-c"]
RUN --mount=type=tmpfs,target=/lent echo x > /lent/gone; echo $0 $- > /shell
RUN --mount=from=other,source=/from,target=/lent,rw cat /lent/file > /bound; echo changed > /lent/file; echo new > /lent/more
RUN --mount=from=other,source=/from/file,target=/lent-file cat /lent-file >> /bound
RUN --mount=type=secret,id=key,env=KEY --mount=type=secret,id=key,target=/s,mode=0440,uid=1000,gid=1000 \
    echo $KEY > /secret; stat -c %a:%u:%g /s >> /secret
RUN --mount=type=secret,id=unknown test ! -e /run/secrets/unknown
RUN --mount=type=cache,id=two,target=/kept,mode=0750,uid=1000,gid=2000 echo one > /kept/file; stat -c %a:%u:%g /kept > /cached
RUN --mount=type=cache,id=two,target=/other,ro cat /other/file >> /cached; echo x > /other/file || echo refused >> /cached
RUN --mount=source=d,target=/lent,rw echo changed > /lent/x; echo new > /lent/more
RUN ["/bin/sh", "-c", "echo $HTTPS_PROXY $0 > /array", "me"]
"""


@pytest.mark.walls("container")
def test_what_a_step_is_lent(wall_vmm: VMM, wall: Wall, made: Build, context: Path) -> None:
    """What a mount covered, and what was written there, is in no layer; nor are secrets and proxies in any key."""
    events: list[BuildEvent] = []
    image = made(LENT, secrets={"key": b"hush"}, arguments={"HTTPS_PROXY": "one"})
    lines = said(wall_vmm, wall, "cat /bound /secret /cached /array; ls -A /lent /kept /other 2>/dev/null; test -e /s || echo gone").split(
        "\n"
    )
    assert lines == ["stage", "stage", "hush", "440:1000:1000", "750:1000:2000", "one", "refused", "one me", "gone", ""]
    assert "HTTPS_PROXY" not in image.config.env and "u" in said(wall_vmm, wall, "cat /shell").split()[1]
    again = made(LENT, secrets={"key": b"another"}, arguments={"HTTPS_PROXY": "two"}, report=events.append)
    assert again.digest == image.digest and sum(event.kind == "cached" for event in events) == 10
    assert (context / "d/x").read_text() == "hello\n" and not (context / "d/more").exists()


@pytest.mark.walls("container")
def test_stages_are_built_side_by_side(made: Build) -> None:
    """Both wait for the other's step to have begun."""
    begun = {name: threading.Event() for name in ("a", "b")}

    def hear(event: BuildEvent) -> None:
        if event.kind == "begin" and event.text.startswith("RUN"):
            begun[event.stage].set()
            assert begun["b" if event.stage == "a" else "a"].wait(30)

    text = "FROM mini AS a\nRUN echo a > /a\nFROM mini AS b\nRUN echo b > /b\nFROM scratch\nCOPY --from=a /a /\nCOPY --from=b /b /"
    assert len(made(text, report=hear).layers) == 2


@pytest.mark.walls("container")
def test_triggers_and_targets(wall_vmm: VMM, wall: Wall, made: Build) -> None:
    made("FROM mini\nONBUILD RUN echo trigger > /t\nONBUILD COPY d/x /x", tags=["built-base"])
    image = made("FROM built-base AS here\nFROM nothere:1\nRUN false", target="here", labels={"l": "1"})
    assert said(wall_vmm, wall, "cat /t /x") == "trigger\nhello\n"
    assert image.config.run.on_build is None
    assert image.config.labels == {"l": "1"}


@pytest.mark.walls("container")
@pytest.mark.parametrize(
    ("text", "line", "error", "says"),
    [
        ("FROM mini\n\nRUN echo out; exit 3", 3, BuildFailed, "ended with status 3: out"),
        ('FROM mini\nRUN ["nothere"]', 2, BuildFailed, "ended with status 127"),
        ("FROM mini\nCOPY none /x", 2, RecipeError, "not there"),
        ("FROM mini\nCOPY d/left.out /x", 2, RecipeError, "not there"),
        ("FROM mini\nCOPY ../../etc/passwd /x", 2, RecipeError, "outside"),
        ("FROM mini\nCOPY --chown=nobody-here d /x", 2, RecipeError, "no user"),
        ("FROM mini\nCOPY --from=mini /none /x", 2, RecipeError, "not there"),
        ("FROM mini\nADD https://127.0.0.1:1/x /x", 2, RecipeError, "cannot be fetched"),
        ("FROM mini\nADD git@example.test:x.git /x", 2, RecipeError, "not fetched"),
        ("FROM mini\nRUN --mount=type=secret,id=k,required true", 2, RecipeError, "no secret k"),
        ("FROM scratch\nRUN true", 2, RecipeError, "no program"),
        ("FROM 127.0.0.1:1/none\nRUN true", 1, RecipeError, "neither a stage nor an image"),
        ("FROM Mini!", 1, RecipeError, "FROM Mini!"),
        ("FROM mini AS a\nCOPY --from=a /x /x", 1, RecipeError, "circle"),
    ],
)
def test_errors_name_the_line(made: Build, text: str, line: int, error: type[BuildFailed | RecipeError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        made(text, access={"bounds": Bounds(tries=1)})
    assert caught.value.line == line
    assert str(caught.value).startswith(f"Containerfile:{line}: ")


@pytest.mark.walls("container")
def test_a_step_has_its_time(made: Build) -> None:
    for seconds in (0.5, 5, 30):  # a busy host may take more than the first to begin
        with pytest.raises(BuildFailed, match=f"did not end in {seconds} s") as caught:
            made("FROM mini\nRUN echo begun; sleep 60", timeout=seconds)
        if caught.value.output:
            break
    assert caught.value.output == b"begun\n"


@pytest.mark.walls("container")
def test_what_a_stage_unpacked_stays(wall_vmm: VMM, made: Build) -> None:
    """For the next build, which finds its steps in the cache; no image has these layers."""

    def trees() -> set[Path]:
        wall_vmm.sweep()
        return set((wall_vmm.home / "cache/trees").glob("*[!k]"))  # no locks

    before = trees()
    made("FROM mini AS tool\nRUN echo x > /x\nFROM mini\nCOPY --from=tool /x /y")
    assert len(trees() - before) == 1  # of the tool; nobody looked into what was built
    wall_vmm.images.remove("built")
    prune(wall_vmm.images.store)
    assert trees() <= before


@pytest.mark.walls("vm")
def test_what_a_virtual_machine_ran_on_goes(wall_vmm: VMM, made: Build) -> None:
    """Each step's root is a file of its own, and no ice is made of it."""
    cache = wall_vmm.home / "cache"
    before = {*cache.glob("roots/*[!k]"), *cache.glob("ran-*")}
    made("FROM mini\nRUN echo 1 > /1\nRUN echo 2 > /2\nRUN echo 3 > /3", use_cache=False)
    assert len({*cache.glob("roots/*[!k]"), *cache.glob("ran-*")} - before) <= 1  # the base's


@pytest.mark.walls("vm", "container")
def test_ctrl_c(wall_vmm: VMM, made: Build) -> None:
    """While two stages are in a step: the build ends at once, and so do their machines."""
    before = {machine.id for machine in wall_vmm.list()}
    saying: set[str] = set()
    one = threading.Lock()

    def hear(event: BuildEvent) -> None:
        with one:  # each stage tells in its own thread, and it is to be pressed once
            if event.kind == "output" and event.stage not in saying:
                saying.add(event.stage)
                if len(saying) == 2:
                    os.kill(os.getpid(), signal.SIGINT)

    run = "RUN echo begun; sleep 600"
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        made(f"FROM mini AS a\n{run}\nFROM mini AS b\n{run}\nFROM scratch\nCOPY --from=a / /\nCOPY --from=b / /", report=hear)
    assert time.monotonic() - begun < 120
    assert {machine.id for machine in wall_vmm.list()} == before


@pytest.mark.walls("container")
def test_a_failed_stage_ends_the_others(made: Build) -> None:
    text = "FROM mini AS a\nRUN sleep 600\nFROM mini AS b\nRUN exit 4\nFROM scratch\nCOPY --from=a / /\nCOPY --from=b / /"
    with pytest.raises(BuildFailed, match="status 4"):
        made(text)


@pytest.mark.walls("container")
def test_an_archive_and_a_link(wall_vmm: VMM, wall: Wall, made: Build, context: Path, tmp_path: Path) -> None:
    """ADD unpacks, COPY does not; a link of the base is followed on the way."""
    import tarfile

    with tarfile.open(context / "a.tar.gz", "w:gz") as archive:
        archive.add(context / "d/x", "in/side")
    made("FROM mini\nRUN ln -s /usr /link\nADD a.tar.gz /link/\nCOPY a.tar.gz /link/as/it/is.tar.gz")
    assert said(wall_vmm, wall, "cat /usr/in/side; test -L /link && ls /usr/as/it") == "hello\nis.tar.gz\n"


@pytest.mark.walls("vm", "container", "gvisor")
def test_commit(wall_vmm: VMM, wall: Wall) -> None:
    with wall_vmm.run("mini", wall=wall, memory="128M") as machine:
        machine.exec(["sh", "-c", "echo x > /new; rm /bin/yes; chown user /new; mv /home /moved; mkdir /home"], check=True)
        image = machine.commit("committed", config={"env": {"A": "1"}, "cmd": ["true"]}, message="why")
        assert machine.exec(["cat", "/new"]).text == "x\n"  # it goes on
    assert (image.config.cmd, image.history[-1].comment) == (["true"], "why")
    script = "cat /new; stat -c %U /new; ls -A /home /moved; test -e /bin/yes || echo gone; echo $A"
    assert said(wall_vmm, "container", script, "committed").split() == ["x", "user", "/home:", "/moved:", "user", "gone", "1"]


@pytest.mark.walls("vm", "container", "gvisor")
def test_commit_of_a_disk_of_its_own(wall_vmm: VMM, wall: Wall) -> None:
    machine = wall_vmm.create("mini", wall=wall, memory="128M", disk="64M")
    machine.start()
    machine.exec(["sh", "-c", "echo x > /new"], check=True)
    machine.stop()
    machine.commit("committed")
    machine.delete()
    assert said(wall_vmm, wall, "cat /new", "committed") == "x\n"


@pytest.mark.walls("vm", "container")
def test_what_cannot_be_committed(wall_vmm: VMM, wall: Wall) -> None:
    with wall_vmm.run("mini", wall=wall, memory="128M", disk="ram") as machine, pytest.raises(InvalidSpec, match="in its memory alone"):
        machine.commit("committed")
    if wall == "vm":
        return  # it runs on no host's root
    with wall_vmm.run("host", wall=wall, memory="128M") as machine, pytest.raises(InvalidSpec, match="host's own root"):
        machine.commit("committed")
    with wall_vmm.run("mini", wall=wall, memory="128M") as machine, pytest.raises(InvalidSpec, match="has no shape"):
        machine.commit("committed", config={"shape": 1})
