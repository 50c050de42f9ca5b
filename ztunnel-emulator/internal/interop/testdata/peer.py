"""HTTP/2 CONNECT over TLS by Debian's h2 and Python's ssl.

A script is called with the name of a case and JSON about the world. It says what
it has seen on stdout, a line of JSON each, and ends with 0 if it got what it wants.
"""

import json
import select
import socket
import ssl
import sys

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, ConnectionState, H2Connection, H2ConnectionStateMachine
from h2 import events, settings

PATIENCE = 15  # seconds, for anything

# h2 takes GOAWAY for the end. But streams that are open go on (RFC 9113, 6.8).
for state in ConnectionState.CLIENT_OPEN, ConnectionState.SERVER_OPEN:
    for goaway in ConnectionInputs.RECV_GOAWAY, ConnectionInputs.SEND_GOAWAY:
        H2ConnectionStateMachine._transitions[state, goaway] = (None, state)


def say(something):
    print(json.dumps(something), flush=True)


def context(about, pem, server=False, alpn=("h2",)):
    """TLS that shows the certificate in pem and believes about["root"]."""
    c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    c.check_hostname = False
    c.verify_mode = ssl.CERT_REQUIRED
    c.load_verify_locations(about["root"])
    if pem:
        c.load_cert_chain(pem)
    if alpn:
        c.set_alpn_protocols(list(alpn))
    return c


def address(text):
    host, port = text.rsplit(":", 1)
    return host, int(port)


def dial(about, pem=None, alpn=("h2",)):
    """TLS to ztunnel, with about["pem"], another certificate, or "" for none."""
    s = socket.create_connection(address(about["to"]), PATIENCE)
    return context(about, about["pem"] if pem is None else pem, alpn=alpn).wrap_socket(s)


def identity(s):
    """The URI SANs of the peer's certificate."""
    return [v for k, v in s.getpeercert().get("subjectAltName", ()) if k == "URI"]


class Stream:
    def __init__(self, headers=None):
        self.headers = headers  # that came: the response, or the request
        self.data = bytearray()
        self.ended = False
        self.reset = None  # the code
        self.got = 0


class Peer:
    """One connection. It does something only while a method of it runs."""

    def __init__(self, s, client=True, **own):
        self.s = s
        self.h2 = H2Connection(H2Configuration(
            client_side=client, header_encoding="utf-8",
            # It knows no CONNECT: it would insist on :scheme and :path. And what
            # came is to be seen as it came.
            validate_outbound_headers=False, normalize_outbound_headers=False,
            validate_inbound_headers=False, normalize_inbound_headers=False))
        self.streams = {}
        self.requests = []  # streams not taken yet, of a server
        self.goaways = []
        self.pongs = 0
        self.closed = False
        self.credit = True  # give window for what came
        self.take = lambda stream, data: stream.data.extend(data)
        self.out = bytearray()
        s.setblocking(False)
        own = {getattr(settings.SettingCodes, k): v for k, v in own.items()}
        self.h2.local_settings = settings.Settings(client=client, initial_values=own)
        self.h2.max_inbound_frame_size = self.h2.local_settings.max_frame_size
        self.h2.initiate_connection()

    def step(self):
        """Write what there is, read what has come; wait if there is neither."""
        self.out += self.h2.data_to_send()
        busy = False
        try:
            while self.out:
                del self.out[:self.s.send(self.out)]
                busy = True
        except ssl.SSLWantWriteError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.out.clear()
        try:
            data = self.s.recv(1 << 18)
            if not data:
                self.closed = True
            for e in self.h2.receive_data(data):
                self.event(e)
            self.out += self.h2.data_to_send()
            return
        except (ssl.SSLWantReadError, BlockingIOError):
            pass
        except (ConnectionResetError, ssl.SSLEOFError):
            self.closed = True
            return
        if not busy:
            r, w, _ = select.select([self.s], [self.s] if self.out else [], [], PATIENCE)
            if not r and not w:
                raise TimeoutError(f"nothing in {PATIENCE} s")

    def event(self, e):
        stream = self.streams.get(getattr(e, "stream_id", None))
        if isinstance(e, events.RequestReceived):
            self.streams[e.stream_id] = Stream(e.headers)
            self.requests.append(e.stream_id)
        elif isinstance(e, events.ResponseReceived):
            stream.headers = e.headers
        elif isinstance(e, events.DataReceived):
            stream.got += len(e.data)
            self.take(stream, e.data)
            if self.credit:
                self.h2.acknowledge_received_data(e.flow_controlled_length, e.stream_id)
        elif isinstance(e, events.StreamEnded):
            stream.ended = True
        elif isinstance(e, events.StreamReset):
            if e.remote_reset:
                stream.reset = e.error_code
        elif isinstance(e, events.ConnectionTerminated):
            self.goaways.append(int(e.error_code))
        elif isinstance(e, events.PingAckReceived):
            self.pongs += 1

    def more(self, what):
        if self.closed:
            raise EOFError("the connection ended before " + what)
        self.step()

    def until(self, what, ready):
        while not ready():
            self.more(what)

    def flush(self):
        self.out += self.h2.data_to_send()
        self.until("it was written", lambda: not self.out)

    # As a client.

    def ask(self, fields, end=False):
        sid = self.h2.get_next_available_stream_id()
        self.streams[sid] = Stream()
        self.h2.send_headers(sid, fields, end_stream=end)
        return sid

    def connect(self, authority, *more):
        return self.ask([(":method", "CONNECT"), (":authority", authority), *more])

    def answer(self, sid):
        """The response's headers, as a list."""
        stream = self.streams[sid]
        self.until("the answer", lambda: stream.headers or stream.reset is not None)
        if stream.reset is not None and not stream.headers:
            raise ConnectionError(f"reset with {stream.reset}")
        return list(stream.headers)

    def opened(self, authority, *more):
        """Connect, and want 200."""
        sid = self.connect(authority, *more)
        want(self.answer(sid)[0], (":status", "200"))
        return sid

    # As a server.

    def request(self):
        """The next request: its stream."""
        self.until("a request", lambda: self.requests)
        return self.requests.pop(0)

    def respond(self, sid, status, *more, end=False):
        self.h2.send_headers(sid, [(":status", status), *more], end_stream=end)

    # As both.

    def send(self, sid, data, end=False):
        """Data as the windows allow it."""
        view = memoryview(data)
        while view:
            room = min(self.h2.local_flow_control_window(sid), self.h2.max_outbound_frame_size, len(view))
            # Not too much ahead of the socket.
            if room <= 0 or len(self.out) > 1 << 20:
                self.more("window")
                continue
            self.h2.send_data(sid, view[:room].tobytes())
            self.out += self.h2.data_to_send()
            view = view[room:]
        if end:
            self.h2.end_stream(sid)
        self.flush()

    def hear(self, sid, n):
        """Exactly n bytes."""
        stream = self.streams[sid]
        self.until(f"{n} bytes", lambda: len(stream.data) >= n or stream.ended or stream.reset is not None)
        data = bytes(stream.data[:n])
        del stream.data[:n]
        return data

    def end(self, sid):
        self.h2.end_stream(sid)
        self.flush()

    def hear_end(self, sid):
        """END_STREAM, and nothing before it."""
        stream = self.streams[sid]
        self.until("END_STREAM", lambda: stream.ended or stream.reset is not None)
        want((bytes(stream.data), stream.ended), (b"", True))

    def hear_reset(self, sid):
        stream = self.streams[sid]
        self.until("RST_STREAM", lambda: stream.reset is not None)
        return int(stream.reset)

    def alive(self):
        """A ping comes back."""
        n = self.pongs
        self.h2.ping(b"are you?")
        self.until("a pong", lambda: self.pongs > n)
        want(self.goaways, [])

    def close(self):
        self.s.close()


def want(got, wanted):
    if got != wanted:
        raise AssertionError(f"got {got!r}, want {wanted!r}")


def echo(peer, authority, text=b"ping"):
    """A whole exchange over a new stream, to an application that says it back."""
    sid = peer.opened(authority)
    peer.send(sid, text, end=True)
    want(peer.hear(sid, len(text)), text)
    peer.hear_end(sid)


def main(cases):
    cases[sys.argv[1]](json.loads(sys.argv[2]))
