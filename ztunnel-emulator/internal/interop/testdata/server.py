"""A server at a pod's 15008 that keeps the rules, more or less: what it does with
the tunnels that it gets is the case."""

import socket
import ssl
import sys

import peer
from hyperframe.frame import SettingsFrame
from h2.settings import SettingCodes
from peer import Peer, context, identity, say, want

NO_ERROR, INTERNAL_ERROR, REFUSED_STREAM, CANCEL = 0, 2, 7, 8


class Server:
    def __init__(self, about):
        self.about = about
        self.listener = socket.create_server(("0.0.0.0", 15008), backlog=128)
        self.listener.settimeout(peer.PATIENCE)
        say("ready")

    def tls(self, pem=None):
        """The next connection, after its handshake."""
        s, _ = self.listener.accept()
        s.settimeout(peer.PATIENCE)
        c = context(self.about, pem or self.about["pem"], server=True)
        self.sni = []
        c.sni_callback = lambda _, name, __: self.sni.append(name)
        return c.wrap_socket(s, server_side=True)

    def tunnel(self, **own):
        return Peer(self.tls(), client=False, **own)


def answer(t):
    """200 to the next request."""
    sid = t.request()
    t.respond(sid, "200")
    return sid


def echo(t, sid):
    """Say back what comes on one stream until it ends, and end."""
    stream = t.streams[sid]
    while not (stream.ended and not stream.data):
        t.until("bytes", lambda: stream.data or stream.ended)
        data = bytes(stream.data)
        del stream.data[:len(data)]
        t.send(sid, data)
    t.end(sid)


def until_closed(t):
    while not t.closed:
        t.step()


def serve(t, n=1):
    """Echo on the next streams, one after the other; the tunnel outlives them."""
    for _ in range(n):
        echo(t, answer(t))
    t.alive()


def until_told():
    """The one who has asked has the last bytes."""
    sys.stdin.read()


def requests(about):
    """What ztunnel says of itself in TLS, and what it asks for, to the letter."""
    server = Server(about)
    s = server.tls()
    say({"version": s.version(), "alpn": s.selected_alpn_protocol(), "sni": server.sni, "identity": identity(s)})
    t = Peer(s, client=False)
    for _ in range(2):
        sid = t.request()
        say(t.streams[sid].headers)
        t.respond(sid, "200", ("baggage", "k8s.cluster.name=elsewhere"))
        echo(t, sid)
    until_told()


def half_close(about):
    """We end first and listen on; then the application does."""
    t = Server(about).tunnel()
    sid = answer(t)
    t.send(sid, b"question", end=True)
    want(t.hear(sid, 6), b"answer")
    t.hear_end(sid)
    sid = answer(t)
    want(t.hear(sid, 8), b"question")
    t.hear_end(sid)
    t.send(sid, b"answer", end=True)
    until_told()


def refuses(about):
    """A status other than 200, with and without END_STREAM; then yes."""
    t = Server(about).tunnel()
    for status in "401", "503", "204", "200":
        sid = t.request()
        t.respond(sid, status, end=status == "401")
        t.flush()
        if status != "200":
            t.until("its end", lambda: t.streams[sid].reset is not None)
    echo(t, sid)
    t.alive()
    until_told()


def closes(about):
    """The end comes after TLS, after the request, and in the middle of a stream."""
    server = Server(about)
    server.tls().close()
    t = server.tunnel()
    t.request()
    t.close()
    t = server.tunnel()
    sid = answer(t)
    t.send(sid, b"some")
    want(t.hear(sid, 4), b"more")
    t.close()
    serve(server.tunnel())
    until_told()


def goes_away(about):
    """GOAWAY: what is open goes on; what comes next finds another tunnel."""
    server = Server(about)
    first = server.tunnel()
    sid = answer(first)
    want(first.hear(sid, 5), b"first")
    first.h2.close_connection(NO_ERROR, last_stream_id=sid)
    first.flush()
    first.alive()  # it has it
    say("gone")
    second = server.tunnel()
    other = answer(second)
    want(second.hear(other, 6), b"second")
    first.send(sid, b"still here")
    want(first.hear(sid, 4), b"last")
    first.hear_end(sid)
    first.end(sid)
    until_closed(first)
    echo(second, other)
    second.alive()
    until_told()


def unprocessed(about):
    """GOAWAY and RST_STREAM that say: not processed. It is asked again elsewhere."""
    server = Server(about)
    t = server.tunnel()
    t.request()
    t.h2.close_connection(NO_ERROR, last_stream_id=0)
    t.flush()
    until_closed(t)
    t = server.tunnel()
    t.h2.reset_stream(t.request(), REFUSED_STREAM)
    t.flush()
    serve(server.tunnel())
    until_told()


def resets(about):
    """RST_STREAM in the middle: codes that are an end, and codes that are none."""
    t = Server(about).tunnel()
    for code in NO_ERROR, CANCEL, INTERNAL_ERROR:
        sid = answer(t)
        want(t.hear(sid, 4), b"some")
        t.send(sid, b"more")
        t.h2.reset_stream(sid, code)
        t.flush()
    serve(t)
    until_told()


def resets_request(about):
    """RST_STREAM in place of an answer."""
    t = Server(about).tunnel()
    t.h2.reset_stream(t.request(), INTERNAL_ERROR)
    serve(t)
    until_told()


def small_windows(about):
    """A small window, moved by a few bytes, shrunk below nothing, and opened. h2
    would not take a byte too much, nor a frame too large."""
    t = Server(about).tunnel(INITIAL_WINDOW_SIZE=151)
    t.credit = False
    sid = answer(t)
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
    # Then the connection's window is what there is.
    t.h2.increment_flow_control_window(1 << 20, sid)
    exactly(65535)
    t.h2.increment_flow_control_window(1)
    exactly(65536)
    t.h2.increment_flow_control_window(1 << 20)
    t.until("the end", lambda: stream.ended)
    t.send(sid, b"%d" % stream.got, end=True)
    t.alive()
    until_told()


def few_streams(about):
    """Two streams at most: the third is another tunnel's."""
    server = Server(about)
    first = server.tunnel(MAX_CONCURRENT_STREAMS=2)
    one = answer(first)
    first.send(one, first.hear(one, 4))  # now ztunnel knows
    two = answer(first)
    first.flush()
    say("full")
    second = server.tunnel(MAX_CONCURRENT_STREAMS=2)
    serve(second)
    echo(first, two)
    echo(first, one)
    until_closed(first)  # one that was full is not used again
    until_told()


def never_acks(about):
    """SETTINGS that are never acknowledged: ours hold, as they are in force for h2
    from the start."""
    server = Server(about)
    t = server.tunnel()
    settings = t.h2._frame_dispatch_table[SettingsFrame]
    t.h2._frame_dispatch_table[SettingsFrame] = lambda f: settings(f) if "ACK" in f.flags else ([], [])
    serve(t, 2)
    until_told()


def silent(about):
    """TLS, and then not a word, not even SETTINGS. What is asked waits, until the
    one who asks is ended."""
    s = Server(about).tls()
    got = bytearray()
    while b"PRI * HTTP/2.0" not in got:
        got += s.recv(1 << 16)
    say("asked")
    try:
        while s.recv(1 << 16):
            pass
    except (ConnectionResetError, ssl.SSLError):
        pass


def back(about):
    """Much more than the windows hold, from the application, and then back."""
    t = Server(about).tunnel(INITIAL_WINDOW_SIZE=1 << 20, MAX_FRAME_SIZE=1 << 18)
    t.h2.increment_flow_control_window(4 << 20)
    sid = t.request()
    t.respond(sid, "200")
    stream = t.streams[sid]
    parts = []

    def keep(_, data):
        parts.append(data)
    t.take = keep
    t.until("all of it", lambda: stream.ended)
    for part in parts:
        t.send(sid, part)
    t.end(sid)
    until_told()


def certificates(about):
    """Certificates, one after the other, that ztunnel does not accept; the last it does."""
    server = Server(about)
    for name, pem, alert in about["certificates"]:
        try:
            s = server.tls(pem)
            while s.recv(1 << 16):
                pass
            got = "the end"
        except ssl.SSLError as e:
            got = e.reason
        except ConnectionResetError:
            got = "a reset"
        want((name, got), (name, alert))
    serve(server.tunnel())
    until_told()


if __name__ == "__main__":
    sys.exit(peer.main({f.__name__: f for f in (
        requests, half_close, refuses, closes, goes_away, unprocessed, resets, resets_request, small_windows, few_streams,
        never_acks, silent, back, certificates)}))
