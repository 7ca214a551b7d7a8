"""A disk whose bad sectors are a Python set: a file system is made on it, and then loses a sector under a file. `bad_sectors.py`."""

from __future__ import annotations

from trivisor import VMM, ExecFailed, Machine
from trivisor.vos.devices import BlockDevice

SECTOR = 512


class Failing(BlockDevice):
    """A disk in this process's memory."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.data = bytearray(size)
        self.bad: set[int] = set()
        """Sectors that cannot be read."""

    def read(self, offset: int, length: int) -> bytes:
        if self.bad.intersection(range(offset // SECTOR, (offset + length) // SECTOR)):
            raise OSError(f"a bad sector in {length} bytes at {offset}")
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    def lose(self, content: bytes) -> None:
        """Have the sectors that hold `content` fail."""
        at = self.data.find(content)
        while at >= 0:
            self.bad.add(at // SECTOR)
            at = self.data.find(content, at + 1)


def lose_a_sector(vm: Machine) -> str:
    """Return what the machine's programs say of a good file and of one that lies on a bad sector."""
    disk = Failing(16 << 20)
    name = vm.devices.attach(disk).name
    vm.exec(f"mkfs.ext4 -q {vm.devices.node(name)} && mkdir -p /mnt/d && mount {vm.devices.node(name)} /mnt/d", check=True)
    vm.exec("echo precious >/mnt/d/good; echo doomed >/mnt/d/lost; sync; echo 3 >/proc/sys/vm/drop_caches", check=True)
    disk.lose(b"doomed\n")
    said = vm.files.read_text("/mnt/d/good")
    try:
        vm.exec("cat /mnt/d/lost", check=True)
    except ExecFailed as error:
        said += error.result.stderr.decode()  # type: ignore[attr-defined]
    vm.exec("umount /mnt/d", check=True)
    vm.devices.detach(name)
    return said


if __name__ == "__main__":
    with VMM() as vmm, vmm.run("debian", wall="vm") as machine:
        print(lose_a_sector(machine), end="")
