"""Devices of the host, found and reported in a made /sys and /dev; and what QEMU is told of them, against QEMU's own words."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest

from trivisor.core.errors import HostLacks, InvalidSpec, NotFound
from trivisor.vmm.engines.vm import passthrough
from trivisor.vos.devices import PciPassthrough, UsbPassthrough, host_pci, host_usb
from trivisor.vos.devices.hostpci import check_pci
from trivisor.vos.devices.hostusb import find_usb, open_usb

USB = "sys/bus/usb/devices"
PCI = "sys/bus/pci/devices"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def link(path: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def usb(root: Path, port: str, identity: str, number: int, *, node: bool = True, driver: str = "", **more: str) -> None:
    vendor, product = identity.split(":")
    write(root / USB / port, idVendor=vendor, idProduct=product, busnum="1", devnum=str(number), bDeviceClass="00")
    write(root / USB / port, **more)
    if driver:
        (root / USB / f"{port}:1.0").mkdir(parents=True)
        link(root / USB / f"{port}:1.0/driver", root / f"sys/bus/usb/drivers/{driver}")
    if node:
        write(root / "dev/bus/usb/001", **{f"{number:03d}": "the node"})


@pytest.fixture
def plugged(tmp_path: Path) -> Path:
    usb(tmp_path, "usb1", "1d6b:0002", 1, bDeviceClass="09")
    usb(tmp_path, "1-1", "046d:c52b", 4, manufacturer="Logitech", product="USB\x1b Receiver", driver="usbhid")
    usb(tmp_path, "1-2.3", "0951:1666", 5, serial="E0D5", product="x" * 4000)
    usb(tmp_path, "1-2.4", "0951:1666", 6)
    return tmp_path


def test_what_is_plugged(plugged: Path) -> None:
    first, second, _ = host_usb(plugged)
    assert (first.id, first.port, first.maker, first.product) == ("046d:c52b", "1-1", "Logitech", "USB Receiver"), "no control characters"
    assert first.drivers == ("usbhid",)
    assert first.node == plugged / "dev/bus/usb/001/004"
    assert str(first).startswith("046d:c52b at 1-1: Logitech USB")
    assert str(first).endswith("used by usbhid")
    assert len(second.product) <= 126
    assert second.serial == "E0D5"


def test_which_is_meant(plugged: Path) -> None:
    assert find_usb(UsbPassthrough("046D:C52B"), plugged).port == "1-1"
    assert find_usb(UsbPassthrough("1-2.4"), plugged).id == "0951:1666"
    with pytest.raises(InvalidSpec, match=r"1-2\.3, 1-2\.4") as several:
        find_usb(UsbPassthrough("0951:1666"), plugged)
    assert 'UsbPassthrough("1-2.3")' in several.value.hint
    with pytest.raises(NotFound, match="dead:beef") as missing:
        find_usb(UsbPassthrough("dead:beef"), plugged)
    assert "046d:c52b at 1-1: Logitech" in missing.value.hint
    with pytest.raises(HostLacks, match="no USB"):
        host_usb(plugged / "nowhere")


def test_opened_or_not(plugged: Path) -> None:
    fd = open_usb(UsbPassthrough("046d:c52b"), plugged)
    assert os.read(fd, 8) == b"the node"
    os.close(fd)
    (plugged / "dev/bus/usb/001/005").unlink()
    with pytest.raises(HostLacks, match="No such file") as caught:
        open_usb(UsbPassthrough("1-2.3"), plugged)
    assert "/dev/bus/usb" in caught.value.hint
    assert not find_usb(UsbPassthrough("1-2.3"), plugged).permitted


@pytest.mark.skipif(os.geteuid() == 0, reason="needs to be no root: root may open everything")
def test_not_permitted(plugged: Path) -> None:
    (plugged / "dev/bus/usb/001/004").chmod(0)
    with pytest.raises(HostLacks, match="Permission denied") as caught:
        open_usb(UsbPassthrough("046d:c52b"), plugged)
    assert 'ATTR{idVendor}=="046d"' in caught.value.hint


@pytest.mark.parametrize("name", ["", "046d", "046d:c52b:1", "1-", "../../x", "1-2/3", None, "1-1\n"])
def test_no_usb_device(name: str) -> None:
    with pytest.raises(InvalidSpec):
        UsbPassthrough(name)


def pci(root: Path, address: str, identity: str, kind: str = "0x030000", driver: str = "", group: int | None = None) -> None:
    vendor, device = identity.split(":")
    folder = root / PCI / address
    write(folder, vendor=f"0x{vendor}", device=f"0x{device}", **{"class": kind})
    if driver:
        link(folder / "driver", root / f"sys/bus/pci/drivers/{driver}")
    if driver == "vfio-pci":
        (folder / f"vfio-dev/vfio{address[5:7]}").mkdir(parents=True)
        write(root / "dev/vfio/devices", **{f"vfio{address[5:7]}": ""})
        write(root / "dev", iommu="")
    if group is not None:
        link(folder / "iommu_group", root / f"sys/kernel/iommu_groups/{group}")
        (root / f"sys/kernel/iommu_groups/{group}/devices").mkdir(exist_ok=True)
        link(root / f"sys/kernel/iommu_groups/{group}/devices/{address}", folder)


def test_a_pci_device_whose_group_is_not_free(tmp_path: Path) -> None:
    pci(tmp_path, "0000:00:01.0", "8086:1901", "0x060400", "pcieport", 1)
    pci(tmp_path, "0000:01:00.0", "10de:1eb8", driver="vfio-pci", group=1)
    pci(tmp_path, "0000:01:00.1", "10de:10f8", "0x040300", "snd_hda_intel", 1)
    pci(tmp_path, "0000:01:00.2", "10de:1ad8", "0x0c0330", "", 1)
    with pytest.raises(HostLacks, match=r"group 1 not all are free: 0000:01:00.1 \(10de:10f8, snd_hda_intel\), .*no driver") as caught:
        check_pci(PciPassthrough("01:00.0"), tmp_path)
    assert "echo 0000:01:00.1 >/sys/bus/pci/devices/0000:01:00.1/driver/unbind" in caught.value.hint
    assert "0000:01:00.2/driver/unbind" not in caught.value.hint, "it has none"
    report = next(device for device in host_pci(tmp_path) if device.address == "0000:01:00.0")
    assert (report.group, len(report.members), report.driver, report.ready) == (1, 4, "vfio-pci", False)
    assert [member.address for member in report.members if member.free] == ["0000:00:01.0", "0000:01:00.0"]
    assert "IOMMU group 1, of 0000:00:01.0 (8086:1901, pcieport), " in str(report)
    assert "to do: modprobe vfio-pci" in str(report)


def test_a_pci_device_that_is_ready(tmp_path: Path) -> None:
    pci(tmp_path, "0000:01:00.0", "10de:1eb8", driver="vfio-pci", group=7)
    found = check_pci(PciPassthrough("0000:01:00.0"), tmp_path)
    assert found.node == tmp_path / "dev/vfio/devices/vfio01"
    assert found.todo == ()
    assert str(found).endswith("may be opened\nready")
    (tmp_path / "dev/iommu").unlink()
    with pytest.raises(HostLacks, match="may not be opened"):
        check_pci(PciPassthrough("0000:01:00.0"), tmp_path)
    (tmp_path / PCI / "0000:01:00.0/vfio-dev/vfio01").rmdir()
    with pytest.raises(HostLacks, match="no descriptor") as caught:
        check_pci(PciPassthrough("0000:01:00.0"), tmp_path)
    assert "IOMMUFD" in caught.value.hint


def test_no_iommu_and_no_device(tmp_path: Path) -> None:
    pci(tmp_path, "0000:00:03.0", "1af4:1000", driver="virtio-pci")
    with pytest.raises(HostLacks, match="no IOMMU in use") as caught:
        check_pci(PciPassthrough("0000:00:03.0"), tmp_path)
    assert "intel_iommu=on" in caught.value.hint
    assert "no IOMMU group" in str(host_pci(tmp_path)[0])
    with pytest.raises(NotFound) as missing:
        check_pci(PciPassthrough("0000:01:00.0"), tmp_path)
    assert "0000:00:03.0 (1af4:1000)" in missing.value.hint
    with pytest.raises(HostLacks, match="no PCI"):
        host_pci(tmp_path / "nowhere")


@pytest.mark.parametrize("address", ["", "1", "0000:01:00", "0000:01:00.8", "0000:01:20.0", "../x", None])
def test_no_pci_address(address: str) -> None:
    with pytest.raises(InvalidSpec):
        PciPassthrough(address)


def test_this_host_is_read_without_fault() -> None:
    for report in (host_usb, host_pci):
        try:
            assert all(str(device) for device in report())
        except HostLacks as error:
            assert error.hint


def known(qemu: str, kind: str, name: str) -> set[str]:
    done = subprocess.run([qemu, kind, f"{name},help"], capture_output=True, text=True, timeout=30, check=False)
    found = {line.split("=")[0].strip() for line in done.stdout.splitlines() if "=<" in line}
    if not found:
        pytest.skip(f"needs a QEMU that has {name}")
    return found | {"id", "driver", "bus", "qom-type"}


def test_qemu_knows_the_words() -> None:
    qemu = os.environ.get("TRIVISOR_QEMU", "qemu-system-x86_64")
    assert set(passthrough.usb_device("hot-x", "usb.0", 3)) <= known(qemu, "-device", "usb-host")
    assert passthrough.usb_device("hot-x", "usb.0", 3)["hostdevice"] == "/dev/fdset/3"


def test_a_newer_qemu_knows_the_words() -> None:
    qemu = os.environ.get("TRIVISOR_QEMU", "qemu-system-x86_64")
    backend, device = passthrough.pci_device("hot-x", "spare0")
    assert set(backend) <= known(qemu, "-object", "iommufd")
    assert set(device) <= known(qemu, "-device", "vfio-pci")
    assert device["iommufd"] == backend["id"]


def test_memory_may_be_pinned() -> None:
    with subprocess.Popen(["sleep", "60"]) as program:
        try:
            _, most = resource.prlimit(program.pid, resource.RLIMIT_MEMLOCK)
            resource.prlimit(program.pid, resource.RLIMIT_MEMLOCK, (4096, most))
            passthrough.allow_pinning(program.pid, 65536)
            assert resource.prlimit(program.pid, resource.RLIMIT_MEMLOCK) == (65536, most)
            passthrough.allow_pinning(program.pid, 4096)
            assert resource.prlimit(program.pid, resource.RLIMIT_MEMLOCK) == (65536, most), "it is never lowered"
            if most != resource.RLIM_INFINITY:
                try:
                    passthrough.allow_pinning(program.pid, most + 1024)
                except HostLacks as error:
                    assert "ulimit -l" in error.hint
        finally:
            program.kill()
