"""Envelopes of packages: what is read of them, and what is refused, by name."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivisor.core.errors import ImageError
from trivisor.core.units import GIB, MIB
from trivisor.images.disks import ovf, xmltree
from trivisor.images.disks.ovf import Card, DiskEntry, File
from trivisor.images.disks.ovfwrite import Machine, render

REFERENCES = '<References><File ovf:id="f1" ovf:href="a.vmdk" ovf:size="100"/><File ovf:id="f2" ovf:href="b.vmdk"/></References>'
DISKS = (
    '<DiskSection><Info/><Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^30"/>'
    '<Disk ovf:diskId="d2" ovf:fileRef="f2" ovf:capacity="1048576"/><Disk ovf:diskId="d3" ovf:capacity="5" '
    'ovf:capacityAllocationUnits="MegaBytes"/></DiskSection>'
)
NETWORKS = '<NetworkSection><Info/><Network ovf:name="VM Network"><Description/></Network></NetworkSection>'


def item(kind: int, more: str = "", attributes: str = "") -> str:
    return f"<Item {attributes}><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>{kind}</rasd:ResourceType>{more}</Item>"


def count(number: int | str, units: str = "") -> str:
    return f"<rasd:AllocationUnits>{units}</rasd:AllocationUnits><rasd:VirtualQuantity>{number}</rasd:VirtualQuantity>"


def disk(name: str) -> str:
    return item(17, f"<rasd:HostResource>{name}</rasd:HostResource>")


def card(network: str, address: str = "") -> str:
    return item(10, f"<rasd:Address>{address}</rasd:Address><rasd:Connection>{network}</rasd:Connection>")


ITEMS = (
    item(3, count(2))
    + item(4, count(512, "byte * 2^20"))
    + item(6)
    + disk("ovf:/disk/d1")
    + disk("/disk/d2")
    + card("VM Network", "52:54:00:1:2:3")
)


def envelope(
    *,
    items: str = ITEMS,
    references: str = REFERENCES,
    disks: str = DISKS,
    networks: str = NETWORKS,
    more: str = "",
    system: str = "",
    hardware: str = "",
    head: str = "",
) -> bytes:
    return (
        f'<?xml version="1.0"?>{head}<Envelope xmlns="{ovf.OVF}" xmlns:ovf="{ovf.OVF}" xmlns:rasd="{ovf.RASD}" xmlns:vssd="{ovf.VSSD}" '
        f'xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:vbox="http://www.virtualbox.org/ovf/machine">{references}{disks}{networks}{more}'
        f'<VirtualSystem ovf:id="vm"><Info/><Name>the &amp; machine</Name>{system}'
        '<OperatingSystemSection ovf:id="96"><Info/><Description>Debian 12</Description></OperatingSystemSection>'
        f"<VirtualHardwareSection><Info/>{hardware}{items}</VirtualHardwareSection></VirtualSystem></Envelope>"
    ).encode()


def test_hardware_is_read() -> None:
    found = ovf.read(envelope(), "x")
    assert (found.name, found.cpus, found.memory, found.system) == ("the & machine", 2, 512 * MIB, "Debian 12")
    assert found.disks == (DiskEntry("a.vmdk", 8 * GIB), DiskEntry("b.vmdk", 1 << 20))
    assert found.cards == (Card("VM Network", "52:54:00:1:2:3"),)
    assert found.files == (File("a.vmdk", 100), File("b.vmdk", -1)) and found.left_out == ()
    assert ovf.read(envelope(items=ITEMS + disk("ovf:/disk/d3")), "x").disks[2] == DiskEntry(None, 5 * MIB)


VIRTUALBOX = f"""<?xml version="1.0"?>
<Envelope ovf:version="1.0" xml:lang="en-US" xmlns="{ovf.OVF}" xmlns:ovf="{ovf.OVF}" xmlns:rasd="{ovf.RASD}" xmlns:vssd="{ovf.VSSD}"
 xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xmlns:vbox="http://www.virtualbox.org/ovf/machine">
 <References><File ovf:id="file1" ovf:href="debian-disk001.vmdk"/></References>
 <DiskSection><Info>List</Info><Disk ovf:capacity="8589934592" ovf:diskId="vmdisk1" ovf:fileRef="file1" vbox:uuid="4a4e"/></DiskSection>
 <NetworkSection><Info>Logical</Info><Network ovf:name="NAT"><Description>Logical network.</Description></Network></NetworkSection>
 <VirtualSystem ovf:id="debian"><Info>A virtual machine</Info>
  <OperatingSystemSection ovf:id="96"><Info>The kind</Info><Description>Debian_64</Description>
   <vbox:OSType ovf:required="false">Debian_64</vbox:OSType></OperatingSystemSection>
  <VirtualHardwareSection><Info>Virtual hardware</Info>
   <System><vssd:ElementName>Family</vssd:ElementName><vssd:VirtualSystemType>virtualbox-2.2</vssd:VirtualSystemType></System>
   {item(3, count(2))}{item(4, count(1024, "MegaBytes"))}{item(5)}{item(23)}{item(35)}{card("NAT")}{disk("/disk/vmdisk1")}{item(15)}
  </VirtualHardwareSection>
  <vbox:Machine ovf:required="false" version="1.16-linux" uuid="{{ab}}" name="debian"><ovf:Info>Complete</ovf:Info></vbox:Machine>
 </VirtualSystem>
</Envelope>"""
ESXI = f"""<?xml version="1.0" encoding="UTF-8"?>
<Envelope vmw:buildId="build-1" xmlns="{ovf.OVF}" xmlns:cim="http://schemas.dmtf.org/wbem/wscim/1/common" xmlns:ovf="{ovf.OVF}"
 xmlns:rasd="{ovf.RASD}" xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:vssd="{ovf.VSSD}">
 <References><File ovf:href="web-disk1.vmdk" ovf:id="file1" ovf:size="500"/>
 <File ovf:href="web-file1.nvram" ovf:id="file2" ovf:size="8"/></References>
 <DiskSection><Info>Virtual disk information</Info><Disk ovf:capacity="16" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="vmdisk1"
  ovf:fileRef="file1" ovf:populatedSize="1"/></DiskSection>
 <NetworkSection><Info>The list</Info><Network ovf:name="VM Network"><Description>The VM Network</Description></Network></NetworkSection>
 <VirtualSystem ovf:id="web"><Info>A virtual machine</Info><Name>web</Name>
  <OperatingSystemSection ovf:id="101" vmw:osType="otherLinux64Guest"><Info>The kind</Info></OperatingSystemSection>
  <VirtualHardwareSection><Info>Virtual hardware requirements</Info><System><vssd:VirtualSystemType>vmx-13</vssd:VirtualSystemType></System>
   {item(3, count(4, "hertz * 10^6") + '<vmw:CoresPerSocket ovf:required="false">2</vmw:CoresPerSocket>')}
   {item(4, count(4096, "byte * 2^20"))}
   {item(6)}{item(20)}{item(15, attributes='ovf:required="false"')}{item(1, attributes='ovf:required="false"')}{disk("ovf:/disk/vmdisk1")}
   {item(10, '<rasd:Connection>VM Network</rasd:Connection><vmw:Config ovf:required="false" vmw:key="connectable" vmw:value="true"/>')}
   <vmw:Config ovf:required="false" vmw:key="cpuHotAddEnabled" vmw:value="false"/>
   <vmw:ExtraConfig ovf:required="false" vmw:key="nvram" vmw:value="ovf:/file/file2"/>
  </VirtualHardwareSection>
  <AnnotationSection ovf:required="false"><Info>A note</Info><Annotation>hello</Annotation></AnnotationSection>
 </VirtualSystem>
</Envelope>"""


def test_envelopes_are_read_as_others_write_them() -> None:
    found = ovf.read(VIRTUALBOX.encode(), "x")
    assert (found.name, found.cpus, found.memory, found.system) == ("debian", 2, GIB, "Debian_64")
    assert found.disks == (DiskEntry("debian-disk001.vmdk", 8 * GIB),) and found.cards == (Card("NAT"),)
    found = ovf.read(ESXI.encode(), "x")
    assert (found.name, found.cpus, found.memory) == ("web", 4, 4 * GIB) and found.cards == (Card("VM Network"),)
    assert found.disks == (DiskEntry("web-disk1.vmdk", 16 * GIB),) and len(found.files) == 2


def test_what_it_can_do_without_is_left_out_and_said() -> None:
    more = '<vmw:BootOrderSection ovf:required="false"><Info/></vmw:BootOrderSection>'
    system = '<vbox:Machine ovf:required="false"/><ProductSection><Info/><Property ovf:key="a"/></ProductSection>'
    hardware = '<vmw:Config ovf:required="false" vmw:key="x"/>'
    items = ITEMS + item(1) + item(24) + item(3, count(64), 'ovf:configuration="huge"') + item(4, count(9, "GigaBytes"), 'ovf:bound="max"')
    found = ovf.read(envelope(more=more, system=system, hardware=hardware, items=items), "x")
    assert (found.cpus, found.memory) == (2, 512 * MIB)
    assert [words.split()[0] for words in found.left_out] == ["BootOrderSection", "Machine", "Config", "a"]


REFUSED = {
    "FancySection": {"more": "<FancySection><Info/></FancySection>"},
    "DeploymentOptionSection": {"more": '<DeploymentOptionSection ovf:required="true"/>'},
    "BootOrderSection": {"system": "<vmw:BootOrderSection/>"},
    "InstallSection": {"system": "<InstallSection><Info/></InstallSection>"},
    "ExtraConfig": {"hardware": '<vmw:ExtraConfig vmw:key="a"/>'},
    "CoresPerSocket": {"items": item(3, count(2) + "<vmw:CoresPerSocket>1</vmw:CoresPerSocket>") + item(4, count(MIB))},
    "several machines": {"more": "<VirtualSystemCollection/>"},
    "a.vmdk is packed": {"references": REFERENCES.replace("ovf:size", 'ovf:compression="bzip2" ovf:size')},
    "is in pieces": {"references": REFERENCES.replace("ovf:size", 'ovf:chunkSize="5" ovf:size')},
    "elsewhere, or": {"references": REFERENCES.replace("a.vmdk", "http://example.com/a.vmdk")},
    "no plain name": {"references": REFERENCES.replace("a.vmdk", "../a.vmdk")},
    "'/etc/passwd'": {"references": REFERENCES.replace("a.vmdk", "/etc/passwd")},
    "'.hidden'": {"references": REFERENCES.replace("a.vmdk", ".hidden")},
    "two files": {"references": REFERENCES.replace("b.vmdk", "a.vmdk")},
    "two files are": {"references": REFERENCES.replace("f2", "f1")},
    "the size of a.vmdk": {"references": REFERENCES.replace('"100"', '"-1"')},
    "has a parent": {"disks": DISKS.replace("ovf:capacity=", 'ovf:parentRef="d2" ovf:capacity=', 1)},
    "does not have": {"disks": DISKS.replace('"f2"', '"f9"')},
    "two disks": {"disks": DISKS.replace('"d2"', '"d1"')},
    "a disk's size": {"disks": DISKS.replace('"8"', '"${size}"')},
    "no unit": {"disks": DISKS.replace("2^30", "2^99")},
    "which the package does not have": {"networks": ""},
    "a disk 'ovf:/disk/d9'": {"items": ITEMS + disk("ovf:/disk/d9")},
    "a disk 'ovf:/file/f1'": {"items": ITEMS + disk("ovf:/file/f1")},
    "0 processors": {"items": item(4, count(5))},
    "0 bytes of memory": {"items": item(3, count(5))},
    "the number of processors": {"items": item(3, count("many"))},
    "too many disks": {"items": ITEMS + disk("ovf:/disk/d1") * 70},
    "document type": {"head": '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>'},
    "document type, with which": {"head": "<!DOCTYPE Envelope>"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_refused_is_named(said: str) -> None:
    with pytest.raises(ImageError) as caught:
        ovf.read(envelope(**REFUSED[said]), "x.ovf")
    assert said in str(caught.value) and str(caught.value).startswith("x.ovf: ")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<a>",
        b"<a/>",
        b"\xff\xfe",
        b'<Envelope xmlns="http://www.vmware.com/schema/ovf/1/envelope"/>',
        b'<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/2"/>',
        f'<Envelope xmlns="{ovf.OVF}"/>'.encode(),
        b'<?xml version="1.0" encoding="no-such"?><a/>',
        b"<a>" * 40,
        b"<a>" + b"<b/>" * 30_000 + b"</a>",
        b"<a>" + b" " * xmltree.MAX + b"</a>",
    ],
    ids=range(11),
)
def test_what_is_no_envelope(data: bytes) -> None:
    with pytest.raises(ImageError):
        ovf.read(data, "x")


def test_what_is_written_is_read() -> None:
    machine = Machine('we<b> & "co"', 3, 700 * MIB + 1, (Card("nat"), Card("b&c", "52:54:00:00:00:01"), Card("nat")), "Linux <6>")
    found = ovf.read(render(machine, {"a-disk1.vmdk": (10, GIB), "a-disk2.vmdk": (20, MIB)}).encode(), "x")
    assert (found.name, found.cpus, found.memory, found.cards, found.system) == (machine.name, 3, 701 * MIB, machine.cards, machine.system)
    assert found.disks == (DiskEntry("a-disk1.vmdk", GIB), DiskEntry("a-disk2.vmdk", MIB)) and found.left_out == ()
    assert found.files == (File("a-disk1.vmdk", 10), File("a-disk2.vmdk", 20))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bytes_break_the_reader(data: st.DataObject) -> None:
    """Whatever becomes of parts of a good envelope: a machine, or one of our errors."""
    good = envelope()
    for _ in range(data.draw(st.integers(0, 5))):
        place = data.draw(st.integers(0, len(good)))
        gone = data.draw(st.integers(0, 40))
        put = data.draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"<", b"/>", b'"', b"ovf:", b"&x;", b"9" * 30, b"<Item/>", b"\0"]))
        )
        good = good[:place] + put + good[place + gone :]
    with suppress(ImageError):
        found = ovf.read(good, "x")
        assert found.cpus > 0 and found.memory > 0 and all(ovf.NAME.fullmatch(file.name) for file in found.files)
