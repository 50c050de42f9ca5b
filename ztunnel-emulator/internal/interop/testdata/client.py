"""A client of 15008 that keeps the rules: each case is a tunnel, or some."""

import hashlib
import ssl
import sys
import zlib

import peer
from h2.settings import SettingCodes
from peer import Peer, dial, echo, say, want

REFUSED_STREAM = 7


def plain(about):
    """200 and who answers, and bytes both ways."""
    s = dial(about)
    want((s.version(), s.selected_alpn_protocol()), ("TLSv1.3", "h2"))
    want(peer.identity(s), [about["identity"]])
    t = Peer(s)
    sid = t.opened(about["app"])
    for text in b"ping", b"and once more":
        t.send(sid, text)
        want(t.hear(sid, len(text)), text)
    t.end(sid)
    t.hear_end(sid)
    # One that has nothing to say.
    sid = t.ask([(":method", "CONNECT"), (":authority", about["app"])], end=True)
    want(t.answer(sid)[0], (":status", "200"))
    t.hear_end(sid)
    t.alive()


def trailers(about):
    """Trailers are an end, and say nothing else."""
    t = Peer(dial(about))
    sid = t.opened(about["app"])
    t.send(sid, b"ping")
    t.h2.send_headers(sid, [("x-checksum", "1234")], end_stream=True)
    want(t.hear(sid, 4), b"ping")
    t.hear_end(sid)
    t.alive()


def goes_away(about):
    """Our GOAWAY: what is open goes on."""
    t = Peer(dial(about))
    sid = t.opened(about["app"])
    t.h2.close_connection()
    t.send(sid, b"ping", end=True)
    want(t.hear(sid, 4), b"ping")
    t.hear_end(sid)


def no_alpn(about):
    """Who offers no protocol is taken to speak h2."""
    s = dial(about, alpn=())
    want(s.selected_alpn_protocol(), None)
    echo(Peer(s), about["app"])


def headers(about):
    """All that a ztunnel sends; and what the pod says of itself."""
    t = Peer(dial(about))
    sid = t.connect(about["app"], *map(tuple, about["headers"]))
    want(t.answer(sid), [(":status", "200"), ("baggage", about["baggage"])])
    t.send(sid, b"ping", end=True)
    want(t.hear(sid, 4), b"ping")
    t.hear_end(sid)


def client_ends(about):
    """We end first; the application answers after that."""
    t = Peer(dial(about))
    sid = t.opened(about["app"])
    t.send(sid, b"question", end=True)
    want(t.hear(sid, 6), b"answer")
    t.hear_end(sid)


def app_ends(about):
    """The application ends first; it goes on listening."""
    t = Peer(dial(about))
    sid = t.opened(about["app"])
    want(t.hear(sid, 8), b"question")
    t.hear_end(sid)
    t.send(sid, b"answer", end=True)
    t.alive()


def many(about):
    """Streams side by side on one connection, whose bytes do not mix."""
    t = Peer(dial(about))
    sids = [t.opened(about["app"]) for _ in range(50)]
    texts = {sid: hashlib.sha256(bytes([sid])).hexdigest().encode() * 100 for sid in sids}
    for half in slice(0, 3000), slice(3000, None):
        for sid in sids:
            t.send(sid, texts[sid][half])
    for sid in reversed(sids):
        want(t.hear(sid, len(texts[sid])), texts[sid])
    for sid in sids:
        t.end(sid)
        t.hear_end(sid)
    t.alive()


def upload(about):
    """Much more than the windows hold, to the application."""
    t = Peer(dial(about))
    sid = t.opened(about["app"])
    block, crc = bytes(range(256)) * 4096, 0
    for i in range(about["size"] >> 20):
        b = i.to_bytes(4, "big") + block[4:]
        crc = zlib.crc32(b, crc)
        t.send(sid, b)
    t.end(sid)
    want(t.hear(sid, 8), b"%08x" % crc)
    t.hear_end(sid)


def download(about):
    """Much more than the windows hold, from the application."""
    t = Peer(dial(about), INITIAL_WINDOW_SIZE=1 << 20, MAX_FRAME_SIZE=1 << 18)
    t.h2.increment_flow_control_window(4 << 20)
    sid, crc = t.opened(about["app"]), 0

    def take(stream, data):
        nonlocal crc
        crc = zlib.crc32(data, crc)
    t.take = take
    t.until("all of it", lambda: t.streams[sid].ended)
    want(t.streams[sid].got, about["size"])
    say("%08x" % crc)


def small_windows(about):
    """A client with a small window, who moves it by a few bytes, shrinks it below
    nothing by SETTINGS, and opens it. h2 would not take a byte too much."""
    t = Peer(dial(about), INITIAL_WINDOW_SIZE=151)
    t.credit = False
    sid = t.opened(about["app"])
    text = hashlib.sha256().hexdigest().encode() * 50
    t.send(sid, text, end=True)
    stream, got = t.streams[sid], 0

    def exactly(n):
        t.until(f"{n} bytes", lambda: stream.got == n)
        t.alive()  # with anything that came besides
        want(stream.got, n)
    exactly(151)
    for more in 1, 2, 3, 5, 8, 13, 21, 34, 55:
        got += more
        t.h2.increment_flow_control_window(more, sid)
        exactly(151 + got)
    # h2 counts a larger window only from the acknowledgement on.
    for size in range(161, 652, 10):
        got += 10
        t.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: size})
        exactly(151 + got)
    t.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 151})
    t.h2.increment_flow_control_window(500, sid)
    t.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1})
    t.alive()  # the window is -150
    t.h2.increment_flow_control_window(150, sid)
    exactly(151 + got)
    t.h2.increment_flow_control_window(len(text), sid)
    want(t.hear(sid, len(text)), text)
    t.hear_end(sid)


def bad_requests(about):
    """What is answered with 400, and what is reset; the tunnel lives on."""
    t = Peer(dial(about))
    app = about["app"]
    connect = (":method", "CONNECT")
    rest = [(":scheme", "https"), (":path", "/")]
    for fields in (
        [connect],
        [connect, (":authority", "")],
        [connect, (":authority", "10.0.2.2")],
        [connect, (":authority", "no port:x")],
        [connect, (":authority", "a b:80")],
        [connect, (":authority", "10.99.99.99:80")],  # ip mismatch
        [(":method", "GET"), (":authority", app), *rest],
        [(":method", "POST"), (":authority", app), *rest, ("content-length", "5")],
    ):
        sid = t.ask(fields)
        want(t.answer(sid), [(":status", "400")])
        t.hear_end(sid)
    for fields in (
        [connect, (":authority", app), *rest],
        [connect, (":authority", app), (":scheme", "https")],
        [connect, (":authority", app), (":path", "/")],
    ):
        sid = t.ask(fields)
        want(t.hear_reset(sid), 1)  # PROTOCOL_ERROR
    # 503: nobody has that name, or that port, and 15008 would be ourselves.
    for authority in "nobody.example:80", about["unnamed"], about["to"]:
        sid = t.connect(authority)
        want(t.answer(sid), [(":status", "503")])
        t.hear_end(sid)
    echo(t, app)


def by_name(about):
    """A service's name leads to the port that it has in this pod."""
    echo(Peer(dial(about)), about["name"])


def status(about):
    """No tunnel but a status, which ends the stream, and only that."""
    t = Peer(dial(about, about["stranger"] if about["status"] == "401" else None))
    for _ in range(3):
        sid = t.connect(about["app"])
        want(t.answer(sid), [(":status", about["status"])])
        t.hear_end(sid)
    t.alive()


def reset(about):
    """We reset a stream in the middle of what it carries; another goes on."""
    t = Peer(dial(about))
    other = t.opened(about["echo"])
    t.send(other, b"before")
    want(t.hear(other, 6), b"before")
    sid = t.opened(about["app"])
    t.send(sid, b"first part")
    want(t.hear(sid, 2), b"go")
    t.h2.reset_stream(sid, about["code"])
    t.flush()
    t.send(other, b"after", end=True)
    want(t.hear(other, 5), b"after")
    t.hear_end(other)


def app_resets(about):
    """The application's reset is an end like any other, and the tunnel lives on."""
    t = Peer(dial(about))
    sid = t.opened(about["app"])
    t.send(sid, b"reset, please")
    t.hear_end(sid)
    t.alive()
    echo(t, about["echo"])


def leave(about):
    """The connection is closed with a stream open on it."""
    t = Peer(dial(about))
    sid = t.opened(about["app"])
    t.send(sid, b"bye")
    t.close()


def goaway(about):
    """ztunnel is ended: we are told, no stream begins, and what is open is finished."""
    t = Peer(dial(about))
    sid = t.opened(about["app"])
    t.send(sid, b"before")
    want(t.hear(sid, 6), b"before")
    say("open")
    t.until("GOAWAY", lambda: len(t.goaways) == 2)
    want(t.goaways, [0, 0])
    late = t.connect(about["app"])
    want(t.hear_reset(late), REFUSED_STREAM)
    text = b"much that comes after GOAWAY" * 10_000
    t.send(sid, text)
    want(t.hear(sid, len(text)), text)
    t.end(sid)
    t.hear_end(sid)
    while not t.closed:
        t.step()


def certificates(about):
    """Certificates, one after the other, that are refused with an alert."""
    for name, pem, alert in about["certificates"]:
        try:
            s = dial(about, pem)
            t = Peer(s)
            while not t.closed:
                t.step()
            raise AssertionError(f"{name}: no alert")
        except ssl.SSLError as e:
            want((name, e.reason), (name, alert))
        s.close()
    echo(Peer(dial(about)), about["app"])


if __name__ == "__main__":
    sys.exit(peer.main({f.__name__: f for f in (
        plain, trailers, goes_away, no_alpn, headers, client_ends, app_ends, many, upload, download, small_windows, bad_requests, by_name,
        status, reset, app_resets, leave, goaway, certificates)}))
