"""A keyboard, a mouse and a tablet whose user is a Python program: USB devices of the HID class (HID 1.11, HID Usage Tables, usb.org).

Events are queued until the guest has opened the device. Keys are those of a US keyboard.
"""

from __future__ import annotations

import struct

from trivisor.core.errors import InvalidSpec
from trivisor.vos.devices.usb import Endpoint, Interface, Setup, UsbDevice
from trivisor.vos.devices.usbredir import Stall

_IN = 0x81
_GET_DESCRIPTOR, _REPORT = 6, 0x22
_CLASS_OUT = 0x21

_KEYBOARD = bytes.fromhex(
    "05010906a101050719e029e71500250175019508810295017508810395057501050819012905910295017503910395067508150025650507190029658100c0"
)
_MOUSE = bytes.fromhex("05010902a1010901a1000509190129031500250195037501810295017505810305010930093109381581257f750895038106c0c0")
_TABLET = bytes.fromhex("05010902a1010901a10005091901290315002501950375018102950175058103050109300931150026ff7f350046ff7f751095028102c0c0")
BUTTONS = ("left", "right", "middle")
MODIFIERS = {"ctrl": 1, "shift": 2, "alt": 4, "meta": 8}
_PLAIN = "abcdefghijklmnopqrstuvwxyz1234567890\n\x1b\b\t -=[]\\#;'`,./"
_SHIFTED = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ!@#$%^&*()\0\0\0\0\0_+{}|\0:"~<>?'
_NAMED = {"enter": 40, "escape": 41, "backspace": 42, "tab": 43, "space": 44, "delete": 76, "right": 79, "left": 80, "down": 81, "up": 82}
_NAMED |= {"home": 74, "end": 77, "page-up": 75, "page-down": 78, "insert": 73} | {f"f{number}": 57 + number for number in range(1, 13)}


class _Hid(UsbDevice):
    """What the three have in common. `report` is the report descriptor."""

    report = b""
    boot = 0

    def __init__(self) -> None:
        extra = struct.pack("<BBHBBBH", 9, 0x21, 0x0111, 0, 1, _REPORT, len(self.report))
        self.interfaces = (Interface(3, int(bool(self.boot)), self.boot, (Endpoint(_IN, "interrupt", 8, 4),), extra),)
        super().__init__()

    def control(self, setup: Setup, data: bytes) -> bytes:
        if setup.request == _GET_DESCRIPTOR and setup.value >> 8 == _REPORT:
            return self.report
        if setup.kind == _CLASS_OUT:  # idle rate, protocol, and which lights are on
            return b""
        raise Stall


class Keyboard(_Hid):
    """A keyboard."""

    names = ("Trivisor", "Keyboard")
    product = 0x0011
    report, boot = _KEYBOARD, 1

    def press(self, *keys: str) -> None:
        """Press keys together and let go: characters, MODIFIERS, or names such as "enter", "f1", "up". Raises InvalidSpec."""
        modifiers, codes = 0, []
        for key in keys:
            if key in MODIFIERS:
                modifiers |= MODIFIERS[key]
            else:
                code, shift = _key(key)
                codes.append(code)
                modifiers |= shift
        if len(codes) > 6:
            raise InvalidSpec(f"a keyboard takes six keys at once, not {len(codes)}")
        self.send(_IN, bytes([modifiers, 0, *codes]).ljust(8, b"\0"))
        self.send(_IN, bytes(8))

    def type(self, text: str) -> None:
        """Type characters one after the other. Raises InvalidSpec, before anything is typed, for one that has no key."""
        for letter in text:
            _key(letter)
        for letter in text:
            self.press(letter)


class Mouse(_Hid):
    """A mouse with three buttons and a wheel."""

    names = ("Trivisor", "Mouse")
    product = 0x0012
    report, boot = _MOUSE, 2

    def move(self, x: int, y: int, wheel: int = 0) -> None:
        """Move by so much to the right and down, and turn the wheel away from the user."""
        while x or y or wheel:
            step = [max(-127, min(127, value)) for value in (x, y, wheel)]
            self.send(_IN, struct.pack("<Bbbb", 0, *step))
            x, y, wheel = x - step[0], y - step[1], wheel - step[2]

    def click(self, button: str = "left") -> None:
        """Press a button of BUTTONS and let go."""
        self.send(_IN, struct.pack("<Bbbb", _button(button), 0, 0, 0))
        self.send(_IN, bytes(4))


class Tablet(_Hid):
    """A pointer that is put where it shall be."""

    names = ("Trivisor", "Tablet")
    product = 0x0013
    report = _TABLET

    def __init__(self) -> None:
        super().__init__()
        self._at = (0, 0)

    def move(self, x: float, y: float) -> None:
        """Go to that part of the width and of the height, each from 0 to 1. Raises InvalidSpec."""
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise InvalidSpec(f"a place on a tablet is from 0 to 1, not {x!r}, {y!r}")
        self._at = (round(x * 32767), round(y * 32767))
        self.send(_IN, struct.pack("<BHH", 0, *self._at))

    def click(self, button: str = "left") -> None:
        """Press a button of BUTTONS where it is, and let go."""
        self.send(_IN, struct.pack("<BHH", _button(button), *self._at))
        self.send(_IN, struct.pack("<BHH", 0, *self._at))


def _key(key: str) -> tuple[int, int]:
    """Return a key's usage and the modifiers that it takes."""
    if key in _NAMED:
        return _NAMED[key], 0
    if len(key) == 1 and key != "\0":
        for keys, shift in ((_PLAIN, 0), (_SHIFTED, MODIFIERS["shift"])):
            if key in keys:
                return 4 + keys.index(key), shift
    raise InvalidSpec(f"the keyboard has no key {key!r}", hint=f"a character of a US keyboard, {', '.join((*MODIFIERS, *_NAMED))}")


def _button(name: str) -> int:
    if name not in BUTTONS:
        raise InvalidSpec(f"a mouse has no button {name!r}", hint=f"it has {', '.join(BUTTONS)}")
    return 1 << BUTTONS.index(name)
