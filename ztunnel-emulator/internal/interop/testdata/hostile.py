"""Peers that break the rules, or wear them out.

It is told the names of cases, a line each, and answers "done", or ends with what
went wrong. A client makes connections of its own in each case; a server does it to
the next that comes.
"""

import random
import socket
import struct
import sys

import peer
from peer import PATIENCE, Peer, context, dial, echo, say, want
from raw import *

# Both: what is done to a client as well as to a server. r has said hello, and on
# stream 1 an application is connected.


def random_bytes(r, _):
    """What looks like anything: at the latest a length is too large."""
    r.flood(random.randbytes(1 << 16), PROTOCOL_ERROR, FRAME_SIZE_ERROR, ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR, COMPRESSION_ERROR)


def random_frames(r, _):
    """Frames of all kinds with anything in them."""
    def any_frame():
        return frame(random.randrange(12), random.randrange(256), random.randrange(6), random.randbytes(random.choice((0, 4, 5, 6, 8, 9, 30))))
    for _ in range(50):
        if not r.send(b"".join(any_frame() for _ in range(10))):
            break
    r.s.close()


def ping_flood(r, _):
    r.flood(frame(PING, payload=b"are you?"), ENHANCE_YOUR_CALM)


def ping_flood_unread(r, _):
    """The answers are not read."""
    r.flood(frame(PING, payload=b"are you?"), ENHANCE_YOUR_CALM, reads=False)


def settings_flood(r, _):
    r.flood(setting((4, 65535)), ENHANCE_YOUR_CALM)


def settings_table(r, _):
    """The size of the header table goes up and down."""
    r.flood(setting((1, 0), (1, (1 << 32) - 1)), ENHANCE_YOUR_CALM)


def ack_flood(r, _):
    """Acknowledgements of nothing: they cost nothing but the time to read them."""
    r.send((frame(SETTINGS, ACK) + frame(PING, ACK, 0, b"nothing.")) * 50_000)
    r.alive()


def empty_data(r, _):
    r.flood(frame(DATA, 0, 1), ENHANCE_YOUR_CALM)


def padded_data(r, _):
    """Nothing but padding: it costs us what it costs the peer, and the window is
    given back."""
    r.send(frame(DATA, PADDED, 1, b"\xff" + bytes(255)) * (32 << 12))
    r.alive()


def priority_flood(r, _):
    r.flood(frame(PRIORITY, 0, 1, b"\x00\x00\x00\x03\x10"), ENHANCE_YOUR_CALM)


def unknown_flood(r, _):
    r.flood(frame(0x42, 0xff, 1, b"whatever"), ENHANCE_YOUR_CALM)


def reset_flood(r, _):
    """One stream is reset again and again."""
    r.flood(reset(1), ENHANCE_YOUR_CALM)


def window_overflow(r, _):
    r.send(window(0, MOST) * 2)
    r.cut(FLOW_CONTROL_ERROR)


def window_updates(r, _):
    """Many that are allowed: they cost nothing but time."""
    r.send((window(0, 1) + window(1, 1)) * 50_000)
    r.alive()


def large_frame(r, _):
    r.send(b"\x20\x00\x00" + frame(DATA, 0, 1)[3:])
    r.cut(FRAME_SIZE_ERROR)


def push_promise(r, _):
    r.send(frame(PUSH_PROMISE, END_HEADERS, 1, b"\x00\x00\x00\x02" + r.block((":method", "GET"))))
    r.cut(PROTOCOL_ERROR)


BOTH = (random_bytes, random_frames, ping_flood, ping_flood_unread, settings_flood, settings_table, ack_flood, empty_data, padded_data,
        priority_flood, unknown_flood, reset_flood, window_overflow, window_updates, large_frame, push_promise)


# As a client.


def no_tls(about):
    for data in b"", b"hello\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", PREFACE + setting(), random.randbytes(1 << 16):
        s = socket.create_connection(peer.address(about["to"]), PATIENCE)
        s.sendall(data)
        if data[:1] not in (b"", b"\x16"):
            try:
                while s.recv(1 << 16):
                    pass
            except ConnectionResetError:
                pass
        s.close()


def half_hello(about):
    """Many who begin with TLS and go no further; meanwhile others are served."""
    ss = [socket.create_connection(peer.address(about["to"]), PATIENCE) for _ in range(200)]
    for i, s in enumerate(ss):
        s.sendall((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100))[:i % 111])
    good(about)
    for s in ss:
        s.close()


def many_connections(about):
    """Many tunnels, with nothing in them; meanwhile others are served."""
    ss = [Raw(dial(about), hello=(PREFACE + setting())[:i % 40]) for i in range(60)]
    good(about)
    for r in ss:
        r.close()


def http1(about):
    r = Raw(dial(about), hello=b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    r.cut(PROTOCOL_ERROR)


def no_settings(about):
    r = Raw(dial(about), hello=PREFACE + frame(PING, payload=b"are you?"))
    r.cut(PROTOCOL_ERROR)


def bomb(r, about, n):
    """Headers that refer n times, a byte each, to one entry of 3 KB in the table."""
    value = b"b" * 3000
    block = r.block((":method", "CONNECT"), (":authority", about["echo"]), ("bomb", value))
    return block + r.block(("bomb", value)) * n


def header_bomb(about):
    """60 KB that are 180 MB. It is asked again and again, and each time it is too
    much (431); the tunnel lives on."""
    r = Raw(dial(about))
    streams = range(1, 40, 2)
    for stream in streams:
        r.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, bomb(r, about, 60_000)))
    r.answered("431", *streams)
    r.alive()


def header_bomb_in_parts(about):
    """The same in CONTINUATIONs, and larger."""
    r = Raw(dial(about))
    block = bomb(r, about, 1_000_000)
    r.send(frame(HEADERS, END_STREAM, 1, block[:16000]))
    for at in range(16000, len(block), 16000):
        if not r.send(frame(CONTINUATION, 0, 1, block[at:at + 16000])):
            break
    r.cut(PROTOCOL_ERROR, ENHANCE_YOUR_CALM)


def header_flood(about):
    """Headers that don't end: each large."""
    r = Raw(dial(about))
    r.send(r.connect(1, about["echo"], flags=0))
    r.flood(frame(CONTINUATION, 0, 1, b"\x00\x01x\x7f\x81\x3e" + b"y" * 8000), PROTOCOL_ERROR, ENHANCE_YOUR_CALM)


def continuation_flood(about):
    """Headers that don't end: each tiny."""
    r = Raw(dial(about))
    r.send(r.connect(1, about["echo"], flags=0))
    r.flood(frame(CONTINUATION, 0, 1, b"\x00\x01x\x01y"), PROTOCOL_ERROR, ENHANCE_YOUR_CALM)


def empty_continuations(about):
    """Headers that don't end: with nothing in them."""
    r = Raw(dial(about))
    r.send(r.connect(1, about["echo"], flags=0))
    r.flood(frame(CONTINUATION, 0, 1), PROTOCOL_ERROR, ENHANCE_YOUR_CALM)


def bad_hpack(about):
    for block in b"\xff\xff\xff\xff\xff\xff\xff", b"\x00\x7f\xff\xff\xff\xff\xff\x0f", b"\xbf", b"\x3f\xff\xff\xff\x7f":
        r = Raw(dial(about))
        r.send(frame(HEADERS, END_HEADERS, 1, block))
        r.cut(COMPRESSION_ERROR)


def requests(r, about, *more, then=lambda stream: b""):
    """Requests without end, until the connection is cut."""
    stream = 1
    while not r.over:
        batch = bytearray()
        for _ in range(200):
            batch += r.connect(stream, about["echo"], *more) + then(stream)
            stream += 2
        r.send(batch)
        if stream > 1_000_000:
            raise AssertionError("half a million and it goes on")
    r.cut(ENHANCE_YOUR_CALM)


def rapid_reset(about):
    """Requests that are taken back at once."""
    requests(Raw(dial(about)), about, then=reset)


def rapid_bad(about):
    """Requests that are wrong, each for itself."""
    requests(Raw(dial(about)), about, (":path", "/"))


def too_many(about):
    """More streams than are allowed: the rest is refused."""
    r = Raw(dial(about))
    for i in range(300):
        r.send(r.connect(2 * i + 1, about["echo"]))
    r.wait("300 answers", lambda: len(r.answers) + len([f for f in r.frames if f[0] == RST_STREAM]) == 300)
    refused = [f for f in r.frames if f[0] == RST_STREAM]
    want((len(refused), {f[3][3] for f in refused}), (100, {REFUSED_STREAM}))
    r.alive()


def no_window(about):
    """200 applications have much to say, and may not."""
    r = Raw(dial(about), hello=PREFACE + setting((4, 0)))
    streams = range(1, 400, 2)
    for stream in streams:
        r.send(r.connect(stream, about["endless"]))
    r.answered("200", *streams)
    r.alive()
    want(r.data, 0)


def reads_nothing(about):
    """200 applications have much to say, and may, but it is not read."""
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.settimeout(PATIENCE)
    s.connect(peer.address(about["to"]))
    r = Raw(context(about, about["pem"]).wrap_socket(s), hello=PREFACE + setting((4, MOST)) + window(0, MOST - 65535))
    for stream in range(1, 400, 2):
        r.send(r.connect(stream, about["endless"]), reads=False)
    r.stuffed()


def reads_some(about):
    """The same, after each application has said much: its chunks are large."""
    r = Raw(dial(about), hello=PREFACE + setting((4, MOST)) + window(0, MOST - 65535))
    for stream in range(1, 16, 2):
        r.send(r.connect(stream, about["endless"]))
    r.wait("100 MiB", lambda: r.data > 100 << 20)
    r.stuffed()


def apps_read_nothing(about):
    """200 applications do not read what we send them, as much as we may."""
    r = Raw(dial(about))
    streams = range(1, 400, 2)
    for stream in streams:
        r.send(r.connect(stream, about["mute"]))
    r.answered("200", *streams)
    chunk = bytes(1 << 14)
    left = {s: 4 << 20 for s in streams}
    sent = 0
    while True:
        room = 65535 - sent + sum(struct.unpack(">I", f[3])[0] for f in r.find(WINDOW_UPDATE))
        if room < len(chunk):
            r.alive()  # so all credit there is has come
            if room == 65535 - sent + sum(struct.unpack(">I", f[3])[0] for f in r.find(WINDOW_UPDATE)):
                break
            continue
        for stream in [s for s in streams if left[s] >= len(chunk)][:room // len(chunk)]:
            r.send(frame(DATA, 0, stream, chunk))
            left[stream] -= len(chunk)
            sent += len(chunk)
        if not any(n >= len(chunk) for n in left.values()):
            break
    r.alive()


def beyond_window(about):
    """More than we may, to an application that does not read."""
    r = Raw(dial(about))
    r.send(r.connect(1, about["mute"]))
    r.answered("200", 1)
    r.send(frame(DATA, 0, 1, bytes(1 << 14)) * 4096)
    r.wait("a reset or the end", lambda: r.over or r.find(RST_STREAM, 1))
    if not r.over:
        want(r.find(RST_STREAM, 1)[0][3][3], FLOW_CONTROL_ERROR)


def vanishes(about):
    """The connection is reset with all streams busy."""
    s = dial(about)
    r = Raw(s)
    streams = range(1, 400, 2)
    for stream in streams:
        r.send(r.connect(stream, about["echo"]) + frame(DATA, 0, stream, b"hello"))
    r.answered("200", *streams)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


CLIENT = (no_tls, half_hello, many_connections, http1, no_settings, header_bomb, header_bomb_in_parts, header_flood, continuation_flood, empty_continuations,
          bad_hpack, rapid_reset, rapid_bad, too_many, no_window, reads_nothing, reads_some, beyond_window, vanishes, apps_read_nothing)


# As a server. Stream 1 asks for a connection, and has no answer yet.


def not_http2(r, _):
    r.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    r.cut(PROTOCOL_ERROR, FRAME_SIZE_ERROR, ENHANCE_YOUR_CALM)


def answer(r, *fields):
    return frame(HEADERS, END_HEADERS, 1, r.block(*fields))


def bad_status(r, _):
    for status in ":status", "2x0", "", "99", "2000", "-20":
        r.send(answer(r, (":status", status)))
    r.wait("a reset", lambda: r.find(RST_STREAM, 1))
    want([f[3][3] for f in r.find(RST_STREAM, 1)], [PROTOCOL_ERROR])
    r.alive()


def no_status(r, _):
    r.send(answer(r, ("status", "200")))
    r.wait("a reset", lambda: r.find(RST_STREAM, 1))
    r.alive()


def answer_bomb(r, _):
    value = b"b" * 3000
    block = r.block((":status", "200"), ("bomb", value))
    r.send(frame(HEADERS, END_HEADERS, 1, block + r.block(("bomb", value)) * 60_000))
    r.wait("a reset or the end", lambda: r.over or r.find(RST_STREAM, 1))


def answer_without_end(r, _):
    r.send(frame(HEADERS, 0, 1, r.block((":status", "200"))))
    r.flood(frame(CONTINUATION, 0, 1, b"\x00\x01x\x01y"), PROTOCOL_ERROR, ENHANCE_YOUR_CALM)


def still_working(r, _):
    """102 Processing, and so on for ever."""
    r.flood(answer(r, (":status", "102")), ENHANCE_YOUR_CALM)


def data_before_answer(r, _):
    r.send(frame(DATA, 0, 1, b"already"))
    r.wait("a reset", lambda: r.find(RST_STREAM, 1))
    r.alive()


def answers_nobody(r, _):
    r.send(frame(HEADERS, END_HEADERS, 3, r.block((":status", "200"))))
    r.cut(PROTOCOL_ERROR)


def goaway_flood(r, _):
    """Farewells that need no answer: they cost nothing but time, and stream 1 goes on."""
    r.send(frame(GOAWAY, 0, 0, struct.pack(">II", 1, 0)) * 50_000)
    r.alive()


SERVER = (not_http2, bad_status, no_status, answer_bomb, answer_without_end, still_working, data_before_answer, answers_nobody, goaway_flood)


def good(about):
    """And who keeps the rules is served."""
    t = Peer(dial(about))
    echo(t, about["echo"])
    t.close()


def as_client(case):
    def run(about):
        r = Raw(dial(about))
        r.send(r.connect(1, about["echo"]))
        r.answered("200", 1)
        case(r, about)
        r.close()
    return run


def client(about):
    cases = {f.__name__: as_client(f) for f in BOTH} | {f.__name__: f for f in CLIENT}
    say(list(cases))
    random.seed(1)
    for line in iter(sys.stdin.readline, ""):
        cases[line.strip()](about)
        good(about)
        say("done")


def server(about):
    listener = socket.create_server(("0.0.0.0", 15008), backlog=128)
    listener.settimeout(PATIENCE)
    cases = {f.__name__: (f, False) for f in SERVER} | {f.__name__: (f, True) for f in BOTH}
    tls = context(about, about["pem"], server=True)

    def accept():
        s, _ = listener.accept()
        s.settimeout(PATIENCE)
        return tls.wrap_socket(s, server_side=True)
    say(list(cases))
    random.seed(2)
    for line in iter(sys.stdin.readline, ""):
        case, answers = cases[line.strip()]
        r = Raw(accept(), hello=b"" if case is not_http2 else setting(), skip=len(PREFACE))
        r.wait("a request", lambda: r.find(HEADERS, 1))
        if answers:
            r.send(answer(r, (":status", "200")))
        case(r, about)
        r.close()
        say("done")
        t = Peer(accept(), client=False)
        sid = t.request()
        t.respond(sid, "200")
        t.send(sid, t.hear(sid, 4))
        t.hear_end(sid)
        t.end(sid)
        t.alive()
        t.close()


if __name__ == "__main__":
    sys.exit(peer.main({"client": client, "server": server}))
