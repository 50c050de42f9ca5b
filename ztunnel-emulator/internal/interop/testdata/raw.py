"""HTTP/2 frames by hand, over Python's ssl: for peers that write what h2 would not."""

import fcntl
import random
import select
import ssl
import struct
import termios
import time

import hpack

from peer import PATIENCE, want

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 1
END_HEADERS, PADDED = 4, 8
PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR, REFUSED_STREAM, COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 1, 3, 6, 7, 9, 11

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MOST = (1 << 31) - 1  # a window


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def setting(*pairs):
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", k, v) for k, v in pairs))


def window(stream, n):
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", n))


def reset(stream, code=8):
    return frame(RST_STREAM, 0, stream, struct.pack(">I", code))


class Raw:
    """A connection whose bytes are ours. It remembers what came, but for DATA."""

    def __init__(self, s, hello=PREFACE + setting(), skip=0):
        self.s = s
        self.skip = skip  # bytes that come before the first frame
        self.frames = []  # (kind, flags, stream, payload)
        self.buf = bytearray()
        self.data = 0  # bytes
        self.answers = {}  # headers, by their stream
        self.over = False
        self.code = None  # of GOAWAY
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        s.setblocking(False)
        self.send(hello)

    def block(self, *fields):
        return self.encoder.encode(fields)

    def connect(self, stream, authority, *more, flags=END_HEADERS):
        return frame(HEADERS, flags, stream, self.block((":method", "CONNECT"), (":authority", authority), *more))

    def send(self, data, reads=True):
        """All of data, and whether that went well. Reads what comes meanwhile; or does
        not, and gives up when nothing more is taken."""
        view = memoryview(data)
        while view and not self.over:
            try:
                view = view[self.s.send(view[:1 << 16]):]
                continue
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError, BlockingIOError):
                pass
            except (ssl.SSLError, OSError):
                self.over = True
            if reads:
                self.read()
                select.select([self.s], [self.s], [], PATIENCE)
            elif not select.select([], [self.s], [], 0.3)[1]:
                return False
        if reads:
            self.read()
        return not self.over

    def stuffed(self):
        """Wait, without reading, until no more comes: the kernel has no room."""
        last, since = -1, time.monotonic()
        while time.monotonic() - since < 0.2:
            n = struct.unpack("i", fcntl.ioctl(self.s, termios.FIONREAD, bytes(4)))[0]
            if n != last:
                last, since = n, time.monotonic()
            select.select([], [], [], 0.01)
        if not last:
            raise AssertionError("nothing has come")

    def read(self):
        """What is there."""
        while not self.over or self.code is None:
            try:
                data = self.s.recv(1 << 18)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                break
            except (ssl.SSLError, OSError):
                data = b""
            if not data:
                self.over = True
                break
            self.buf += data
            self.parse()

    def parse(self):
        at = min(self.skip, len(self.buf))
        self.skip -= at
        while len(self.buf) - at >= 9:
            length = int.from_bytes(self.buf[at:at + 3], "big")
            if len(self.buf) - at < 9 + length:
                break
            kind, flags, stream = struct.unpack(">BBI", self.buf[at + 3:at + 9])
            payload = bytes(self.buf[at + 9:at + 9 + length])
            at += 9 + length
            if kind == DATA:
                self.data += length
            elif kind == GOAWAY:
                self.code = struct.unpack(">I", payload[4:8])[0]
            else:
                self.frames.append((kind, flags, stream, payload))
            if kind == HEADERS:
                self.answers[stream] = self.decoder.decode(payload)
        del self.buf[:at]

    def wait(self, what, ready):
        end = time.monotonic() + PATIENCE
        while not ready():
            if self.over:
                raise EOFError(f"the connection ended before {what}")
            if time.monotonic() > end:
                raise TimeoutError(what)
            select.select([self.s], [], [], 0.05)
            self.read()

    def find(self, kind, stream=0, flags=0):
        return [f for f in self.frames if f[0] == kind and f[2] == stream and f[1] & flags == flags]

    def answered(self, status, *streams):
        """All of the streams have this status."""
        self.wait(f"{len(streams)} answers", lambda: all(stream in self.answers for stream in streams))
        want({self.answers[stream][0] for stream in streams}, {(":status", status)})

    def alive(self):
        data = random.randbytes(8)
        self.send(frame(PING, payload=data))
        self.wait("a pong", lambda: (PING, ACK, 0, data) in self.frames)
        want(self.code, None)

    def cut(self, *codes):
        """The connection ends. With a GOAWAY, of one of these codes; but that may be
        lost, when we are still writing."""
        end = time.monotonic() + PATIENCE
        while not self.over:
            if time.monotonic() > end:
                raise TimeoutError("it goes on")
            select.select([self.s], [], [], 0.05)
            self.read()
        if self.code is not None and self.code not in codes:
            raise AssertionError(f"GOAWAY {self.code}, want one of {codes}")

    def flood(self, data, *codes, reads=True):
        """Data again and again, until the connection is cut. Much of it may be on the
        way, in the buffers of two kernels, when that happens."""
        data *= max(1, (1 << 15) // len(data))
        sent = 0
        while self.send(data, reads):
            sent += len(data)
            if sent > 64 << 20:
                raise AssertionError("64 MiB and it goes on")
        if reads:
            self.cut(*codes)

    def close(self):
        self.s.close()
